"""Planted bugs of privacy code: each is caught by a check that the correct build passes.

Every check here looks at what a build does, not at how; ``privacy/conformance.py`` has those that can be
pointed at another implementation. Each bug has been seen in a released library or paper code
(docs/privacy.md says where).
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fedtorch import Client
from fedtorch import recipe as recipe_module
from fedtorch import server as server_module
from fedtorch.fast import copies
from fedtorch.privacy import (
    AdaptiveClip,
    ClientLevel,
    LocalDP,
    SampleLevel,
    conformance,
    gradients,
    one_client,
    sample,
)
from fedtorch.privacy import run as run_module
from fedtorch.privacy.accounting.events import epsilon
from fedtorch.privacy.accounting.gaussian import gaussian_epsilon
from fedtorch.privacy.noise import streams
from fedtorch.rounds import participation
from fedtorch.types import ConfigError
from private_case import clients, flat, model, server, silent, visit

pytestmark = pytest.mark.conformance

ONE = {"sample_rate": 1.0, "steps": 1, "rounds": 1}


# what a correct build does ------------------------------------------------------------------------


def each_way(check: Callable[[Callable[..., SampleLevel], bool], None]) -> Callable[[], None]:
    """Hold every way to private steps to it: gradients written out, the fast path, projected noise."""

    @functools.wraps(check)
    def on_all() -> None:
        for quick, options in (
            (False, {"mode": "stacked"}),
            (False, {"mode": "layers"}),
            (True, {}),
            (True, {"projected": True}),
        ):
            check(functools.partial(SampleLevel, **options), quick)

    return on_all


def released(net, plan, quick, noise, by="client"):
    """One client's visit as the kit asks for it: another seed is another client, or another round."""

    def release(data, seed):
        who = [Client(f"c{seed}" if by == "client" else "c", data)]
        return flat(visit(net(), who, plan, noise, seed if by == "round" else 0, quick))[0]

    claim = conformance.Claim(
        clip=plan.clip, noise=noise, divisor=plan.batch_size, steps=plan.steps
    )
    return release, claim


def holds(check, release, claim, data) -> None:
    assert [*check(release, claim, data)] == []


ZEROS = torch.zeros(3, 40), torch.tensor([0, 1, 2])


@each_way
def sample_noise_has_the_claimed_size(plan, quick) -> None:
    plan = plan(clip=0.5, batch_size=4.0, **ONE)
    holds(conformance.noise_has_the_claimed_size, *released(silent, plan, quick, 2.0), ZEROS)


@each_way
def an_empty_batch_is_noised(plan, quick) -> None:
    plan = plan(sample_rate=1e-12, steps=3, batch_size=1.0, rounds=1)
    holds(conformance.noise_has_the_claimed_size, *released(silent, plan, quick, 1.0), ZEROS)


@each_way
def noise_is_fresh_for_each_client_and_round(plan, quick) -> None:
    for by in ("client", "round"):
        holds(conformance.noise_is_fresh, *released(silent, plan(**ONE), quick, 1.0, by), ZEROS)


@each_way
def one_example_moves_the_sum_by_the_clip(plan, quick) -> None:
    plan = plan(clip=0.2, batch_size=1.0, **ONE)
    data = clients((8,))[0].data.tensors
    holds(
        conformance.one_example_moves_the_sum_by_the_clip, *released(model, plan, quick, 0.0), data
    )


@each_way
def the_divisor_is_public(plan, quick) -> None:
    plan = plan(clip=1e9, batch_size=4.0, **ONE)
    data = clients((8,))[0].data.tensors
    holds(conformance.the_divisor_is_public, *released(model, plan, quick, 0.0), data)


def the_run_pays_for_every_round() -> None:
    plan = SampleLevel(steps=4, noise_multiplier=1.0, rounds=5)
    run = server(model(), clients(), plan)
    for _ in range(5):
        run.round()
    once = epsilon([dataclasses.replace(plan.event(1.0), steps=20)], plan.delta)
    assert run.private.spent() == pytest.approx(once)


