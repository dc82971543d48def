"""Clipped, noised gradients: every mode against a loop over examples."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtorch import Client, Local, Recipe, Server, local_update
from fedtorch.fast import offer
from fedtorch.privacy import SampleLevel
from fedtorch.privacy.gradients import PrivateSteps, rounded, stacked_gradients
from fedtorch.privacy.noise.streams import stream
from fedtorch.privacy.one_client import private_gradients
from fedtorch.training.losses import cross_entropy
from fedtorch.training.module import snapshot
from fedtorch.training.step import Stepping, Supervised
from fedtorch.tree import exact_sq_norms
from fedtorch.types import ConfigError, Task
from private_case import clients, flat, model, visit

MODES = ("layers", "stacked", "hooks", "ghost")


def brute_force(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, clip: float
) -> list[torch.Tensor]:
    """Sum over examples of the clipped gradient, one backward pass for each."""
    total = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(len(y)):
        net.zero_grad()
        cross_entropy(net(x[i : i + 1]), y[i : i + 1]).sum().backward()
        grads = [p.grad for p in net.parameters()]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        if math.isfinite(norm):
            for t, g in zip(total, grads, strict=True):
                t += g * min(1.0, clip / norm) if norm else g
    net.zero_grad()
    return total


def conv() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.Tanh(),
        nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 4),
    )  # fmt: skip


def channels_last() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2),
        nn.Flatten(), nn.Linear(18, 4),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


class Positions(nn.Module):
    """Tokens of which 0 fills up, and positions that are looked up once for all examples, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.places = nn.Embedding(5, 4, padding_idx=0), nn.Embedding(8, 4)
        self.register_buffer("order", torch.arange(8)[None])
        with torch.no_grad():  # one that counts as it is, and learns nothing
            self.words.weight[0] = 1.0
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.words(x) + self.places(self.order[:, : x.shape[1]])
        return self.out(seen.tanh().mean(1))


def test_one_row_of_positions_for_all_and_tokens_that_fill_up_are_clipped_example_by_example():
    net, draw = Positions(), torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (6, 7), generator=draw)
    y = torch.randint(0, 3, (6,), generator=draw)
    want = brute_force(net, x, y, 0.5)
    steps = PrivateSteps(0.5, 0.0, 1.0, [stream("aes", 0, "test")], "hooks", max_batch=4)
    with private_gradients(net, Supervised(cross_entropy), steps) as gradients:
        gradients.backward((x, y))
    assert not want[0][0].any() and want[1].any()
    for p, total in zip(net.parameters(), want, strict=True):
        assert torch.allclose(p.grad, total, atol=1e-6)


class Scaled(nn.Module):
    """With a parameter that is a single number, which flattening can forget."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(x * self.scale)


def step(mode: str, **options) -> SampleLevel:
    options = {"sample_rate": 1.0, "steps": 1, "batch_size": 7.0, "rounds": 1} | options
    return SampleLevel(mode=mode, **options)


@pytest.mark.parametrize("clip", [0.3, 1e6])
@pytest.mark.parametrize(
    ("make", "mode"),
    [
        *itertools.product((model, conv, channels_last), MODES),
        *itertools.product((Scaled,), MODES[1:]),  # a weight that belongs to no layer
    ],
)
def test_clipped_sum_is_the_brute_force_one(mode, clip, make):
    who = clients((11,))
    x, y = who[0].data.tensors
    want = brute_force(make(), x, y, clip)
    sent = visit(make(), who, step(mode, clip=clip), noise=0.0)
    for got, w in zip(sent.values(), want, strict=True):
        assert torch.allclose(-7.0 * got[0], w.double(), atol=1e-6, rtol=1e-5)


@pytest.fixture(params=["medium", "high", "one backend", "allow_tf32"])
def short(request):
    """Float32 products rounded to fewer digits, told in each of torch's ways."""
    matmul = torch.backends.cuda.matmul
    if request.param == "one backend":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    elif request.param == "allow_tf32":
        matmul.allow_tf32 = True
    else:
        torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("solver", ["auto", "general", "stacked", "fast"])
def test_products_of_fewer_digits_are_refused_before_training(short, solver):
    recipe = Recipe(privacy=step("auto", epsilon=1.0))
    with pytest.raises(ConfigError, match=r"torch\.set_float32_matmul_precision"):
        Server(model(), clients(), recipe, engine=Local(solver=solver))


