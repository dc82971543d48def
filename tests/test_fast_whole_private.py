"""Whole visits of DP-SGD, a client after the other: held to autograd, and to every other way there is."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import private_case
from fedtorch import Client, ClientOptimizer, FedAvg, FedProx, Local, Recipe, Server
from fedtorch.fast import offer, whole
from fedtorch.kernels.compile import available, loops
from fedtorch.privacy import SampleLevel, conformance
from fedtorch.privacy.gradients import PrivateSteps, rounded
from fedtorch.privacy.noise.streams import Stream
from loop_case import close, drawn
from private_case import _one, flat
from test_conformance import holds, released
from test_fast_whole import by_autograd, mlp, own

pytestmark = pytest.mark.skipif(not available(), reason="without numba there are no loops")

WIDTHS = [3, 2], [17, 5], [16, 33, 4], [5, 1, 2], [81, 70, 64, 7], [200, 90, 10]
MOST = 7


class Parts:
    """What ``Clips.sums`` does, in two parts."""

    def __init__(self, clips) -> None:
        self.clips, self.inputs = clips, clips.inputs

    def norms(self, row: Tensor, k: int, s: int, n: int) -> Tensor:
        known, (a, d, squares, _) = self.clips, self.clips.room
        (x, index, lengths), own = known.inputs, (row.numpy(), known.layers)
        rows = index[k, s : s + n]
        kernels().forward(*own, x, rows, a, kernels().logits(known.layers, d, n, 0))
        given = known.y, known.losses, (k, s, n), (a, d), squares, False
        kernels().norms(*own, lengths[k, s : s + n], *given)
        return torch.from_numpy(squares[:n])

    def sums(self, factors: Tensor, into: Tensor) -> None:
        known = self.clips
        kernels().summed(known.layers, factors.numpy(), known.room[:2], into.numpy())


def kernels():
    return loops("fedtorch.kernels.clips")


def made(widths: list[int], biased: bool = True):
    """Parameters, layers, nine examples, and steps of at most seven of them for two clients."""
    row, table = own(widths, biased)
    x, draw = drawn(9, widths[0]), torch.Generator().manual_seed(len(row))
    index = torch.randint(9, (2, 2 * MOST), generator=draw)
    y = torch.randint(widths[-1], (2, 2 * MOST, 1), generator=draw)
    losses, squares = torch.zeros(2, 2 * MOST, 1), x.double().square().sum(1)
    lengths = squares[index] + biased
    layers = torch.tensor(table).numpy()
    clips = loops("fedtorch.kernels.loops").Loops.clips(
        layers, (x, index, lengths), (y, losses), MOST
    )
    return row, table, (x, index), y, losses, Parts(clips)


def each(row: Tensor, table: list, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of single examples by autograd, [n, numbers], and their losses."""
    one = torch.ones(1)
    found = [by_autograd(row, table, a[None], b, one, 1.0) for a, b in zip(x, y, strict=True)]
    return torch.stack([row - after for after, _ in found]), torch.cat([loss for _, loss in found])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 7])
def test_norms_and_sums_are_those_of_single_gradients(n, biased):
    for widths in WIDTHS:
        row, table, (x, index), y, losses, clips = made(widths, biased)
        at, before = slice(MOST, MOST + n), row.clone()
        squares = clips.norms(row, 1, MOST, n).clone()
        factors = torch.linspace(0.2, 1, n)
        total = torch.full_like(row, torch.nan)  # all of it is written
        clips.sums(factors, total)
        if n:
            grads, wanted = each(row, table, x[index[1, at]], y[1, at])
            torch.testing.assert_close(squares, grads.double().square().sum(1), rtol=1e-4, atol=0)
            close(total, factors @ grads)
            close(losses[1, at, 0], -wanted)
        assert torch.equal(row, before) and bool(total.any()) == bool(n)
        losses[1, at] = 0
        assert not losses.any()  # and nothing else of them


@pytest.mark.parametrize("what", [torch.nan, torch.inf, 3e38])
def test_an_example_of_factor_zero_leaves_nothing(what):
    row, _, (x, index), _, _, clips = made([81, 70, 7])
    index[0, :3], x[4] = torch.tensor([1, 4, 2]), what
    clips.inputs[2][0, 1] = float(x[4].double().square().sum())
    private = PrivateSteps(0.3, 1.0, 1.0, ())
    found = []
    for _ in range(2):
        squares = clips.norms(row, 0, 0, 3)
        factors = private.factors(squares).float()
        assert [float(f) > 0 for f in factors] == [True, False, True]
        total = torch.empty_like(row)
        clips.sums(factors, total)
        found.append(total)
        x[4] = 1.0  # whatever it is
        clips.inputs[2][0, 1] = torch.inf
    assert torch.equal(*found) and found[0].isfinite().all() and found[0].any()


