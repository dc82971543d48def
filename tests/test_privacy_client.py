"""Client-level privacy: clip, noise on the sum, a fixed denominator, secret coins."""

import math

import pytest
import torch

from fedtorch import FedAvg, Poisson, Scaffold, ServerAdam, Uniform
from fedtorch.privacy import AdaptiveClip, Bands, ClientLevel
from fedtorch.privacy.accounting.mixed import REPLACED
from fedtorch.privacy.clipping import clipped, joint_norms
from fedtorch.privacy.noise.streams import stream
from fedtorch.types import ConfigError
from private_case import clients, model, server, silent


def sums(values: torch.Tensor) -> dict:
    """[K, P] updates -> what the server has summed."""
    return {"delta": {"w": values.sum(0)}}


def start(plan: ClientLevel, size: int = 4) -> dict:
    return plan.start({"delta": {"w": torch.zeros(size)}}) | {"round": 0}


def test_clip_bounds_the_norm_of_all_groups_together():
    g = torch.Generator().manual_seed(0)
    sent = {
        "delta": {
            "a": torch.randn(5, 3, 2, generator=g).double(),
            "b": torch.randn(5, generator=g),
        },
        "c": {"a": 1e20 * torch.randn(5, 3, generator=g).double()},
    }
    out = clipped(sent, joint_norms(sent), 0.7)
    assert torch.allclose(joint_norms(out), torch.tensor(0.7).double())
    small = {"delta": {"a": torch.full((2, 3), 0.1)}}
    assert torch.equal(clipped(small, joint_norms(small), 0.7)["delta"]["a"], small["delta"]["a"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_the_zero_update_bit_for_bit(bad):
    sent = {"delta": {"a": torch.tensor([[bad, 1.0], [0.0, 0.0], [1e300, 1e300]]).double()}}
    out = clipped(sent, joint_norms(sent), 1.0)["delta"]["a"]
    assert torch.equal(out[0], torch.zeros(2).double())
    assert torch.equal(out[1], torch.zeros(2).double())
    assert out[2].norm() <= 1 + 1e-9  # beyond float64's square: nothing, or clipped, never more


def test_noise_is_on_the_sum_and_divided_by_a_constant():
    plan = ClientLevel(clip=0.5, rate=0.25, rounds=1)
    mean, _ = plan.server({}, start(plan, 20_000), 2.0, 40)
    assert abs(mean["delta"]["w"].std().item() / (2.0 * 0.5 / 10) - 1) < 0.02
    # whoever reports, the divisor is rate x population
    one = torch.ones(1, 4) / 2
    for k in (1, 3):
        mean, _ = plan.server(sums(one.expand(k, 4).double()), start(plan), 1e-12, 40)
        assert torch.allclose(mean["delta"]["w"], torch.full((4,), k / 2 / 10).double())


def test_without_noise_and_clip_it_is_uniform_fedavg():
    who = clients()
    nets = model(), model()
    private = server(nets[0], who, ClientLevel(clip=1e6, noise_multiplier=1e-13, rounds=2))
    plain = server(nets[1], who, None, strategy=FedAvg(weighting="uniform"))
    for _ in range(2):
        private.round(), plain.round()
    for a, b in zip(*(n.parameters() for n in nets), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_empty_cohort_still_releases_noise_and_is_charged():
    net = silent()
    private = server(net, clients((5,) * 4, 40), ClientLevel(rate=0.75, rounds=3))
    private.recipe.privacy.cohort(4, 0)
    object.__setattr__(private.recipe.privacy, "rate", 0.75)
    private._cohort = lambda: ([], [])
    before = private.private.spent()
    private.round()
    assert net.weight.abs().min() > 0
    assert private.private.spent() > before


def test_coins_are_secret_and_have_the_rate():
    plan = ClientLevel(rate=0.3, rounds=1)
    draws = [tuple(plan.cohort(1000, 0)) for _ in range(20)]
    assert len(set(draws)) == 20  # not a function of the round
    share = sum(map(len, draws)) / 20_000
    assert abs(share - 0.3) < 0.02


def test_a_fixed_size_cohort_and_example_weights_are_refused():
    who = clients()
    plan = ClientLevel(rounds=1)
    for other in (Uniform(cohort_size=2), Poisson(rate=0.5)):
        with pytest.raises(ConfigError, match=r"privacy\.rate"):
            server(model(), who, plan, participation=other)
    with pytest.raises(ConfigError, match="weighting examples voids"):
        server(model(), who, plan, strategy=FedAvg(weighting="examples"))
    with pytest.raises(ConfigError, match="hides nobody"):
        server(model(), who[:2], plan)
    with pytest.raises(ConfigError, match="hides nobody"):
        server(model(), who, ClientLevel(rate=0.5, rounds=1))


def test_weights_are_capped_and_applied_after_the_clip():
    plan = ClientLevel(clip=1.0, weight_cap=20, noise_multiplier=1e-12, rounds=1)
    from fedtorch.types import Task

    task = Task({}, {}, 0, 0, 0.1, {"clip": 1.0, "noise": 1e-12})
    sent = {"delta": {"w": torch.full((3, 4), 5.0).double()}}
    out = plan.client(sent, torch.tensor([5.0, 20.0, 4000.0]), task, ["a", "b", "c"])
    assert torch.allclose(joint_norms(out), torch.tensor([0.25, 1.0, 1.0]).double())


def test_scaffolds_two_groups_share_one_clip_and_are_both_noised():
    net = silent()
    plan = ClientLevel(clip=0.1, noise_multiplier=1.0, rounds=2)
    private = server(net, clients((5,) * 4, 40, 0.0), plan, strategy=Scaffold())
    private.round()
    c = private.extras["c"]["weight"]
    assert c.abs().min() > 0
    assert abs(c.std().item() / (0.1 / 4) - 1) < 0.1


def test_noise_comes_before_the_server_optimizer():
    net = silent()
    plan = ClientLevel(clip=0.1, noise_multiplier=1.0, rounds=2)
    private = server(net, clients((5,) * 4, 40, 0.0), plan, strategy=FedAvg(server=ServerAdam()))
    private.round()
    assert private.state.optimizer["m"]["weight"].abs().min() > 0  # the moments have seen noise


@pytest.mark.parametrize(
    "z, expected, want",
    [(1, 100, 1.0050378), (1, 20, 1.1547005), (0.5, 10, 0.5773503), (1.5, 20, 2.2677868)],
)
def test_adaptive_clipping_splits_the_noise(z, expected, want):
    assert AdaptiveClip().update_noise(z, expected) == pytest.approx(want, abs=1e-7)


def test_noise_on_the_bits_moves_the_clip_no_further_than_all_or_no_updates_would():
    draw, how = stream("aes", None, "bits"), AdaptiveClip(lr=0.2, quantile=0.3)
    for bits, share in ((-5e3, 0.0), (5e3, 1.0)):
        moved = how.next(2.0, bits, 100, draw)
        assert moved == pytest.approx(2.0 * math.exp(-0.2 * (share - 0.3)))


@pytest.mark.parametrize("first", [0.1, 0.9, 1.1, 5.0])
def test_adaptive_clipping_finds_the_median(first):
    norms = torch.linspace(0.5, 1.5, 101)
    plan = ClientLevel(adaptive=AdaptiveClip(start=first), noise_multiplier=0.5, rounds=1)
    state = start(plan)
    for t in range(100):
        state["round"] = t
        bits = torch.where(norms <= state["clip"], 0.5, -0.5).double().sum()[None]
        _, state = plan.server(
            {"delta": {"w": torch.zeros(4).double()}, "below": {"bit": bits}}, state, 0.5, 101
        )
    assert 0.8 < state["clip"] < 1.2


def test_adaptive_noise_uses_the_clip_the_updates_were_clipped_to():
    plan = ClientLevel(adaptive=AdaptiveClip(start=3.0), rounds=1)
    state = start(plan, 20_000)
    bits = torch.tensor([50.0]).double()
    mean, new = plan.server({"below": {"bit": bits}}, state, 1.0, 100)
    assert new["clip"] < 3.0
    assert abs(mean["delta"]["w"].std().item() / (1.0050378 * 3.0 / 100) - 1) < 0.02


def test_the_clip_bits_travel_through_a_round():
    plan = ClientLevel(
        adaptive=AdaptiveClip(start=50.0, bit_noise=1.0), noise_multiplier=1.0, rounds=3
    )
    private = server(model(), clients((9,) * 30), plan)
    figures = [private.round() for _ in range(3)]
    assert figures[-1]["privacy_clip_norm"] < 50.0 * math.exp(-0.2)  # all below: it shrinks


def test_adaptive_clipping_refuses_noise_its_bits_cannot_pay_for():
    with pytest.raises(ConfigError, match="bit_noise"):
        server(
            model(), clients(), ClientLevel(adaptive=AdaptiveClip(), noise_multiplier=1.0, rounds=1)
        )


def test_bands_noise_is_the_dense_inverse_times_white_noise():
    bands = Bands(count=3)
    c = bands.coefficients()
    assert sum(x * x for x in c) == pytest.approx(1)
    n = 12
    dense = sum(
        torch.diag(torch.full((n - i,), x, dtype=torch.float64), -i) for i, x in enumerate(c)
    )
    xi = torch.randn(n, 5, dtype=torch.float64)
    past, rows = [], []
    for t in range(n):
        noise = bands.correlate({"delta": {"w": xi[t]}}, past)
        past = [noise, *past][:2]
        rows.append(noise["delta"]["w"])
    assert torch.allclose(torch.stack(rows), torch.linalg.solve(dense, xi), atol=1e-9)


@pytest.mark.parametrize("rounds, k", [(6, 2), (7, 3), (12, 4)])
def test_bands_sensitivity_is_the_square_root_of_the_participations(rounds, k):
    bands = Bands(count=3)
    c = bands.coefficients()
    dense = sum(
        torch.diag(torch.full((rounds - i,), x, dtype=torch.float64), -i) for i, x in enumerate(c)
    )
    worst = max(float(dense[:, first :: bands.count].sum(1).norm()) for first in range(bands.count))
    # clipped contributions point anywhere; with bands apart the columns do not overlap
    assert worst <= math.sqrt(k) + 1e-9
    assert ClientLevel(bands=bands, rounds=rounds).releases(rounds) == k


def test_bands_keep_clients_apart():
    plan = ClientLevel(bands=Bands(count=4), rounds=1)
    last: dict[int, int] = {}
    for t in range(20):
        for i in plan.cohort(10, t):
            assert t - last.get(i, -99) >= 4
            last[i] = t
    assert len(last) == 10


@pytest.mark.parametrize("units", [REPLACED, 1, 2, 3])
def test_what_bands_cost_several_clients_is_not_known(units):
    events = [ClientLevel(noise_multiplier=1.0, bands=Bands(count=2)).event(1.0)]
    banded, alone = (
        ClientLevel(noise_multiplier=1.0, bands=b).several(events, units)
        for b in (Bands(count=2), None)
    )
    assert alone == [(events[0], units)] and banded == (alone if units == 1 else None)


def test_one_band_is_independent_noise():
    assert Bands(count=1).coefficients() == [1.0]
    assert ClientLevel(bands=Bands(count=1), rounds=5).releases(5) == 5


def test_bands_are_charged_by_group():
    plan = ClientLevel(bands=Bands(count=2), noise_multiplier=1.0, rounds=4)
    private = server(model(), clients((5,) * 6), plan)
    for _ in range(4):
        private.round()
    assert private.private.spent() == pytest.approx(plan.planned(1.0, 4))
    assert private.private.spent() == pytest.approx(ClientLevel(rounds=2).planned(1.0, 2))


@pytest.mark.parametrize(
    "n, want", [(8, 2.952827), (16, 3.778665), (64, 5.706595), (1024, 10.709611)]
)
def test_full_coefficients_have_the_published_largest_error(n, want):
    c = Bands(count=n).coefficients()
    assert sum((x / c[0]) ** 2 for x in c) ** 2 == pytest.approx(want, abs=1e-6)


def test_noise_that_outweighs_every_update_is_said_with_the_number():
    run = server(model(), clients((5,) * 4), ClientLevel(noise_multiplier=1.0, rounds=1))
    (note,) = [n for n in run.notes if "outweighs" in n]
    assert "4 clients" in note and "about 8" in note  # 59 weights
    quiet = server(model(), clients((5,) * 4), ClientLevel(noise_multiplier=0.1, rounds=1))
    assert not [n for n in quiet.notes if "outweighs" in n]


def test_a_delta_that_gives_somebody_up_is_said():
    run = server(model(), clients((5,) * 4), ClientLevel(noise_multiplier=1.0, rounds=1, delta=0.5))
    assert [n for n in run.notes if n.startswith("delta 0.5")]


@pytest.mark.parametrize("options", [{"weight_cap": 1.5}, {"weight_cap": 0}, {"rate": 0.0}])
def test_options_of_no_meaning_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ClientLevel(**options)
    with pytest.raises(ConfigError, match="count"):
        Bands(count=2.5)


def test_secret_coins_are_tossed_once_a_round(monkeypatch):
    run = server(model(), clients((5,) * 12), ClientLevel(rate=0.5, noise_multiplier=1.0, rounds=3))
    tossed = []
    cohort = ClientLevel.cohort

    def watched(self, population, round):
        tossed.append((round, cohort(self, population, round)))
        return tossed[-1][1]

    monkeypatch.setattr(ClientLevel, "cohort", watched)
    figures = [*run.rounds(3)]
    assert [r for r, _ in tossed] == [0, 1, 2]
    ids = [[run.ids[i] for i in who] for _, who in tossed]
    assert [sorted(f["nonprivate_cohort"]) for f in figures] == [*map(sorted, ids)]
