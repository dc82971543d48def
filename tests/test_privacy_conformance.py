"""The kit for other builds: a plain DP-SGD passes, each of its bugs is named, and Opacus's are found."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fedtorch.privacy.conformance import CHECKS, Claim, broken
from fedtorch.types import ConfigError

EXAMPLES = Path(__file__).parents[1] / "examples"
CLAIM = Claim(clip=0.5, noise=1.0, divisor=4.0)
DATA = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)), torch.arange(8.0) - 4


def released(
    data,
    seed,
    noise=1.0,
    weigh=None,
    divisor=None,
    fixed=False,
    careful=True,
):
    """One step of DP-SGD on least squares, from weights of zero: examples' gradients are -y x."""
    x, y = data
    grads = -y[:, None] * x.double()
    norms = grads.norm(dim=1)
    factors = (CLAIM.clip / norms).clamp(max=1)
    if careful:
        good = norms.isfinite()
        grads, factors = torch.where(good[:, None], grads, 0), torch.where(good, factors, 0)
    if weigh:
        factors = weigh(factors)
    total = (factors[:, None] * grads).sum(0)
    draw = torch.Generator().manual_seed(0 if fixed else seed)
    std = noise * CLAIM.noise * CLAIM.clip
    total = total + std * torch.randn(30, dtype=torch.float64, generator=draw)
    return -total / (divisor(len(x)) if divisor else CLAIM.divisor)


BUGS = {
    "noise_has_the_claimed_size": {"noise": 0.3},
    "noise_is_fresh": {"fixed": True},
    "one_example_moves_the_sum_by_the_clip": {"weigh": lambda f: 2 * f},
    "the_divisor_is_public": {"divisor": lambda n: n},
    "a_broken_example_is_not_seen": {"careful": False},
    "any_number_of_examples_will_do": {"divisor": lambda n: 4.0 if n != 49 else 0.0},
}


def test_a_plain_build_passes():
    assert broken(released, CLAIM, DATA) == []


def test_a_check_has_a_bug():
    assert [c.__name__ for c in CHECKS] == [*BUGS]


@pytest.mark.parametrize("claim", BUGS)
def test_a_bug_is_named(claim):
    found = broken(lambda data, seed: released(data, seed, **BUGS[claim]), CLAIM, DATA)
    assert claim in [b.claim for b in found]


def test_a_release_that_raises_breaks_what_was_tried():
    def choosy(data, seed):
        if len(data[0]) > 8:
            raise RuntimeError("too many")
        return released(data, seed)

    found = {b.claim: b.why for b in broken(choosy, CLAIM, DATA)}
    assert found["the_divisor_is_public"] == "it raises RuntimeError: too many"


def test_without_repeatable_noise_nothing_can_be_compared():
    with pytest.raises(ConfigError, match="must give the same update for the same data and seed"):
        broken(lambda data, seed: torch.randn(9), CLAIM, DATA)


@pytest.mark.parametrize("option", ["clip", "divisor", "lr", "steps"])
def test_what_nobody_can_claim(option):
    with pytest.raises(ConfigError, match=f"claim.{option}"):
        Claim(**{"clip": 1.0, "noise": 1.0, "divisor": 8.0, option: 0})


def test_known_faults_of_opacus_are_found(capsys):
    place = importlib.util.spec_from_file_location("kit", EXAMPLES / "conformance_opacus.py")
    kit = importlib.util.module_from_spec(place)
    place.loader.exec_module(kit)
    found = {claim for claim, _ in kit.main()}
    assert {"a_broken_example_is_not_seen", "any_number_of_examples_will_do"} <= found
    assert "the_divisor_is_public" in found
    assert "49 examples make it NaN" in capsys.readouterr().out
