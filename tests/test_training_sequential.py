"""Clients trained in turn and summed are the clients trained alone and averaged."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from conftest import make_clients, mlp, watched
from fedtorch import (
    Client,
    ClientOptimizer,
    FedAvg,
    FedProx,
    Local,
    Recipe,
    Scaffold,
    Server,
    local_update,
)
from fedtorch.aggregation.mean import RunningMean
from fedtorch.engines import solver_choice
from fedtorch.engines.local import falling
from fedtorch.fast import offer
from fedtorch.privacy import AdaptiveClip, ClientLevel, LocalDP, SampleLevel
from fedtorch.training import results, stacked
from fedtorch.training.module import snapshot
from fedtorch.training.reserve import Reserve
from fedtorch.training.stacked import general
from fedtorch.tree import to_float64
from fedtorch.types import ClientError, Released, Task

SIZES = [37, 5, 18, 64, 1]


def task(model: nn.Module) -> Task:
    return Task(snapshot(model), {}, 2, 7, 0.1, {"clip": 0.05, "noise": 1.0})


def both(
    recipe: Recipe, clients: list[Client], model: nn.Module
) -> tuple[Released, RunningMean, list[str]]:
    """All in one call, and one call for each; who failed in either is the same."""
    start = task(model)
    update, failures = local_update(clients, start, recipe, model, general)
    mean, figures, failed = RunningMean(), [], []
    for client in clients:
        own, lost = local_update([client], start, recipe, model, general)
        failed += [f.id for f in lost]
        if own.ids:
            mean.add(own)
            figures.append((own.ids[0], own.metrics))
    assert [f.id for f in failures] == failed
    assert update.ids == tuple(i for i, _ in figures)
    for name, values in update.metrics.items():
        alone = torch.cat([m[name] for _, m in figures]).double()
        assert torch.allclose(values.double(), alone, rtol=1e-6), name
    return update, mean, failed


def agree(update: Released, mean: RunningMean) -> None:
    sent, buffers = mean.result()
    assert update.summed and update.sent.keys() == sent.keys()
    for k, v in sent["delta"].items():
        assert update.sent["delta"][k].dtype == torch.float64
        assert torch.allclose(update.sent["delta"][k][0], v, rtol=1e-9, atol=1e-15), k
    assert update.buffers.keys() == buffers.keys()
    for k, v in buffers.items():
        assert torch.allclose(update.buffers[k][0], v, rtol=1e-12), k


def dropout() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4))


def batchnorm() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))


@pytest.mark.parametrize("make", [mlp, dropout, batchnorm])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(batch_size=8, epochs=2),
        Recipe(FedProx(mu=0.5), batch_size=8, epochs=2),
        Recipe(batch_size=8, optimizer=ClientOptimizer("SGD", {"momentum": 0.9})),
        Recipe(batch_size=8, optimizer=ClientOptimizer("Adam"), lr=0.01),
    ],
    ids=["sgd", "prox", "momentum", "adam"],
)
def test_a_sum_is_the_mean_of_clients_trained_alone(make, recipe):
    clients = make_clients(SIZES[:4])
    update, mean, failed = both(recipe, clients, make())
    agree(update, mean)
    assert not failed


@pytest.mark.parametrize("plan", [ClientLevel(rounds=1), ClientLevel(rounds=1, weight_cap=20)])
def test_clients_are_clipped_as_they_are_alone(plan):
    update, mean, _ = both(Recipe(batch_size=8, privacy=plan), make_clients(SIZES), mlp())
    agree(update, mean)
    assert float(update.metrics["update_norm"].max()) <= 0.05 * (1 + 1e-15)
    assert float(update.metrics["update_norm"].max()) == pytest.approx(0.05)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_each_client_has_its_own_noise(mode):
    plan = SampleLevel(mode=mode, rounds=1, noise_multiplier=1.0, insecure_seed=3)
    update, mean, _ = both(Recipe(privacy=plan), make_clients(SIZES), mlp())
    agree(update, mean)


def poisoned(sizes: list[int]) -> list[Client]:
    clients = make_clients(sizes)
    x, y = clients[1].data.tensors
    return [clients[0], Client("bad", (x * math.nan, y)), *clients[2:]]


@pytest.mark.parametrize("make", [mlp, batchnorm])
def test_a_client_that_is_not_finite_touches_nobody_else(make):
    update, mean, failed = both(Recipe(batch_size=8), poisoned([16, 8, 7]), make())
    agree(update, mean)
    assert failed == ["bad"]


def test_statistics_that_are_not_finite_are_a_failure_too():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.register_buffer("largest", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.largest = x[:, 0].max() / 0 if len(x) == 5 else x[:, 0].max()
            return self.linear(x)

    torch.manual_seed(0)
    update, mean, failed = both(Recipe(), make_clients([9, 5, 7]), Counts())
    agree(update, mean)
    assert failed == ["c1"]


def test_a_broken_client_is_a_zero_under_client_level_privacy():
    recipe = Recipe(batch_size=8, privacy=ClientLevel(rounds=1))
    update, mean, failed = both(recipe, poisoned([9, 8, 7]), mlp())
    agree(update, mean)
    assert len(update.ids) == 3 and not failed


def test_when_nobody_is_finite_nothing_is_sent():
    model, bad = mlp(), [poisoned([3, 4])[1]] * 2
    update, failures = local_update(bad, task(model), Recipe(), model, general)
    assert (update.ids, update.sent, len(failures)) == ((), {"delta": {}}, 2)
    recipe = Recipe(privacy=ClientLevel(rounds=1))
    update, _ = local_update(bad, task(mlp()), recipe, model, general)
    assert all(not v.any() for v in update.sent["delta"].values()) and len(update.ids) == 2


class Broken(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        raise OSError(f"scan {i} is missing")


def test_the_client_whose_code_fails_is_named():
    clients = [*make_clients([5, 6]), Client("hospital", Broken())]
    with pytest.raises(ClientError, match=r"client hospital, round 2: OSError: scan \d is missing"):
        local_update(clients, task(mlp()), Recipe(), mlp(), general)


def test_updates_needed_one_by_one_are_not_summed():
    for recipe in (
        Recipe(Scaffold()),
        Recipe(privacy=LocalDP(rounds=1)),
        Recipe(privacy=ClientLevel(rounds=1, adaptive=AdaptiveClip())),
    ):
        with pytest.raises(ValueError, match="train one at a time"):
            local_update(make_clients([5, 6]), task(mlp()), recipe, mlp(), general)


@pytest.mark.parametrize(
    "recipe, chunk, group",
    [
        (Recipe(), None, solver_choice.GROUP),
        (Recipe(), 1, 1),
        (Recipe(), 2, 2),
        (Recipe(Scaffold()), None, 1),
        (Recipe(privacy=LocalDP(rounds=1)), None, 1),
    ],
)
def test_an_engine_groups_clients_where_it_may(recipe, chunk, group):
    engine = Local(chunk=chunk, solver="general")
    session = engine.open(mlp(), make_clients(SIZES), recipe)
    assert (session.choice.chunk, session.choice.group) == (1, group)
    ids = [f"c{k}" for k in range(len(SIZES))]
    assert [len(c) for c in session.cut(ids)] == [len(c) for c in in_groups(ids, group)]
    # shared out among two workers, none waits long for the other
    assert [len(c) for c in session.cut(ids, workers=2)][-2:] == [1, 1]


def test_shares_fall_so_that_workers_end_together():
    def sizes(examples: list[int], workers: int = 2, most: int = 64) -> list[list[int]]:
        made = [Client(str(k), torch.zeros(n, 1)) for k, n in enumerate(examples)]
        return [[*map(len, share)] for share in falling(made, workers, most)]

    assert [*map(len, sizes([60] * 10))] == [3, 2, 2, 1, 1, 1]
    assert [*map(len, sizes([60] * 10, most=2))] == [2, 2, 2, 1, 1, 1, 1]
    # by examples: who has many goes alone
    assert sizes([100, 90, 80, 10, 10, 10, 10]) == [[100], [90], [80], [10], [10], [10], [10]]
    assert sizes([7] * 3, workers=8) == [[7]] * 3 and sizes([]) == []


def in_groups(ids: list[str], size: int) -> list[list[str]]:
    return [ids[k : k + size] for k in range(0, len(ids), size)]


def test_groups_train_the_same_model():
    states = []
    for chunk in (1, 2, None):
        model = batchnorm()
        recipe = Recipe(batch_size=8, drop_last=True)
        engine = Local(chunk=chunk, solver="general")
        server = Server(model, make_clients([8, 20, 13, 9]), recipe, engine=engine)
        for _ in server.rounds(3):
            pass
        states.append(snapshot(model))
    for other in states[1:]:
        for k, v in states[0].items():
            assert torch.allclose(v.double(), other[k].double(), atol=1e-6), k


@pytest.mark.parametrize("block", [8, 1 << 16])
def test_one_change_is_exact_and_its_bound_holds(monkeypatch, block):
    monkeypatch.setattr(results, "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    start = {
        "a": torch.randn(30, 7, generator=g).T,  # not side by side
        "b": torch.randn((), generator=g),
        "c": torch.randn(5, generator=g) * 1e-20,
        "d": torch.randn(3, generator=g),
    }
    after = {k: v * 1.01 + 1e-4 for k, v in start.items()}
    total = results.RunningSum(start, Reserve())
    square = torch.tensor([total.see(after)], dtype=torch.float64)
    total.add(1.0)
    moved = {k: (start[k].double() + v).float() for k, v in total.params(1.0).items()}
    assert all(torch.equal(moved[k], after[k]) for k in start)
    exact = sum(
        (int(x * 2**60) - int(y * 2**60)) ** 2
        for k in start
        for x, y in zip(after[k].flatten().tolist(), start[k].flatten().tolist(), strict=True)
    )
    bound = float(total.bound(square))
    assert exact * 2.0**-120 <= bound <= exact * 2.0**-120 * (1 + 1e-9)
    # another is added to it, and one that is only seen is not
    total.see({k: v + 1 for k, v in start.items()})
    total.add(0.5)
    total.see({k: v * math.nan for k, v in start.items()})
    for k, v in total.params(2.0).items():
        own = start[k].double()
        both = after[k].double() - own + 0.5 * ((start[k] + 1).double() - own)
        assert torch.equal(v, 2 * both), k
    # in one pass it is the same, where no square can overflow
    once = results.RunningSum(start, Reserve())
    assert results.bounded(after) and once.take(after, 1.0) == float(square)
    once.take({k: v + 1 for k, v in start.items()}, 0.5)
    assert all(torch.equal(v, total.params(1.0)[k]) for k, v in once.params(1.0).items())
    assert not results.bounded(after | {"c": after["c"] / 0})
    assert not results.bounded(to_float64(after))


class Constants(nn.Module):
    """A causal mask, numbers nobody has filled in, one that no mean of itself gives back, and a count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear = nn.Linear(6, 4)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("unknown", torch.full((2,), math.nan))
        self.register_buffer("third", torch.tensor(1 / 3, dtype=torch.float64))
        self.register_buffer("least", torch.full((7,), math.inf))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.least[:6].copy_(x.detach().amin(0))
        return self.linear(x) + self.mask.softmax(1).sum(0) + self.third.float()