def test_what_loses_its_digits_is_left_out():
    row, _, (_, index), _, _, clips = made([16, 33, 4])
    index[0, :2] = torch.tensor([1, 2])
    clips.norms(row, 0, 0, 2)
    total = torch.empty_like(row)
    clips.sums(torch.tensor([1.2e-38, 1.2e-38]), total)
    assert not total.any()


def test_one_call_is_both_parts_with_the_factors_of_every_other_way():
    row, _, (x, index), _, _, parts = made([16, 33, 4])
    x[index[1, 2]] = torch.nan
    parts.inputs[2][1][index[1] == index[1, 2]] = torch.nan
    total, wanted, private = (*torch.empty(2, len(row)), PrivateSteps(0.3, 1.0, 1.0, ()))
    parts.clips.sums(row, 1, 0, 5, 0.3, total)
    parts.sums(rounded(private.factors(parts.norms(row, 1, 0, 5)), row), wanted)
    assert torch.equal(total, wanted) and total.isfinite().all() and total.any()


def test_factors_are_those_of_every_other_way():
    squares = [
        0.0,
        5e-324,
        1e-90,
        0.2,
        0.25,
        0.26,
        3.0,
        1e20,
        1e70,
        1e78,
        1e160,
        torch.inf,
        torch.nan,
    ]
    for clip in (1e-6, 0.5, 1e9):
        given, found = torch.tensor(squares, dtype=torch.float64), torch.empty(len(squares))
        kernels().scales(given.numpy(), clip, found.numpy())
        assert torch.equal(found, rounded(PrivateSteps(clip, 1.0, 1.0, ()).factors(given), found))


PLAN = dict(
    noise_multiplier=0.5, rounds=2, sample_rate=0.3, steps=4, batch_size=6.0, clip=0.7, insecure_seed=5
)  # fmt: skip
SIZES = 20, 7, 1, 33


def clients(inputs: int = 20) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    tables = [
        (torch.randn(n, inputs, generator=g), torch.randint(3, (n,), generator=g)) for n in SIZES
    ]
    return [Client(f"c{k}", table) for k, table in enumerate(tables)]


class Backwards(nn.Module):
    """Noise comes in the model's order, which is not that of its calls."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.last, self.first = nn.Linear(9, 3), nn.Linear(20, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The clients of each chunk that is visited so."""
    found: list[int] = []
    before = whole.Whole.visit_privately

    def visit(self, *given) -> None:
        found.append(len(self.change))
        before(self, *given)

    monkeypatch.setattr(whole.Whole, "visit_privately", visit)
    return found


def ends(model: nn.Module, options: dict, solver: str, **plan):
    recipe = Recipe(lr=0.2, privacy=SampleLevel(**PLAN | plan), **options)
    server = Server(model, clients(), recipe, engine=Local(solver=solver, chunk=3), seed=3)
    figures = [*server.rounds(2)]
    return model.state_dict(), figures


