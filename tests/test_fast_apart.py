"""A matrix of each client's own beside the shared one: what general steps come to, without copies."""

import pytest
import torch
from torch import nn

from fedtorch import Client, ClientOptimizer, Local, Recipe, Scaffold, Server
from fedtorch.fast import solver as solve
from fedtorch.fast.dual import First
from fedtorch.privacy import ClientLevel
from fedtorch.strategies import Ditto, FedDyn
from fedtorch.training import stacked

KINDS = {
    "feddyn": (FedDyn(alpha=0.5), {}),
    "feddyn, decay": (FedDyn(alpha=0.5), {"weight_decay": 0.1}),
    "scaffold": (Scaffold(), {}),
    "ditto": (Ditto(lam=0.7), {}),
    "ditto, alone": (Ditto(lam=0.0), {}),
    "ditto, decay": (Ditto(lam=0.7), {"weight_decay": 0.1}),
    "ditto, momentum": (Ditto(lam=0.7), {"momentum": 0.9}),
}
SIZES = (23, 18, 5, 1)


def run(strategy, options, solver, chunk=None, privacy=None, biased=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 9, biased), nn.ReLU(), nn.Linear(9, 4))
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(n, 30, generator=g), torch.randint(4, (n,), generator=g)) for n in SIZES]
    clients = [Client(str(k), d) for k, d in enumerate(data)]
    optimizer = ClientOptimizer("SGD", options)
    recipe = Recipe(strategy, optimizer=optimizer, lr=0.1, epochs=2, batch_size=8, privacy=privacy)
    server = Server(model, clients, recipe, engine=Local(solver=solver, chunk=chunk))
    figures = list(server.rounds(3))
    kept = {
        f"{c.id} {g} {n}": v for c in clients for g, m in c.memory.items() for n, v in m.items()
    }
    return model.state_dict() | kept, figures


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("form", ["dual", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_memory_are_those_of_the_general_path(kind, form, monkeypatch):
    monkeypatch.setattr(solve, "pays", lambda *_: form == "dual")
    slow, before = run(*KINDS[kind], "general")
    for chunk in (2, 4):
        fast, after = run(*KINDS[kind], "fast", chunk)
        close(fast, slow)
        for a, b in zip(after, before, strict=True):
            assert a["update_norm"] == pytest.approx(b["update_norm"], rel=1e-4)
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["feddyn", "ditto"])
def test_without_a_bias(kind, monkeypatch):
    monkeypatch.setattr(solve, "pays", lambda *_: True)
    close(*(run(*KINDS[kind], solver, biased=False)[0] for solver in ("fast", "general")))


def test_both_passes_of_ditto_are_fast(monkeypatch):
    def never(*_):
        raise AssertionError("stacked")

    made, whole = [], First.__init__
    monkeypatch.setattr(stacked, "stacked", never)
    monkeypatch.setattr(stacked, "general", never)
    monkeypatch.setattr(solve, "pays", lambda *_: True)
    monkeypatch.setattr("fedtorch.fast.whole.pays", lambda *_: False)
    monkeypatch.setattr(First, "__init__", lambda s, *a: (made.append(s), whole(s, *a))[1])
    run(*KINDS["ditto"], "fast")
    assert [bool(m.own) for m in made[-2:]] == [False, True] and made[-1].own.now < 1


def test_clipped_changes_are_those_that_were_made(monkeypatch):
    monkeypatch.setattr(solve, "pays", lambda *_: True)
    plan = ClientLevel(noise_multiplier=1e-6, clip=0.05, rounds=3, insecure_seed=3)
    found = [run(*KINDS["feddyn"], solver, privacy=plan)[0] for solver in ("fast", "general")]
    close(*found)