@pytest.mark.parametrize("mode", MODES)
def test_products_of_fewer_digits_are_refused_in_a_visit_of_every_mode(short, mode):
    who = clients((11,))
    with pytest.raises(ConfigError, match="beyond what clipping bounds"):
        visit(model(), who, step(mode), noise=0.0)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_around_a_visit_is_refused_in_every_mode(mode):
    who = clients((11,))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ConfigError, match=r"torch\.autocast around the training"),
    ):
        visit(model(), who, step(mode), noise=0.0)


def test_autocast_around_a_run_is_refused_before_training():
    recipe = Recipe(privacy=step("auto", epsilon=1.0))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ConfigError, match=r"torch\.autocast around the training"),
    ):
        Server(model(), clients(), recipe)


def test_a_backend_that_is_told_to_round_in_full_is_no_fault():
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        visit(model(), clients((11,)), step("ghost"), noise=0.0)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mode", MODES)
def test_batches_larger_than_memory_are_split_without_a_trace(mode):
    who = clients((23,))
    whole, parts = (
        visit(model(), who, step(mode, max_batch=m, insecure_seed=1), noise=1.0) for m in (512, 4)
    )
    assert (flat(whole) - flat(parts)).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("mode", MODES)
def test_an_example_that_is_not_finite_counts_as_nothing(mode, bad):
    x, y = clients((9,))[0].data.tensors
    with_bad = torch.cat([x, torch.full((1, 6), bad)]), torch.cat([y, y[:1]])
    net = nn.Linear(6, 4)  # no tanh, which would make the example finite again
    clean, dirty = (
        visit(copy.deepcopy(net), [Client("c", d)], step(mode, insecure_seed=1), noise=1.0)
        for d in ((x, y), with_bad)
    )
    assert flat(dirty).isfinite().all()
    if not math.isfinite(bad):
        assert (flat(clean) - flat(dirty)).abs().max() < 1e-6
    else:  # a huge example is clipped like any other
        assert (flat(clean) - flat(dirty)).norm() <= 1 / 7 * (1 + 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_only_examples_that_are_not_finite_leave_noise_alone(mode):
    who = [Client("c", (torch.full((3, 6), math.nan), torch.zeros(3, dtype=torch.long)))]
    sent = visit(nn.Linear(6, 4), who, step(mode), noise=1.0)
    assert flat(sent).isfinite().all()
    assert flat(sent).abs().min() > 0


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_chunks_agree_with_noise_on(mode):
    who = clients((9, 20, 14))
    plan = SampleLevel(mode=mode, insecure_seed=5, rounds=1)
    together = flat(
        visit(model(), who, SampleLevel(mode="stacked", insecure_seed=5, rounds=1), 1.0)
    )
    alone = torch.cat([flat(visit(model(), [c], plan, 1.0)) for c in who])
    assert (together - alone).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["layers", "hooks", "ghost"])
def test_nothing_of_a_visit_stays_on_the_model(mode):
    net = model()
    names, keys = set(vars(net)), list(net.state_dict())
    task = Task(snapshot(net), {}, 0, 0, 1.0, {"clip": 1.0, "noise": 1.0})
    local_update(clients((5,)), task, Recipe(privacy=step(mode)), net)
    assert list(net.state_dict()) == keys
    assert set(vars(net)) == names
    for m in net.modules():
        assert not m._forward_hooks and not m._backward_hooks
    for p in net.parameters():
        assert not [a for a in vars(p) if "sample" in a or "summed" in a]
    copy.deepcopy(net)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, 1e-30, 1e30, math.inf, math.nan]),
        min_size=1,
        max_size=6,
    ),
    st.floats(1e-3, 1e3),
)
def test_no_contribution_is_longer_than_the_clip(values, clip):
    g = torch.tensor(values, dtype=torch.float32)
    factor = PrivateSteps(clip, 1.0, 1.0, []).factors(exact_sq_norms(g[None]))
    if factor[0] > 0 and g.isfinite().all():
        # of float64 no more than its own rounding
        assert g.double().norm() * factor <= clip * (1 + 1e-15)
        short = (g * rounded(factor, g)).double().norm()
        assert short <= clip * (1 + 2.0**-23) + 1e-44  # docs/privacy.md says so
    elif not g.isfinite().all():
        assert factor[0] == 0


