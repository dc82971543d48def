import json
import signal
from types import SimpleNamespace

import pytest

from conftest import make_clients, mlp
from fedtorch import FedAvg, Recipe, Server
from fedtorch.commands.train import train_module
from fedtorch.run import loop
from fedtorch.run.folder import Folder
from fedtorch.strategies import IFCA, Ditto
from fedtorch.training.losses import accuracy

Config = train_module().Config


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_ends_after_its_rounds_or_after_the_round_in_which_it_is_asked_to(tmp_path, stopped):
    server = Server(mlp(), make_clients([12, 5]))
    config = Config(rounds=5, privacy=None)
    test = make_clients([9])[0].data
    with loop.around(config, server, Folder(tmp_path, ""), None, 0.0) as here:
        scores = loop.ScoreKeeper(here, test, {"accuracy": accuracy}, every=2)
        server.observers += [here, scores, here.record, loop.Checkpoints(here, every=2)]
        while not here.last:
            if stopped and server.round_number == 2:
                here.stop.on_signal(signal.SIGTERM, None)
            server.round()
    rounds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = 3 if stopped else 5
    assert [m["round"] for m in rounds] == [*range(1, last + 1)]
    # every second round, and the last one whatever its number
    assert [m["round"] for m in rounds if "test_accuracy" in m] == (
        [2, 3] if stopped else [2, 4, 5]
    )
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == [f"round-{n:06d}.pt" for n in ((2, 3) if stopped else (4, 5))]
    assert here.summary(scores.last)["test_accuracy"] == rounds[-1]["test_accuracy"]


@pytest.mark.parametrize(
    "strategy, asked",
    [
        (FedAvg(), "--validation 0.2"),
        (Ditto(), "--evaluate personal"),
        (IFCA(), "--evaluate personal"),
    ],
    ids=["fedavg", "ditto", "ifca"],
)
def test_the_end_says_what_would_judge_clients_by_the_models_that_they_have(strategy, asked):
    server = Server(mlp(), make_clients([12, 5]), Recipe(strategy))
    scores = loop.ScoreKeeper(SimpleNamespace(server=server), None, {})
    assert scores.ends().startswith(f"clients: {asked} would ")


def test_a_run_that_went_on_for_fewer_rounds_than_it_has_does_not_call_them_all(tmp_path):
    server = Server(mlp(), make_clients([12, 5]))
    server.round_number = 3
    for asked, why in ((3, "all 3 rounds are trained"), (2, "come to round 3 before, and 2 were")):
        config = Config(rounds=asked, privacy=None)
        with loop.around(config, server, Folder(tmp_path, ""), None, 0.0) as here:
            assert here.over() and why in here.why()
