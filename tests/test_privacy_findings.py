"""What an audit makes of scores: guesses, limits, words; of synthetic scores whose law is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtorch.privacy.accounting.gaussian import gaussian_epsilon
from fedtorch.privacy.audit import chi_limits
from fedtorch.privacy.findings import CanaryResults, Findings, guessed, judged, of_examples, pooled
from fedtorch.types import ConfigError


def release(m: int = 1000, shift: float = 1.0, noise: float = 1.0, seed: int = 0) -> CanaryResults:
    """One Gaussian release of ``m`` canaries, in units of the noise claimed."""
    draw = np.random.default_rng(seed)
    inside, made = draw.random(m) < 0.5, noise * draw.standard_normal(m)
    size = float(np.sqrt((made**2).mean()))
    return CanaryResults(
        unit="example",
        inside=inside,
        scores=made + shift * inside,
        shift=np.full(m, shift),
        wander=np.zeros(m),
        noise=size,
        numbers=m,
        step_noise=size,
        step_numbers=m,
        longest=1.0,
    )


@pytest.mark.parametrize(
    ("numbers", "low"), [(100, 0.787), (500, 0.903), (2500, 0.956)], ids=["100", "500", "2500"]
)
def test_limits_of_a_right_build(numbers, low):
    assert chi_limits(numbers)[0] == pytest.approx(low, abs=5e-4)
    draw = np.random.default_rng(1).standard_normal((2000, numbers))
    sizes = np.sqrt((draw**2).mean(1))
    low, high = chi_limits(numbers, 0.05)
    assert (sizes < low).mean() == pytest.approx(0.05, abs=0.02)
    assert (sizes > high).mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.5], ids=str)
def test_a_right_release_is_not_refuted_and_half_its_noise_is(shift):
    claim = gaussian_epsilon(1 / shift, 1e-5)
    right = [judged(release(shift=shift, seed=s), claim, 1e-5, 0.2) for s in range(20)]
    assert sum(f.refuted for f in right) <= 1
    assert all(f.at_least <= claim for f in right)
    half = [judged(release(shift=shift, noise=0.5, seed=s), claim, 1e-5, 0.2) for s in range(20)]
    assert all(f.noise.value < f.noise.low for f in half)


def test_power_of_a_thousand_canaries_at_a_claim_of_8():
    shift, claim = 1 / 0.600229, 8.0
    bounds = [judged(release(shift=shift, seed=s), claim, 1e-5, 0.2).at_least for s in range(20)]
    assert 2.5 < np.mean(bounds) < 5.5  # secure.md: about half of it


def test_canaries_that_send_nothing_prove_nothing():
    nothing = [replace(release(m=200, shift=0.0, seed=s), shift=np.ones(200)) for s in range(400)]
    bounds = [judged(one, 8.0, 1e-5, 0.2, exact=1e-2).at_least for one in nothing]
    assert sum(bound == 0 for bound in bounds) >= 0.95 * 400


def test_guesses():
    inside = np.array([True, True, False, False, True])
    scores = np.array([3.0, 2.0, 0.0, -1.0, 1.0])
    one = replace(release(m=5), inside=inside, scores=scores, shift=np.ones(5))
    assert guessed(one, 1.0) == (5, 5)  # all of them, three as in
    assert guessed(one, 0.6) == (3, 3)  # an odd number: one more is guessed in
    assert guessed(one, 0.01) == (2, 2)  # never fewer than two
    tied = replace(one, scores=np.zeros(5))
    assert guessed(tied, 1.0)[0] == 5  # equal scores are guessed by place, which no coin knows of
    with pytest.raises(ConfigError, match=r"audit\.guesses must be a share"):
        guessed(one, 0.0)


def test_canaries_that_took_part_more_often_prove_more():
    # of two that stand equally high, that with the larger shift is the surer guess
    twice = replace(
        release(m=2),
        inside=np.array([True, False]),
        scores=np.array([2.0, 2.0]),
        shift=np.array([2.0, 0.1]),
    )
    assert guessed(twice, 1.0) == (2, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise": 0.9, "step_noise": 0.9}, "the run's noise is 0.9"),
        ({"step_noise": 0.9}, "a step's noise is 0.9"),
        ({"step_noise": 2.0}, "a step's noise is 2 of what"),
        ({"noise": 5.0}, "noise is used again"),
        ({"longest": 1.41}, "one example moves the sum by 1.41 clipping norms"),
        ({"missed": 3}, "3 noised steps are charged that went past the audit"),
        ({"shift": np.full(1000, 0.5)}, "a canary counts 1.97 times"),
    ],
    ids=["noise", "step", "more", "again", "clip", "missed", "shift"],
)
def test_what_contradicts_a_claim_is_said(change, words):
    found = judged(replace(release(), **change), 100.0, 1e-5, 0.2)
    assert found.refuted and any(words in why for why in found.contradictions)
    assert "the claim is refuted" in "\n".join(found.words())
    assert json.loads(json.dumps(found.table()))["refuted"] is True


@pytest.mark.parametrize("figure", ["noise", "step_noise", "longest"])
def test_what_is_no_number_contradicts_a_claim_too(figure):
    found = judged(replace(release(), **{figure: math.nan}), 100.0, 1e-5, 0.2)
    assert found.refuted and "nan" in " ".join(found.contradictions)
    table = found.table()
    assert Findings.read(table).refuted
    with pytest.raises(ValueError, match="no unit that can be audited"):
        Findings.read(table | {"unit": "inf"})


def test_what_one_client_s_canaries_show_is_in_units_of_the_noise_claimed():
    kept = {
        "at": torch.arange(2),
        "inside": torch.tensor([True, False]),
        "noise": torch.tensor([1.0, -3.0], dtype=torch.float64),
        "sent": torch.tensor([2.0, 0.0], dtype=torch.float64),
        "squares": torch.tensor([6.0], dtype=torch.float64),
        "parts": torch.tensor([2.0, 4.0], dtype=torch.float64),
        "longest": torch.tensor([1.5], dtype=torch.float64),
        "steps": torch.tensor([4]),
    }
    # noise of 0.5 clips of 2 in each of 4 steps: a deviation of 2 in their sum
    seen = of_examples(kept, rate=0.25, clip=2.0, noise=0.5, due=5)
    assert seen.scores.tolist() == [1.5, -1.5] and (seen.numbers, seen.missed) == (2, 1)
    assert seen.shift.tolist() == [1.0, 1.0] and seen.wander.tolist() == [0.75, 0.75]
    assert seen.noise == pytest.approx(math.sqrt(5) / 2) and seen.longest == 0.75
    assert (seen.step_noise, seen.step_numbers) == (pytest.approx(math.sqrt(8 / 12)), 12)


def test_a_bound_above_the_claim_refutes_it():
    found = judged(release(shift=1.5), 1.0, 1e-5, 0.2)
    assert found.at_least > 1 and "more than the 1 claimed" in found.contradictions[0]


def test_a_run_without_a_step_has_nothing_to_say():
    none = replace(release(shift=0.0), numbers=0, step_numbers=0, scores=np.zeros(1000))
    found = judged(none, 0.0, 1e-5, 0.2)
    assert (found.noise, found.shift) == (None, None)
    assert len(found.words()) >= 2 and json.dumps(found.table())


def test_clients_together():
    both = pooled([release(m=300, noise=1.0), release(m=100, noise=3.0)])
    assert len(both.inside) == both.numbers == 400
    alone = [release(m=300, noise=1.0), release(m=100, noise=3.0)]
    assert both.noise**2 * 400 == pytest.approx(
        300 * alone[0].noise ** 2 + 100 * alone[1].noise ** 2
    )
