import os
from pathlib import Path

import pytest
import torch

from fedtorch import ConfigError
from fedtorch.run import checkpoint

STATE = {
    "round": 3,
    "seed": 1,
    "model": {"w": torch.arange(3000, dtype=torch.float64)},
    "memory": {"a": {"c": {"w": torch.ones(2)}}},
}


def test_what_is_saved_comes_back(tmp_path):
    path = checkpoint.save(tmp_path, STATE)
    assert path.name == "round-000003.pt"
    state = checkpoint.load(tmp_path)
    assert state.keys() == STATE.keys()
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])


def test_only_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for n in (8, 9, 10, 11):
        checkpoint.save(tmp_path, STATE | {"round": n})
    assert [p.name for p in checkpoint.everything(tmp_path)] == [
        "round-000010.pt",
        "round-000011.pt",
    ]
    assert checkpoint.load(tmp_path)["round"] == 11


def test_a_crash_while_writing_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, STATE)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, STATE | {"round": 4})
    assert checkpoint.load(tmp_path)["round"] == 3


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint; leave out --resume"):
        checkpoint.load(tmp_path)


def test_damage_anywhere_is_found(tmp_path):
    path = checkpoint.save(tmp_path, STATE)
    raw = path.read_bytes()
    for at in range(0, len(raw), len(raw) // 25):
        path.write_bytes(raw[:at])
        with pytest.raises(ConfigError, match="corrupt or not a checkpoint"):
            checkpoint.load(tmp_path)
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        try:
            state = checkpoint.load(tmp_path)
        except ConfigError:
            continue
        # the byte was padding between records: nothing that was read has changed
        assert torch.equal(state["model"]["w"], STATE["model"]["w"])
        assert state["round"] == 3


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, STATE)
    path = checkpoint.save(tmp_path, STATE | {"round": 4})
    real = checkpoint.zipfile.ZipFile

    def closed(file: Path) -> object:
        if file == path:
            raise PermissionError(13, "Permission denied", str(file))
        return real(file)

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", closed)
    with pytest.raises(PermissionError, match="round-000004"):
        checkpoint.newest(tmp_path)
    monkeypatch.setattr(os, "listdir", closed)
    path = tmp_path
    with pytest.raises(PermissionError):
        checkpoint.everything(tmp_path)


PARTS = {
    "b": torch.ones(2, dtype=torch.bfloat16),
    "conj": torch.ones(1, dtype=torch.complex64).conj(),
    "none": torch.zeros(0),
    "number": torch.tensor(3),
    "many": {"l": [1, (2.5, None, "x")], "s": {"b", "a"}, "nan": float("nan")},
    "sparse": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"more": 1},
        {"b": torch.tensor([1, 2], dtype=torch.bfloat16)},
        {"none": torch.zeros(0, 1)},
        {"number": torch.tensor(3, dtype=torch.int32)},
        {"many": PARTS["many"] | {"l": [1, (2.5, None, "y")]}},
        {"model": {"w": STATE["model"]["w"].index_fill(0, torch.tensor(1500), 0.0)}},
        {"sum": None},
    ],
    ids=["value", "new", "tensor", "shape", "type", "within", "one of many", "sum"],
)
def test_what_was_edited_is_not_gone_on_from(tmp_path, change):
    path = checkpoint.save(tmp_path, STATE | PARTS)
    assert checkpoint.load(tmp_path).keys() == (STATE | PARTS).keys()
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(ConfigError, match="what is in it was edited"):
        checkpoint.load(tmp_path)