def one_client_moves_the_mean_by_the_clip_over_the_expected_cohort() -> None:
    """Whatever its size: its update against none, everything else and the noise being equal."""
    plan = ClientLevel(clip=0.3, noise_multiplier=1e-9, rounds=1, insecure_seed=1)
    results = []
    for size in (1, 500):
        who = clients((4, 4, 4, size), scale=20.0)
        net = model()
        server(net, who, plan, lr=1.0).round()
        results.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    # a replacement is a removal and an addition: twice the clip, over 4 clients
    assert (results[0] - results[1]).norm() <= 2 * 0.3 / 4 * (1 + 1e-4)


def central_noise_has_the_claimed_size() -> None:
    net = silent(40, 500)
    plan = ClientLevel(clip=0.5, noise_multiplier=2.0, rounds=1)
    server(net, clients((3,) * 4, 40, 0.0), plan).round()
    assert abs(net.weight.std().item() / (2.0 * 0.5 / 4) - 1) < 0.02


def drop_outs_do_not_change_the_divisor() -> None:
    net = silent(40, 500)
    plan = ClientLevel(clip=0.5, noise_multiplier=2.0, rounds=1)
    lossy = participation.Everyone(dropout=0.6)
    server(net, clients((3,) * 8, 40, 0.0), plan, participation=lossy).round()
    assert abs(net.weight.std().item() / (2.0 * 0.5 / 8) - 1) < 0.02


def the_adaptive_clip_goes_to_the_median() -> None:
    plan = ClientLevel(adaptive=AdaptiveClip(start=5.0), rounds=1)
    state = plan.start({"delta": {"w": torch.zeros(1)}})
    for t in range(60):
        state["round"] = t
        bits = torch.where(torch.linspace(0.5, 1.5, 101) <= state["clip"], 0.5, -0.5)
        total = {"below": {"bit": bits.double().sum()[None]}}
        _, state = plan.server(total, state, 0.5, 101)
    assert 0.8 < state["clip"] < 1.2


def local_noise_covers_a_replacement() -> None:
    """Epsilon of what is seen: how far the two worst updates are apart, over the spread of each."""
    plan = LocalDP(clip=1.0, epsilon=1.0, delta=1e-5, rounds=1)
    task = SimpleNamespace(privacy={"clip": 1.0, "noise": plan.calibrated(1)}, round=0, draw=(0,))
    seen = []
    for worst in (1e6, -1e6):
        sent = {"delta": {"w": torch.full((10_000, 1), worst).double()}}
        ids = [f"{worst}-{k}" for k in range(10_000)]
        seen.append(plan.client(sent, torch.ones(10_000), task, ids)["delta"]["w"].flatten())
    spread = torch.stack([s.std() for s in seen]).mean()
    apart = seen[0].mean() - seen[1].mean()
    assert abs(apart - 2) < 0.5
    assert gaussian_epsilon(float(spread) / 2, 1e-5) <= 1.02


def low_bits_do_not_give_the_update_away() -> None:
    """Take the candidate off what was sent: the right one must not leave something that looks like noise.

    Noise of 24 bits on a sum of 53 would, in every coordinate: a test without any error.
    """
    for rng in ("aes", "os"):
        plan = LocalDP(clip=1.0, rounds=1, rng=rng)
        task = SimpleNamespace(privacy={"clip": 1.0, "noise": 3.0}, round=0, draw=(0,))
        update = torch.full((1, 1000), 0.01).double()
        sent = plan.client({"delta": {"w": update}}, torch.ones(1), task, ["c"])["delta"]["w"]
        rests = [(sent - candidate) / 6 for candidate in (update, -update)]
        looks = [((r - r.float()).abs() < 1e-13 * r.abs()).double().mean() for r in rests]
        assert abs(looks[0] - looks[1]) < 0.1


def statistics_never_leave() -> None:
    with pytest.raises(ConfigError):
        net = torch.nn.Sequential(torch.nn.BatchNorm1d(6, affine=False), model())
        server(net, clients(), SampleLevel(rounds=1))


@each_way
def a_broken_example_is_not_seen(plan, quick) -> None:
    data = clients((9,))[0].data.tensors
    holds(conformance.a_broken_example_is_not_seen, *released(model, plan(**ONE), quick, 1.0), data)


# what an incorrect build does ---------------------------------------------------------------------


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    finish = gradients.PrivateSteps.finish

    def less(self, total):
        return finish(dataclasses.replace(self, noise=self.noise / 2), total)

    patch.setattr(gradients.PrivateSteps, "finish", less)