@pytest.mark.parametrize(
    "recipe", [Recipe(batch_size=8), Recipe(Scaffold(), batch_size=8)], ids=["fedavg", "scaffold"]
)
def test_constant_buffers_are_not_sent_and_leave_no_client_out(recipe):
    ends = []
    for engine in (Local(solver="general"), Local(chunk=1), Local(solver="stacked")):
        model = Constants()
        before = snapshot(model)
        server = Server(model, make_clients([16, 8, 8, 24]), recipe, engine=engine)
        sent = watched(server)
        figures = [*server.rounds(2)]
        assert [f["clients"] for f in figures] == [4, 4] and server.moved()
        assert all(set(u.buffers) == {"least"} for u in sent)
        after = snapshot(model)
        for name in ("mask", "unknown", "third"):
            assert torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0)), name
        assert bool(after["least"][:6].isfinite().all()) and after["least"][6] == math.inf
        ends.append(after)
    for other in ends[1:]:
        for k in ("linear.weight", "least"):
            assert torch.allclose(ends[0][k], other[k], atol=1e-6), k


def test_an_infinite_constant_is_allowed_under_client_level_privacy():
    class Masked(Constants):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.mask.softmax(1).sum(0)

    plan = ClientLevel(noise_multiplier=0.01, rounds=2)
    server = Server(Masked(), make_clients([9, 8, 7]), Recipe(privacy=plan))
    server.round()
    assert server.moved()


