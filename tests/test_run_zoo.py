from pathlib import Path

import pytest
import torch
from torch import nn

from fedtorch import ConfigError
from fedtorch.run import zoo

IMAGES = {"input_shape": (1, 28, 28), "in_features": 784, "in_channels": 1, "num_outputs": 10}
TEXT = {"vocab_size": 65, "input_shape": (80,), "num_outputs": 65}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_papers_models_have_the_papers_sizes():
    # McMahan et al. 2017, section 3
    assert size(zoo.build("mlp", IMAGES, {})) == 199_210
    assert size(zoo.build("cnn", IMAGES, {})) == 1_663_370
    assert size(zoo.build("logistic", IMAGES, {})) == 7850


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn", "resnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_image_models_take_images_and_learn(name, shape):
    facts = {
        "input_shape": shape,
        "in_features": shape[0] * shape[1] * shape[2],
        "in_channels": shape[0],
        "num_outputs": 7,
    }
    model = zoo.build(name, facts, {})
    output = model(torch.randn(2, *shape))
    assert output.shape == (2, 7)
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_text_models_predict_at_every_position_from_the_past_alone(name):
    model = zoo.build(name, TEXT, {}).eval()
    x = torch.randint(0, 65, (2, 80))
    later = x.clone()
    later[:, 50:] = (later[:, 50:] + 1) % 65
    with torch.no_grad():
        a, b = model(x), model(later)
    assert a.shape == (2, 65, 80)  # classes on axis 1, where torch's losses look for them
    assert torch.allclose(a[..., :50], b[..., :50], atol=1e-5)
    assert not torch.allclose(a[..., 50:], b[..., 50:])


def test_a_file_of_the_working_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"cnn", "logistic", "lstm", "mlp", "resnet", "transformer"} <= set(zoo.names())
    Path("models").mkdir()
    Path("models/mine.py").write_text("from torch import nn\ndef build(): return nn.Linear(2, 3)\n")
    Path("models/mlp.py").write_text("from torch import nn\ndef build(): return nn.Identity()\n")
    assert "mine" in zoo.names()
    assert isinstance(zoo.build("mine", IMAGES, {}), nn.Linear)
    assert isinstance(zoo.build("mlp", IMAGES, {}), nn.Identity)


def test_paths_and_modules(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\n"
        "class Part(nn.Linear): pass\n"
        "class Net(Part):\n"
        "    def __init__(self, in_features, out=4): super().__init__(in_features, out)\n"
    )
    assert zoo.build(str(path), IMAGES, {}).weight.shape == (4, 784)
    assert zoo.build(f"{path}:Net", IMAGES, {"out": 2}).weight.shape == (2, 784)
    linear = zoo.build("torch.nn:Linear", IMAGES, {"out_features": 3})
    assert linear.weight.shape == (3, 784)


@pytest.mark.parametrize(
    "spec, args, message",
    [
        ("cnnn", {}, r"unknown model 'cnnn'; there are bag, cnn, .*or give path/file\.py:Name"),
        ("torch.nn:Nothing", {}, "torch.nn has no 'Nothing'"),
        ("no.module:Net", {}, "No module named 'no'"),
        ("mlp", {"hiden": 3}, "no argument 'hiden'; it takes in_features"),
        ("mlp", {"activation": "swish"}, "activation must be one of relu"),
        ("transformer", {}, "needs vocab_size"),
        ("collections:Counter", {}, "is a class, but no subclass of nn.Module"),
        (":", {}, "Empty module name"),
        ("..:x", {}, "cannot import '..:x': "),
        ("os:getcwd", {}, "gave a str, not an nn.Module"),
        ("builtins:dict", {}, "is a class, but no subclass of nn.Module"),
        ("torch:__version__", {}, "cannot be called"),
        ("empty.py", {}, r"neither build\(\) nor an nn.Module"),
        ("broken.py", {}, "fails to import: ZeroDivisionError"),
        ("nowhere.py", {}, "there is no model file"),
    ],
)
def test_what_is_no_model_is_one_sentence(tmp_path, monkeypatch, spec, args, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("x = 1\n")
    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        zoo.build(spec, IMAGES, args)


def test_the_zoo_is_plain_pytorch():
    for path in Path(zoo.PACKAGE.parent / "models").glob("*.py"):
        assert "import fedtorch" not in path.read_text()
        assert "from fedtorch" not in path.read_text()


def test_a_file_of_several_models_is_asked_about_and_parts_of_one_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = "import torch.nn as nn\n\n"
    one = "class One(nn.Linear):\n    def __init__(self): super().__init__(6, 4)\n"
    loss = "class Loss(nn.Module):\n    pass\n"
    part = "class Net(nn.Sequential):\n    def __init__(self): super().__init__(One())\n"
    path = tmp_path / "own.py"
    path.write_text(head + one + loss)
    with pytest.raises(
        ConfigError, match=r"has several models, One, Loss: name one, --model .*own"
    ):
        zoo.build(str(path), {}, {})
    assert type(zoo.build(f"{path}:One", {}, {})).__name__ == "One"
    for text in (one + part, part + one):
        path.write_text(head + text)
        assert type(zoo.build(str(path), {}, {})).__name__ == "Net"


@pytest.mark.parametrize(
    "line", ["import beside", "from .beside import x", "from beside.deep import x"]
)
def test_a_file_that_imports_its_neighbour_is_told_how(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/beside.py").write_text("x = 1\n")
    (tmp_path / "nets/mine.py").write_text(line + "\n")
    with pytest.raises(ConfigError, match="you start in: write from nets import "):
        zoo.build("nets/mine.py", {}, {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="set PYTHONPATH to its folder"):
        zoo.build("../nets/mine.py", {}, {})