def half_the_noise_of_the_fast_path(patch: pytest.MonkeyPatch) -> None:
    noisy = gradients.PrivateSteps.noisy

    def less(self, row, k, times=1.0, part=False, onto=None):
        return noisy(dataclasses.replace(self, noise=self.noise / 2), row, k, times, part, onto)

    patch.setattr(gradients.PrivateSteps, "noisy", less)


def inputs_forgotten_in_norms_of_the_fast_path(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copies.Own, "example_sq_norms", lambda self, d: d.square().sum(2))


def projected_noise_of_one_step_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedtorch.fast.projected.math", SimpleNamespace(sqrt=lambda t: 1.0))


def noise_on_the_mean(patch: pytest.MonkeyPatch) -> None:
    def finish(self, total):
        std = self.noise * self.clip / self.divisor**2
        return {
            k: v / self.divisor
            + std * torch.stack([s.normal(tuple(v.shape[1:])) for s in self.streams]).to(v)
            for k, v in total.items()
        }

    patch.setattr(gradients.PrivateSteps, "finish", finish)


def no_noise_on_an_empty_batch(patch: pytest.MonkeyPatch) -> None:
    finish = gradients.PrivateSteps.finish

    def skip(self, total):
        if all(not v.any() for v in total.values()):
            return total
        return finish(self, total)

    patch.setattr(gradients.PrivateSteps, "finish", skip)


def one_seed_for_all_clients(patch: pytest.MonkeyPatch) -> None:
    def same(self, *purpose):
        return streams.stream("aes", 42, *[p for p in purpose if not str(p).startswith("c")])

    patch.setattr(sample.SampleLevel, "stream", same)


def one_seed_for_all_rounds(patch: pytest.MonkeyPatch) -> None:
    def same(self, *purpose):
        return streams.stream("aes", 42, *[p for p in purpose if not isinstance(p, int)])

    patch.setattr(sample.SampleLevel, "stream", same)


def clip_by_layer_with_flat_noise(patch: pytest.MonkeyPatch) -> None:
    def by_layer(stepping, params, rest, batch, mask, steps):
        grads, losses = per_example(stepping, params, rest, batch)
        total = {}
        for k, g in grads.items():
            factors = steps.factors(g.reshape(*g.shape[:2], -1).square().sum(2))
            total[k] = torch.einsum("kb,kb...->k...", factors * mask, g)
        return steps.finish(total), losses

    patch.setattr("fedtorch.training.stacked.stacked_gradients", by_layer)


def per_example(stepping, params, rest, batch):
    from torch.func import grad_and_value, vmap

    def one(w, b, x, y):
        return stepping.losses(w, b, (x[None], y[None]))[0]

    fixed = {k: v.detach() for k, v in params.items()}
    x, y = batch
    return vmap(vmap(grad_and_value(one), (None, None, 0, 0)))(fixed, rest, x, y)


def divide_by_the_batch_there_was(patch: pytest.MonkeyPatch) -> None:
    real = gradients.stacked_gradients

    def by_actual(stepping, params, rest, batch, mask, steps):
        n = float(mask.sum(1).max())
        return real(stepping, params, rest, batch, mask, dataclasses.replace(steps, divisor=n))

    patch.setattr("fedtorch.training.stacked.stacked_gradients", by_actual)


def broken_examples_are_clipped_like_others(patch: pytest.MonkeyPatch) -> None:
    def factors(self, sq):
        return (self.clip * sq.rsqrt()).clamp(max=1)

    patch.setattr(gradients.PrivateSteps, "factors", factors)
    for file in (gradients, one_client):
        patch.setattr(file, "counting", lambda used, grads, sq: grads)


def a_ledger_that_starts_anew_each_round(patch: pytest.MonkeyPatch) -> None:
    charge = run_module.PrivateRun.charge

    def forgetful(self, cohort, round):
        self.ledger = run_module.Ledger(unit=self.plan.unit)
        charge(self, cohort, round)

    patch.setattr(run_module.PrivateRun, "charge", forgetful)


