"""Steps by name: what options may say, and what a model is judged by where a step trains it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset, TensorDataset

from fedtorch import Recipe, evaluate
from fedtorch.run import steps
from fedtorch.types import ConfigError

OWN = """
import torch
import torch.nn.functional as F
from torch.utils.data import StackDataset
from fedtorch.data.base import Data, facts_of

def rows():
    x = torch.randn(60, 4)
    data = StackDataset(x=x, y=(x[:, 0] > 0).long())
    return Data("mine", data, data, "classification", 2, None, None, facts_of((4,), 2, "classification"))

def fit(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def judge(model, batch):
    return model(batch["x"]), batch["y"]
"""


def losses(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def pairs(model, batch):
    return model(batch["x"]), batch["y"]


def figures(model, batch):
    return {"likes": losses(model, batch)}


X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 1, 0])
NAMED, PAIRS = StackDataset(x=X, y=Y), TensorDataset(X, Y)
OURS = "test_run_steps:{}"


@pytest.mark.parametrize(
    "name", ["fit", "own.py:fit", "own:fit:x", "../own:fit", "own fit", "own:"]
)
def test_what_names_no_function_is_refused_before_anything_is_imported(name):
    with pytest.raises(ConfigError, match=r"step must be package\.module:function"):
        steps.function_named("step", name)


def test_a_class_and_a_name_that_is_not_there_are_refused():
    for name, why in (
        ("test_run_steps:nothing", "cannot import"),
        ("torch.nn:Linear", "no function"),
    ):
        with pytest.raises(ConfigError, match=why):
            steps.function_named("eval_step", name)
    assert steps.function_named("step", OURS.format("losses")) is losses


@pytest.mark.parametrize(
    "step, judge, metrics, found",
    [
        (None, "", ["auto"], {"accuracy", "loss"}),
        (losses, "", ["auto"], {"loss"}),
        (losses, "pairs", ["auto"], {"accuracy"}),
        (losses, "pairs", ["accuracy", "perplexity"], {"accuracy", "perplexity"}),
        (losses, "figures", ["auto"], {"likes"}),
        (None, "pairs", ["auto"], {"accuracy", "loss"}),
    ],
    ids=["neither", "step", "step, pairs", "step, metrics", "figures", "pairs"],
)
def test_a_model_is_judged_by_what_is_there(step, judge, metrics, found):
    data = NAMED if step or judge else PAIRS
    recipe, model = Recipe(step=step) if step else Recipe(), nn.Linear(3, 2)
    asked = OURS.format(judge) if judge else ""
    chosen, by = steps.judging(recipe, asked, "classification", metrics, model, data)
    scores = evaluate(model, data, chosen, step=by)
    assert scores.keys() == found
    mean = losses(model, {"x": X, "y": Y}).mean().item()
    for name in found & {"loss", "likes"}:
        assert scores[name] == pytest.approx(mean, rel=1e-5)


def test_metrics_of_batches_that_are_no_pairs_need_an_eval_step():
    with pytest.raises(ConfigError, match="give --eval-step"):
        steps.judging(Recipe(step=losses), "", "classification", ["mae"], nn.Linear(3, 2), NAMED)


def test_a_run_trains_and_is_evaluated_by_the_steps_it_names(fedtorch):
    Path("own.py").write_text(OWN)
    data = ["--dataset", "custom", "--dataset.path", "own:rows", "--clients", 3]
    given = [
        "train",
        *data,
        "--model",
        "mlp",
        "--model.hidden",
        4,
        "--privacy",
        "none",
        "--rounds",
        2,
    ]
    given += ["--tracking", "none", "--run-dir", "run", "--step", "own:fit"]
    assert fedtorch(*given, "--loss", "mse")[0] == 2
    code, out, err = fedtorch(*given, "--eval-step", "own:judge", "--validation", 0.3)
    assert (
        (code, err) == (0, "") and "test accuracy" in out and "accuracy" in out.split("(mean)")[0]
    )
    code, told, _ = fedtorch("eval", "run")
    assert code == 0 and "nonprivate" not in told and "validation accuracy min" in told
    # a run of somebody else's
    Path("run/config.toml").write_text(Path("run/config.toml").read_text() + "\n")
    code, _, err = fedtorch("eval", "run")
    assert code == 2 and "step = 'own:fit'" in err and "--trust-code" in err