@pytest.mark.parametrize("make", [model, conv, Scaled])
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_examples_alone_are_the_brute_force_too(clip, make):
    who = clients((11,))
    x, y = who[0].data.tensors
    x = torch.cat([x, torch.full((1, 6), math.nan)])
    want = brute_force(make(), x, torch.cat([y, y[:1]]), clip)
    net = make()
    steps = PrivateSteps(clip, 0.0, 7.0, [stream("aes", 0, "test")], "alone")
    with private_gradients(net, Supervised(cross_entropy), steps) as found:
        assert not found.backward((x, torch.cat([y, y[:1]]))).isfinite()
        got = [7.0 * p.grad for p in net.parameters()]
        assert found.backward((x[:0], y[:0])) == 0
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-6, rtol=1e-5)
    assert all(bool((p.grad == 0).all()) for p in net.parameters())


def extremes(inputs: int) -> dict[str, torch.Tensor]:
    """Rows from where squares vanish to where they overflow, alike and of mixed size."""
    g = torch.Generator().manual_seed(9)
    r = torch.randn(1, inputs, generator=g)
    sizes = [
        *(10.0**e for e in (-45, -38, -30, -20, -8, 0, 8, 15, 19, 20, 30, 37)),
        math.nan,
        math.inf,
    ]
    rows = {f"{s:g}": s * r for s in sizes} | {"3e38": torch.full((1, inputs), 3e38)}
    rows["mixed"] = 10.0 ** torch.linspace(-44, 38, inputs)[None]
    rows["one"] = torch.zeros(1, inputs)
    rows["one"][0, 1] = 3e38
    return rows


@pytest.mark.parametrize("clip", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("mode", [*MODES, "dense", "projected"])
def test_no_row_however_small_or_large_moves_the_sum_by_more_than_the_clip(mode, clip):
    x, y = clients((9,))[0].data.tensors
    options = (
        {"projected": True} if mode == "projected" else {"mode": mode} if mode in MODES else {}
    )
    plan = SampleLevel(
        clip=clip, batch_size=clip, sample_rate=1.0, steps=1, rounds=1, insecure_seed=1, **options
    )

    def total(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        who = [Client("c", (rows, labels))]
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        torch.nn.init.normal_(net[0].weight, generator=torch.Generator().manual_seed(2))
        torch.nn.init.normal_(net[2].weight, generator=torch.Generator().manual_seed(3))
        task = Task(snapshot(net), {}, 0, 0, 1.0, {"clip": clip, "noise": 0.0})
        recipe = Recipe(privacy=plan, lr=1.0)
        solver = None
        if mode not in MODES:
            solver = offer(net, [clients((9,))[0].data], recipe, plan)
        update, _ = local_update(who, task, recipe, net, solver)
        return flat({k: update.sent["delta"][k] for k in sorted(update.sent["delta"])})

    torch.manual_seed(0)
    state = torch.get_rng_state()
    base = total(x, y)
    for name, row in extremes(6).items():
        torch.set_rng_state(state)
        change = total(torch.cat([x, row]), torch.cat([y, torch.tensor([2])])) - base
        # what the others add up to is rounded anew
        assert float(change.norm()) <= 1 + 2e-5, name


@pytest.mark.parametrize("mode", [*MODES, "alone"])
def test_gradients_at_the_ends_of_float32_are_clipped_in_every_mode(mode):
    def first(net, x):  # a row is its own gradient, so each size is seen by itself
        return net(x)[:, 0]

    net = nn.Linear(6, 1, bias=False)
    for clip in (1e-6, 1.0, 1e9):
        for name, row in extremes(6).items():
            steps = PrivateSteps(clip, 0.0, 1.0, [stream("aes", 0, "test")], mode)
            if mode == "stacked":
                params = {"weight": net.weight[None]}
                mask, stepping = torch.ones(1, 1, dtype=torch.bool), Stepping(net, first)
                grads, _ = stacked_gradients(stepping, params, {}, row[None], mask, steps)
                got = grads["weight"]
            else:
                with private_gradients(net, first, steps) as found:
                    found.backward(row)
                got = net.weight.grad
            norm, want = float(got.double().norm()), float(row.double().norm())
            assert norm <= clip * (1 + 1e-6), name
            if math.isfinite(want) and clip / want > 1e-37:
                assert norm == pytest.approx(min(want, clip), rel=1e-5, abs=1e-43), name