def average_weighted_by_examples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe_module.Recipe, "weighting", property(lambda self: "examples"))
    release = ClientLevel.server

    def divided(self, sums, state, noise, population):
        mean = {g: {k: v / 4 for k, v in s.items()} for g, s in sums.items()}
        return release(self, mean, state, noise, population)

    patch.setattr(ClientLevel, "server", divided)


def divide_by_the_cohort_there_was(patch: pytest.MonkeyPatch) -> None:
    real = server_module.PrivateRun.release

    def by_actual(self, sums):
        ids, self.ids = self.ids, self.ids[:3]
        try:
            return real(self, sums)
        finally:
            self.ids = ids

    patch.setattr(server_module.PrivateRun, "release", by_actual)


def half_the_central_noise(patch: pytest.MonkeyPatch) -> None:
    release = ClientLevel.server
    patch.setattr(
        ClientLevel, "server", lambda s, sums, state, z, n: release(s, sums, state, z / 2, n)
    )


def the_adaptive_sign_turned(patch: pytest.MonkeyPatch) -> None:
    real = AdaptiveClip.next

    def turned(self, clip, bits, expected, draw):
        return real(self, clip, -bits, expected, draw)

    patch.setattr(AdaptiveClip, "next", turned)


def half_the_sensitivity(patch: pytest.MonkeyPatch) -> None:
    client = LocalDP.client

    def once(self, sent, examples, task, ids):
        numbers = task.privacy | {"noise": task.privacy["noise"] / 2}
        return client(
            self, sent, examples, SimpleNamespace(privacy=numbers, round=0, draw=(0,)), ids
        )

    patch.setattr(LocalDP, "client", once)


def noise_of_fewer_bits_than_the_sum(patch: pytest.MonkeyPatch) -> None:
    def coarse(exact, noise):
        return exact + 6 * (noise / 6).float().double()

    patch.setattr("fedtorch.privacy.local.noised", coarse)


def only_trainable_layers_are_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedtorch.checks.private.models.refuse", lambda net: None)
    patch.setattr("fedtorch.checks.private._frozen_buffers", lambda *a: None)
    patch.setattr("fedtorch.checks.private.mixes_examples", lambda *a: False)
    patch.setattr("fedtorch.checks.modes._works", lambda *a: None)


PLANTED: dict[Callable[[pytest.MonkeyPatch], None], Callable[[], None]] = {
    half_the_noise: sample_noise_has_the_claimed_size,
    half_the_noise_of_the_fast_path: sample_noise_has_the_claimed_size,
    inputs_forgotten_in_norms_of_the_fast_path: one_example_moves_the_sum_by_the_clip,
    projected_noise_of_one_step_for_all: an_empty_batch_is_noised,
    noise_on_the_mean: sample_noise_has_the_claimed_size,
    no_noise_on_an_empty_batch: an_empty_batch_is_noised,
    one_seed_for_all_clients: noise_is_fresh_for_each_client_and_round,
    one_seed_for_all_rounds: noise_is_fresh_for_each_client_and_round,
    clip_by_layer_with_flat_noise: one_example_moves_the_sum_by_the_clip,
    divide_by_the_batch_there_was: the_divisor_is_public,
    broken_examples_are_clipped_like_others: a_broken_example_is_not_seen,
    a_ledger_that_starts_anew_each_round: the_run_pays_for_every_round,
    average_weighted_by_examples: one_client_moves_the_mean_by_the_clip_over_the_expected_cohort,
    divide_by_the_cohort_there_was: drop_outs_do_not_change_the_divisor,
    half_the_central_noise: central_noise_has_the_claimed_size,
    the_adaptive_sign_turned: the_adaptive_clip_goes_to_the_median,
    half_the_sensitivity: local_noise_covers_a_replacement,
    noise_of_fewer_bits_than_the_sum: low_bits_do_not_give_the_update_away,
    only_trainable_layers_are_looked_at: statistics_never_leave,
}


@pytest.mark.parametrize("check", sorted(set(PLANTED.values()), key=lambda f: f.__name__))
def test_a_correct_build_passes(check):
    check()


@pytest.mark.parametrize("bug, check", PLANTED.items(), ids=lambda f: f.__name__)
def test_a_planted_bug_is_caught(bug, check, monkeypatch):
    bug(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check()
