"""Something no one here prepared: models from PyTorch's own documentation, tables from scikit-learn."""

import csv
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn


def from_documentation(cls: type) -> str:
    """The first class in a torch docstring, unchanged but for its indentation."""
    lines = str(cls.__doc__).splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("class "))
    indent = len(lines[start]) - len(lines[start].lstrip())
    inside = [
        not line.strip() or line.startswith(" " * (indent + 1)) for line in lines[start + 1 :]
    ]
    end = start + 1 + (inside.index(False) if False in inside else len(inside))
    return textwrap.dedent("\n".join(lines[start:end]))


def summary(folder: str = "run") -> dict:
    return json.loads(Path(folder, "summary.json").read_text())


TRAIN = ["train", "--privacy", "none", "--run-dir", "run"]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
def test_a_model_from_the_documentation_pasted_into_models_trains(fedtorch, container):
    Path("models").mkdir()
    pasted = f"import torch\nfrom torch import nn\n\n{from_documentation(container)}\n"
    Path("models/pasted.py").write_text(pasted)
    assert "class MyModule" in pasted
    if container is nn.ModuleDict:  # this one wants two arguments in forward: a plain refusal
        code, _, err = fedtorch(*TRAIN, "--model", "pasted")
        assert code == 2
        assert "model MyModule cannot take a batch" in err
        return
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 10)).astype(np.float32) / 3
    np.savez("ten.npz", x=x, y=x.argmax(1))
    code, _, err = fedtorch(
        *TRAIN, "--dataset", "npz", "--dataset.path", "ten.npz", "--model", "pasted",
        "--rounds", 3, "--lr", 0.001, "--clients", 4,
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = [json.loads(s) for s in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]


def test_the_documentations_convolutions_train_on_digits_with_a_loss_of_ones_own(fedtorch):
    Path("models").mkdir()
    head = "import torch.nn as nn\nimport torch.nn.functional as F\n\n"
    Path("models/convs.py").write_text(head + from_documentation(nn.Module) + "\n")
    # it gives feature maps [B, 20, 1, 1] for padded digits: the loss says what they mean
    Path("maps.py").write_text(
        "import torch.nn.functional as F\n"
        "from sklearn.datasets import load_digits\n"
        "import torch\n"
        "from fedtorch.data import from_tensors\n"
        "def data():\n"
        "    x, y = load_digits(return_X_y=True)\n"
        "    x = F.pad(torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), (1, 1, 1, 1))\n"
        "    y = torch.tensor(y)\n"
        "    return from_tensors('maps', (x[:1400], y[:1400]), (x[1400:], y[1400:]), 'regression', 10)\n"
        "def loss(output, target):\n"
        "    return F.cross_entropy(output.amax((2, 3)), target, reduction='none')\n"
        "def hit(output, target):\n"
        "    return (output.amax((2, 3)).argmax(1) == target).float()\n"
    )
    code, _, err = fedtorch(
        *TRAIN, "--dataset", "custom", "--dataset.path", "maps:data", "--model", "convs",
        "--loss", "maps:loss", "--metrics", "maps:hit", "--rounds", 6, "--clients", 5,
    )  # fmt: skip
    assert (code, err) == (0, "")
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_hit"] > 0.5


def write_csv(name: str, x: np.ndarray, y: np.ndarray) -> None:
    with open(name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"x{j}" for j in range(x.shape[1])), "ward", "target"])
        for i, row in enumerate(x):
            writer.writerow([*row, f"ward {i % 3}", y[i]])


def test_regression_from_a_csv(fedtorch):
    x, y = load_diabetes(return_X_y=True)
    write_csv("diabetes.csv", x, (y - y.mean()) / y.std())
    code, out, _ = fedtorch(
        *TRAIN, "--dataset", "csv", "--dataset.path", "diabetes.csv", "--dataset.client", "ward",
        "--dataset.standardize", "true", "--model", "logistic", "--lr", 0.02, "--rounds", 10,
    )  # fmt: skip
    assert code == 0
    assert "3 clients" in out
    found = summary()
    assert found["test_accuracy"] is None
    # predicting the mean scores 1; least squares on these ten columns explains about half
    assert found["test_loss"] < 0.65
    assert "test_mae" in found


def test_binary_from_a_csv(fedtorch):
    x, y = load_breast_cancer(return_X_y=True)
    write_csv("tumours.csv", x, y)
    code, _, _ = fedtorch(
        *TRAIN, "--dataset", "csv", "--dataset.path", "tumours.csv", "--dataset.client", "ward",
        "--dataset.standardize", "true", "--dataset.kind", "binary", "--model", "logistic",
        "--lr", 0.05, "--rounds", 10,
    )  # fmt: skip
    assert code == 0
    assert summary()["test_accuracy"] > 0.93


def test_a_whole_batch_loss_and_metric_from_the_command_line(fedtorch, tmp_path):
    example = Path(__file__).parents[1] / "examples" / "survival.py"
    Path("cox_loss.py").write_text(example.read_text())
    import cox_loss

    x, y = (v.numpy() for v in cox_loss.patients(300, seed=5))
    np.savez("trial.npz", x=x, y=y, client=np.arange(300) % 3)
    code, _, err = fedtorch(
        *TRAIN, "--dataset", "npz", "--dataset.path", "trial.npz", "--model", "logistic",
        "--model.num-outputs", 1, "--loss", "cox_loss:cox", "--metrics", "cox_loss:concordance",
        "--batch-size", "null", "--lr", 0.3, "--rounds", 10,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert summary()["test_concordance"] > 0.65
