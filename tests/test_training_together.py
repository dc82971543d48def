"""Visits to several models in one call: what they come to is what each model's own call comes to."""

import pytest
import torch
from torch import nn

from fedtorch import Client, ClientOptimizer, FedAvg, FedProx, Local, Recipe, Server
from fedtorch.engines import Processes
from fedtorch.engines.local import LocalSession
from fedtorch.fast import whole
from fedtorch.kernels.compile import available
from fedtorch.privacy import LocalDP
from fedtorch.rounds.buffered import Asynchronous, Buffered
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.schedules import Cosine
from fedtorch.training import together

PACE = Buffered(size=4, clock=Clock(spread=0.8, jitter=0.2))
SIZES = 9, 24, 13, 5, 24, 7


def clients(share: float = 1.0) -> list[Client]:
    """Unequal ones, of whose numbers so many are not 0."""
    g = torch.Generator().manual_seed(5)
    made = []
    for k, n in enumerate(SIZES):
        x = torch.randn(n, 120, generator=g) * (torch.rand(n, 120, generator=g) < share)
        made.append(Client(f"c{k}", (x, torch.randint(0, 4, (n,), generator=g))))
    return made


def net(hidden: int = 90) -> nn.Module:
    """Two layers that do without copies, and a last one with them."""
    torch.manual_seed(2)
    wide = nn.Linear(120, hidden), nn.ReLU(), nn.Linear(hidden, hidden, bias=False), nn.ReLU()
    return nn.Sequential(*wide, nn.Linear(hidden, 4))


def trained(engine=Local(solver="fast"), rounds=6, who=None, model=None, **more):
    """A server after some steps, and their figures."""
    options = {"batch_size": 4, "epochs": 2} | more
    server = Server(
        model or net(), who or clients(), Recipe(**options), pace=PACE, engine=engine, seed=3,
        schedule=Cosine(period=20),
    )  # fmt: skip
    figures = [*server.rounds(rounds)]
    server.close()
    return server._weights.copied(), figures


def worst(a, b) -> float:
    return max(float((a[k] - v).abs().max()) for k, v in b.items())


@pytest.fixture
def calls(monkeypatch):
    """How many clients and tasks each joint call had."""
    seen: list[tuple[int, int]] = []
    real = together.local_updates

    def watched(visits, tasks, *rest):
        seen.append((len(visits), len(tasks.each)))
        return real(visits, tasks, *rest)

    monkeypatch.setattr("fedtorch.engines.local.local_updates", watched)
    return seen


@pytest.mark.parametrize("share, small", [(1.0, False), (0.15, False), (1.0, True)])
def test_one_call_comes_to_what_each_models_own_call_comes_to(share, small, calls, monkeypatch):
    if small and not available():
        pytest.skip("whole visits are loops, and there is no numba")
    monkeypatch.setattr(whole, "pays", lambda *_: small)
    joint, told = trained(who=clients(share))
    assert max(tasks for _, tasks in calls) > 2 and any(f["staleness_max"] > 1 for f in told)
    monkeypatch.setattr(LocalSession, "joins", False)
    count = len(calls)
    apart, figures = trained(who=clients(share))
    assert len(calls) == count and worst(joint, apart) < 1e-6
    for key in ("train_loss", "update_norm", "step_norm", "client_loss_max"):
        assert [f[key] for f in told] == pytest.approx([f[key] for f in figures], rel=1e-5)
    for key in ("cohort", "examples", "bytes_up", "bytes_down", "clients"):
        assert [f[key] for f in told] == [f[key] for f in figures]


def test_solvers_agree_and_workers_to_the_bit(calls):
    one, _ = trained(Local(solver="fast", chunk=2))
    assert calls and worst(one, trained(Local(solver="general"))[0]) < 1e-5
    other, _ = trained(Processes(workers=1, solver="fast", chunk=2))
    assert all(torch.equal(v, one[k]) for k, v in other.items())


def test_a_visit_that_is_not_finite_is_left_out_and_named(calls):
    who, recipe = clients(), Recipe(batch_size=4)
    server = Server(net(), who, recipe, pace=PACE, engine=Local(solver="fast"), seed=3)
    who[3].data.tensors[0][:] = torch.nan
    figures = [*server.rounds(4)]
    assert {i for f in figures for i in f["failed"]} == {"c3"} and calls
    assert all(bool(v.isfinite().all()) for v in server.model.state_dict().values())


@pytest.mark.parametrize(
    "more",
    [
        {"strategy": FedProx(mu=0.1)},
        {"optimizer": ClientOptimizer(name="SGD", args={"momentum": 0.9})},
        {"privacy": LocalDP(epsilon=50.0, rounds=9, insecure_seed=5)},
        {"model": nn.Sequential(nn.Linear(120, 4), nn.Dropout(0.1))},
    ],
    ids=["prox", "momentum", "plan", "dropout"],
)
def test_what_is_more_than_plain_steps_and_a_mean_trains_apart(more, calls):
    trained(rounds=2, **more)
    assert not calls


def test_clients_whose_model_is_mixed_in_train_apart(calls):
    recipe = Recipe(FedAvg(), batch_size=4)
    server = Server(net(), clients(), recipe, pace=Asynchronous(), engine=Local(solver="fast"))
    assert len([*server.rounds(3)]) == 3 and not calls
