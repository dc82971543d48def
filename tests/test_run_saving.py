"""Checkpoints written beside the training are those that the training would have waited for."""

import threading
import time

import pytest
import torch

from conftest import make_clients, mlp
from fedtorch import Recipe, Server
from fedtorch.commands.train import train_module
from fedtorch.privacy import SampleLevel
from fedtorch.run import checkpoint, loop, saving
from fedtorch.run.folder import Folder
from fedtorch.run.saving import Saver

Config = train_module().Config


def writer(folder):
    def write(state):
        return checkpoint.save(folder, state)

    return write


def test_what_is_written_beside_is_the_state_of_its_moment(tmp_path):
    go, written = threading.Event(), []

    def write(state):
        assert go.wait(20)
        written.append(state["round"])
        return checkpoint.save(tmp_path, state)

    saver, weights = Saver(tmp_path, "auto", charged=False), torch.zeros(3)
    saver.save({"round": 1, "model": {"w": weights}, "notes": ["a"]}, write)
    weights.add_(1)  # the next round trains meanwhile
    threading.Timer(0.05, go.set).start()
    saver.save({"round": 2, "model": {"w": weights}}, write)  # waits for the one before
    assert written[:1] == [1]
    saver.wait()
    assert written == [1, 2] and checkpoint.load(tmp_path)["model"]["w"].tolist() == [1.0] * 3
    first = checkpoint.read(tmp_path / "round-000001.pt", checkpoint.FORMAT)
    assert first["model"]["w"].tolist() == [0.0] * 3 and first["notes"] == ["a"]


@pytest.mark.parametrize(
    ("every", "charged"), [(1, False), ("auto", True)], ids=["each", "charged"]
)
def test_who_asks_for_each_round_or_charges_a_ledger_waits(tmp_path, every, charged):
    saver = Saver(tmp_path, every, charged)
    threads = []

    def write(state):
        threads.append(threading.current_thread())
        return checkpoint.save(tmp_path, state)

    saver.size = 10 * saving.LARGE  # a charged one is never spared
    for k in (1, 2):
        assert saver.due(k)
        saver.save({"round": k}, write)
        assert checkpoint.load(tmp_path)["round"] == k
    assert threads == [threading.main_thread()] * 2


def test_a_large_state_is_written_every_so_many_seconds(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"round": 0, "w": torch.rand(1000)})
    saver = Saver(tmp_path, "auto", charged=False)
    assert saver.due(1) and not saver.sparing
    monkeypatch.setattr(saving, "LARGE", 4000)
    now = time.monotonic()
    saver = Saver(tmp_path, "auto", charged=False)  # which has seen how large the last one was
    assert saver.sparing and not saver.due(1)
    monkeypatch.setattr(time, "monotonic", lambda: now + saving.SECONDS + 5)
    assert saver.due(2)
    saver.save({"round": 2}, writer(tmp_path))
    saver.wait()
    assert saver.due(3)  # and how small this one is


def test_what_goes_wrong_beside_the_training_is_told_by_the_next(tmp_path):
    def full(state):
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, "auto", charged=False)
    saver.save({"round": 1}, full)
    with pytest.raises(OSError, match="No space"):
        saver.save({"round": 2}, writer(tmp_path))
    saver.save({"round": 3}, full, last=False)
    assert checkpoint.load(tmp_path)["round"] == 2  # which was written all the same
    with pytest.raises(OSError, match="No space"):
        saver.wait()
    saver.wait()  # once


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_loop_leaves_no_checkpoint_half_written(tmp_path, monkeypatch, capsys, large):
    if large:
        monkeypatch.setattr(saving, "LARGE", 1)
    slow = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *a, **k: time.sleep(0.05) or slow(*a, **k))
    server, config = Server(mlp(), make_clients([12, 5])), Config(rounds=4, privacy=None)
    assert config.checkpoint_every == "auto"
    kept = Folder(tmp_path, "")
    kept.begin(server.state_dict())
    with (
        pytest.raises(RuntimeError, match="a user's own"),
        loop.around(config, server, kept, None, 0.0) as here,
    ):
        server.observers += [here, here.record, loop.Checkpoints(here, "auto")]
        for _ in range(3):
            server.round()
        raise RuntimeError("a user's own")
    assert checkpoint.load(tmp_path / "checkpoints")["round"] == (0 if large else 3)
    assert not list(tmp_path.rglob("*.part"))
    with loop.around(config, server, kept, None, 0.0) as here:
        server.observers = [here, here.record, loop.Checkpoints(here, "auto")]
        server.round()
        saved = checkpoint.load(tmp_path / "checkpoints")  # the last round waits for it
    assert saved["round"] == 4 and saved["record"]["bytes"] > 0
    told = capsys.readouterr().out
    assert told.count("one every 30 seconds and in the end") == large


def test_a_private_loop_has_the_round_on_disk_before_the_next_is_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "LARGE", 1)
    plan = SampleLevel(noise_multiplier=2, delta=1e-5, batch_size=4, insecure_seed=1, rounds=4)
    server = Server(mlp(), make_clients([12, 15]), Recipe(privacy=plan))
    kept = Folder(tmp_path, "")
    with loop.around(Config(rounds=4), server, kept, None, 0.0) as here:
        server.observers += [here, here.record, loop.Checkpoints(here, "auto")]
        for k in (1, 2):
            server.round()
            assert checkpoint.load(tmp_path / "checkpoints")["round"] == k
