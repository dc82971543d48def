"""Rounds that are not worth sharing out stay in one process, by rule, and give what that gives."""

import pytest
import torch
from torch import nn

from conftest import make_clients, mlp
from fedtorch import Local, Recipe, Server
from fedtorch.engines import Processes
from fedtorch.engines.workers.worth import Worth
from fedtorch.privacy import SampleLevel

PLAN = SampleLevel(noise_multiplier=1, delta=1e-5, batch_size=4, steps=2, insecure_seed=1, rounds=4)


def weights(engine, privacy=None, rounds=2):
    recipe = Recipe(epochs=1) if privacy is None else Recipe(privacy=privacy)
    server = Server(mlp(), make_clients([12, 5, 9, 30]), recipe, engine=engine, seed=2)
    try:
        for _ in range(rounds):
            server.round()
        return {k: v.clone() for k, v in server.model.state_dict().items()}, server
    finally:
        server.close()


@pytest.mark.parametrize("privacy", [None, PLAN], ids=["plain", "private"])
def test_rounds_that_are_too_small_for_workers_are_those_of_one_process(monkeypatch, privacy):
    monkeypatch.setattr("fedtorch.engines.workers.worth.SHARED", 1e6)
    here, server = weights(Processes(workers=2), privacy)
    assert server.session.workers == [] and not server.session.forks.pid
    (note,) = [n for n in server.session.notes if "stay in one process" in n]
    assert note.startswith("rounds stay") and "to 2 workers takes longer" in note
    there, local = weights(Local(), privacy)
    assert all(torch.equal(v, there[k]) for k, v in here.items())
    assert [n for n in server.session.notes if n != note] == [*local.session.notes]


def test_memory_of_rounds_in_one_process_is_let_go_of_with_the_workers(monkeypatch):
    monkeypatch.setattr("fedtorch.engines.workers.worth.SHARED", 1e6)
    server = Server(mlp(), make_clients([12, 5]), engine=Processes(workers=2, solver="general"))
    server.round()
    kept = server.session.local.reserve
    assert server.session.here and kept._kept
    server.close()
    assert not kept._kept


def test_each_round_is_judged_by_who_takes_part(monkeypatch):
    asked = []
    monkeypatch.setattr("fedtorch.engines.workers.worth.SHARED", 3.0)
    monkeypatch.setattr(Worth, "milliseconds", lambda self, n: asked.append(n) or 1.0)
    _, server = weights(Processes(workers=2), rounds=0)
    assert "rounds of fewer than 3 clients stay in one process" in server.session.notes[-1]
    for ids, here in ((server.ids[:2], True), (server.ids, False)):
        session = server.session
        session.submit(ids, server_task(server))
        assert session.here is here and len(session.board.waiting) == (0 if here else 2)


def server_task(server):
    from fedtorch.types import Task

    return Task(state=dict(server.model.state_dict()), extras={}, round=0, seed=0, lr=0.1)


@pytest.mark.parametrize(
    "engine",
    [Processes(workers=1), Processes(workers=2, chunk=1)],
    ids=["one", "chunks"],
)
def test_who_asks_for_one_worker_or_for_chunks_gets_workers(monkeypatch, engine):
    monkeypatch.setattr("fedtorch.engines.workers.worth.SHARED", 1e6)
    _, server = weights(engine, rounds=0)
    assert server.session.worth is None
    assert not any("stay in one process" in n for n in server.session.notes)


@pytest.mark.parametrize(
    ("count", "private", "least", "most"),
    [(10, False, 5, 15), (100, False, 50, 150), (10, True, 40, 120)],
    ids=["w1", "w4", "w3"],
)
def test_the_work_of_known_rounds_is_about_what_they_take(count, private, least, most):
    plan = SampleLevel(noise_multiplier=1, delta=1e-5, batch_size=10, steps=6)
    recipe = Recipe(epochs=1, batch_size=10) if not private else Recipe(privacy=plan)
    products = 784 * 200 + 200 * 200 + 200 * 10
    assert least < count * Worth(recipe, products, 199_210, alone=False).milliseconds(60) < most
    one = Worth(recipe, 0, 0, alone=True).milliseconds(60)
    assert one == pytest.approx(3.0)  # six calls


def test_the_work_of_a_model_is_read_off_its_layers():
    server = Server(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), make_clients([5]))
    worth = Worth.of(server.session)
    assert (worth.products, worth.weights) == (6 * 12 + 12 * 4, 12 * 7 + 4 * 13)

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            if len(x) == 1:
                raise ValueError("one example is not enough")
            return self.linear(x)

    server = Server(Picky(), make_clients([6]), Recipe(batch_size=None))
    assert Worth.of(server.session) is None  # so that workers are asked
