import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtorch import ConfigError
from fedtorch.privacy.accounting.journal import parsed
from fedtorch.run import files, results
from fedtorch.sites.serve import known


class Versioned(nn.Linear):
    """Keeps something that is no tensor in its state_dict."""

    def __init__(self, extra: object) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra", [{"version": 3, "names": ["a", "b"]}, None, "text", torch.ones(2)]
)
def test_extra_state_is_saved_with_the_model(tmp_path, extra):
    model, fresh = nn.Sequential(Versioned(extra)), nn.Sequential(Versioned(None))
    files.savable(model)
    files.write_model(tmp_path, model)
    files.read_model(tmp_path, fresh)
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert torch.equal(fresh[0].extra, extra) if torch.is_tensor(extra) else fresh[0].extra == extra


@pytest.mark.parametrize("extra", [{1: 2}, (1, 2), {"f": len}, object(), float("nan")])
def test_what_a_model_file_cannot_hold_is_named_before_training(extra):
    with pytest.raises(
        ConfigError, match=r"_extra_state of model Versioned is .*a model file cannot"
    ):
        files.savable(Versioned(extra))


def test_a_dtype_that_a_model_file_cannot_hold_is_named_before_training():
    model = nn.Linear(2, 2)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ConfigError, match=r"phase of model Linear is torch\.complex128"):
        files.savable(model)


def test_a_command_trains_saves_and_reads_a_model_with_extra_state(fedtorch):
    Path("models").mkdir()
    Path("models/versioned.py").write_text(
        "from torch import nn\n"
        "class V(nn.Module):\n"
        "    def __init__(self, in_features: int, num_outputs: int):\n"
        "        super().__init__()\n"
        "        self.f = nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_outputs))\n"
        "        self.version = 3\n"
        "    def forward(self, x):\n        return self.f(x)\n"
        "    def get_extra_state(self):\n        return {'version': self.version}\n"
        "    def set_extra_state(self, state):\n        self.version = state['version']\n"
    )
    flags = ("--rounds", 1, "--clients", 3, "--tracking", "none")
    run = ("train", "--model", "versioned", "--privacy", "none", "--run-dir", "run", *flags)
    code, _, err = fedtorch(*run)
    assert (code, err) == (0, "")
    code, out, err = fedtorch("eval", "run", "--json")
    assert (code, err) == (0, "")
    assert (
        json.loads(out)["test_loss"]
        == json.loads(Path("run/summary.json").read_text())["test_loss"]
    )


def test_files_nested_without_end_are_damaged_and_nothing_worse(tmp_path):
    deep = "[" * 100_000
    for name in ("config.toml", "summary.json", "metrics.jsonl"):
        (tmp_path / name).write_text(deep + "\n")
    assert len(results.load(tmp_path).notes) == 3
    (tmp_path / "sites.json").write_text(deep)
    with pytest.raises(ConfigError, match="holds no run of sites"):
        known(tmp_path, resume=True)
    assert parsed(deep.encode()) is None


def test_a_folder_that_was_tried_out_can_be_tried_again(tmp_path):
    for _ in range(2):
        files.try_out(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