@pytest.mark.parametrize("solver", ["general", "stacked", "fast"])
def test_no_strategy_is_shown_the_secret_that_masks_are_drawn_from(solver, monkeypatch):
    shown, secret = [], []

    class Looks(FedAvg):
        def correct(self, grads, params, ctx):
            shown.append(ctx.seeds)
            return super().correct(grads, params, ctx)

        def upload(self, params, ctx):
            shown.append(ctx.seeds)
            return FedAvg.upload(self, params, ctx)

    def watched(self, task, id, found=SampleLevel.draw_seed):
        secret.append(found(self, task, id))
        return secret[-1]

    monkeypatch.setattr(SampleLevel, "draw_seed", watched)
    kind = Looks if solver != "fast" else type("Sends", (FedAvg,), {"upload": Looks.upload})
    plan = SampleLevel(rounds=1, noise_multiplier=1.0)
    recipe, net = Recipe(kind(), lr=0.1, privacy=plan), dropout()
    who = make_clients(SIZES[:2])
    task = Task(snapshot(net), {}, 0, 3, 0.1, {"clip": 1.0, "noise": 1.0})
    way = {"general": stacked.general, "stacked": stacked.stacked}.get(solver)
    if solver == "fast":
        way = offer(net, [c.data for c in who], recipe, plan)
        assert not isinstance(way, str), way
    for some in [who] if solver != "general" else [[c] for c in who]:
        local_update(some, task, recipe, net, way)
    assert secret and shown
    assert all(shown)
    fresh = {s for seeds in shown for s in seeds}
    assert not fresh & {*secret}
    assert len(fresh) == 2  # of each client the same, for whoever knows the run's seed
