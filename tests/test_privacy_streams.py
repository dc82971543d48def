"""Noise streams: never shared, of the law they claim."""

import itertools

import pytest
import torch
from scipy import stats

from fedtorch.privacy.streams import SystemStream, generator, stream


@pytest.mark.parametrize("rng", ["torch", "os"])
def test_normals_are_normal_and_uncorrelated(rng):
    x = stream(rng, None, "noise").normal((200, 101)).double()
    assert x.shape == (200, 101)
    assert abs(x.std().item() - 1) < 0.02
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-4
    between = torch.corrcoef(x.T) - torch.eye(101)
    assert between.abs().max() < 0.4  # 5,050 pairs of 200 draws: sd 0.07


@pytest.mark.parametrize("rng", ["torch", "os"])
def test_uniforms_fill_the_unit_interval(rng):
    u = stream(rng, None, "coins").uniform(20_000)
    assert u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


def test_system_streams_ignore_torchs_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(stream("torch", None, "noise", 0, "c").normal((8,)))
    assert not torch.equal(*draws)


def test_purposes_rounds_and_clients_have_streams_of_their_own():
    names = list(itertools.product(("noise", "batches"), range(20), ("a", "b", "ab")))
    first = {tuple(stream("torch", 7, *n).normal((4,)).tolist()) for n in names}
    assert len(first) == len(names)


def test_an_insecure_seed_repeats():
    a, b = (stream("torch", 7, "noise", 3, "a").normal((100,)) for _ in range(2))
    assert torch.equal(a, b)


def test_seeds_that_torch_cannot_tell_apart_are_told_apart():
    # torch keeps 32 bits of a seed: the trap this module exists for
    low, high = (torch.Generator().manual_seed(s) for s in (5, 5 + 2**32))
    assert torch.equal(torch.randn(8, generator=low), torch.randn(8, generator=high))
    a, b = (stream("torch", s, "noise").normal((8,)) for s in (5, 5 + 2**32))
    assert not torch.equal(a, b)


def test_every_word_of_the_state_counts():
    zero = bytearray(4 * 624)
    zero[0] = 1
    first = torch.rand(700, generator=generator(bytes(zero)))
    for word in (1, 300, 623):
        other = bytearray(zero)
        other[4 * word + 1] = 1
        assert not torch.equal(first, torch.rand(700, generator=generator(bytes(other))))


def test_system_normals_use_odd_shapes():
    assert SystemStream().normal((3, 1, 5)).shape == (3, 1, 5)
    assert SystemStream().normal(()).shape == ()