def unbiased() -> nn.Module:
    net = mlp()
    net[1].bias = None
    return net


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("build", [mlp, Backwards, unbiased])
def test_the_same_weights_as_every_other_way(taken, monkeypatch, build, projected):
    found, figures = ends(build(), {}, "fast", projected=projected)
    assert 2 in taken
    monkeypatch.setattr(whole, "pays_privately", lambda *given: False)
    taken.clear()
    wanted, said = ends(build(), {}, "fast", projected=projected)
    assert not taken
    for k, v in wanted.items():
        assert torch.allclose(found[k], v, atol=2e-6)
    if not projected:  # whose noise is drawn in fewer numbers
        general, _ = ends(build(), {}, "general", mode="stacked")
        assert all(torch.allclose(general[k], v, atol=2e-6) for k, v in wanted.items())
    for a, b in zip(figures, said, strict=True):
        for name in ("nonprivate_train_loss", "update_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_who_looks_at_whole_sums_sees_them(taken):
    found, _ = ends(mlp(), {}, "fast")
    seen, before = [], Stream.add

    def add(self, row, std, scratch, onto=None) -> bool:
        assert row.isfinite().all()
        seen.append(len(row))
        before(self, row, std, scratch)
        return False

    with patch.object(Stream, "add", add):
        other, _ = ends(mlp(), {}, "fast")
    numbers = sum(v.numel() for v in found.values())
    assert {*seen} >= {numbers} and all(
        torch.allclose(found[k], other[k], atol=1e-6) for k in found
    )


@pytest.mark.parametrize("projected", [False, True])
def test_one_example_more_moves_a_step_by_the_clip_at_most(taken, projected):
    once = {"noise_multiplier": 1e-9, "sample_rate": 1.0, "steps": 1, "rounds": 1}
    plan = SampleLevel(**PLAN | once, projected=projected)
    (x, y), model = clients()[0].data.tensors, mlp()
    x[3], x[5] = x[3] * 1e4, 0
    solver = offer(model, [Client("c", (x, y)).data], Recipe(lr=1.0, privacy=plan), plan)

    def step(rows: list[int]) -> Tensor:
        return flat(_one(model, [Client("c", (x[rows], y[rows]))], plan, 1e-9, 0, solver))[
            0
        ].double()

    every = [*range(len(x))]
    total, clip = step(every), plan.clip / plan.batch_size
    moves = [step([i for i in every if i != j]) - total for j in every]
    norms = [float(m.norm()) for m in moves]
    assert len(taken) > len(x) and clip * (1 - 1e-4) < max(norms) < clip * (1 + 1e-5)
    # each is that example's gradient, as autograd has it
    for j in (3, 5, 7):
        loss = cross_entropy(model(x[j : j + 1]), y[j : j + 1])
        grads = torch.autograd.grad(loss, [*model.parameters()])
        whole_one = torch.cat([g.flatten() for g in grads]).double()
        scaled = whole_one * min(1.0, plan.clip / float(whole_one.norm())) / plan.batch_size
        torch.testing.assert_close(moves[j], scaled, rtol=0, atol=1e-6)


def flat_start() -> nn.Module:
    """All gradients are zero on inputs of zero, of two layers."""
    net = nn.Sequential(nn.Linear(40, 10, bias=False), nn.ReLU(), nn.Linear(10, 50, bias=False))
    for p in net.parameters():
        nn.init.zeros_(p)
    return net


@pytest.mark.parametrize("projected", [False, True])
def test_the_kit_for_other_implementations_finds_nothing(taken, projected):
    def relu() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))

    once = {"sample_rate": 1.0, "steps": 1, "rounds": 1, "projected": projected}
    silent = flat_start if projected else private_case.silent
    zeros = torch.zeros(3, 40), torch.tensor([0, 1, 2])
    data = private_case.clients((8,))[0].data.tensors
    empty, small = (
        {"sample_rate": 1e-12, "steps": 3, "batch_size": 1.0},
        {"clip": 0.2, "batch_size": 1.0},
    )
    for check, net, given, options, noise in (
        (conformance.noise_has_the_claimed_size, silent, zeros, {"clip": 0.5}, 2.0),
        (conformance.noise_has_the_claimed_size, silent, zeros, empty, 1.0),
        (conformance.noise_is_fresh, silent, zeros, {}, 1.0),
        (conformance.one_example_moves_the_sum_by_the_clip, relu, data, small, 0.0),
        (conformance.the_divisor_is_public, relu, data, {"clip": 1e9, "batch_size": 4.0}, 0.0),
        (conformance.a_broken_example_is_not_seen, relu, data, {}, 1.0),
    ):
        taken.clear()
        holds(check, *released(net, SampleLevel(**once | options), True, noise), given)
        assert taken


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"strategy": FedProx(mu=0.1)}, mlp),
        ({"optimizer": ClientOptimizer("SGD", {"momentum": 0.9})}, mlp),
        ({"optimizer": ClientOptimizer("SGD", {"weight_decay": 0.1})}, mlp),
        ({}, lambda: nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))),
        ({}, lambda: nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))),
        ({}, lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(36, 3))),
        ({"loss": lambda output, y: cross_entropy(output, y, reduction="none")}, mlp),
    ],
    ids=["pull", "momentum", "decay", "tanh", "dropout", "front", "loss"],
)  # fmt: skip
def test_what_it_does_not_know_goes_side_by_side(taken, options, model):
    who = clients()
    if isinstance(model()[0], nn.Conv1d):
        who = [Client(c.id, (c.data.tensors[0][:, None], c.data.tensors[1])) for c in who]
    recipe = Recipe(**{"strategy": FedAvg(), "privacy": SampleLevel(**PLAN)} | options)
    server = Server(model(), who, recipe, engine=Local(solver="fast"))
    server.round()
    assert not taken


def test_a_projected_layer_that_is_all_there_is_goes_its_own_way(taken):
    ends(nn.Linear(20, 3), {}, "fast", projected=True)
    assert not taken


def test_what_a_client_sends_hangs_on_nobody_beside_it(taken):
    found = []
    for chunk in (1, 4):
        recipe = Recipe(lr=0.2, privacy=SampleLevel(**PLAN))
        engine = Local(solver="fast", chunk=chunk)
        server = Server(mlp(), clients(), recipe, engine=engine, seed=3)
        server.round()
        found.append(server.visits.values)
    assert {1, 4} <= {*taken}
    for name in ("train_loss", "update_norm"):
        assert torch.equal(found[0][name], found[1][name])


def test_a_label_that_is_none_is_refused_before_a_loop_reads_it(taken):
    who = clients()[:1]
    server = Server(mlp(), who, Recipe(privacy=SampleLevel(**PLAN)), engine=Local(solver="fast"))
    who[0].data.tensors[1][:] = 3
    with pytest.raises(RuntimeError, match="label 3 is out of bounds for 3 outputs"):
        server.round()
    assert taken
