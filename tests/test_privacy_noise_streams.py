"""Noise streams: never shared, of the law they claim."""

import itertools

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scipy import stats

from fedtorch.privacy.noise.keystream import Scratch, keystream
from fedtorch.privacy.noise.streams import BLOCK, stream


@pytest.mark.parametrize("rng", ["aes", "os"])
def test_normals_are_normal_and_uncorrelated(rng):
    x = stream(rng, None, "noise").normal((200, 101)).double()
    assert x.shape == (200, 101)
    assert abs(x.std().item() - 1) < 0.02
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-4
    between = torch.corrcoef(x.T) - torch.eye(101)
    assert between.abs().max() < 0.4  # 5,050 pairs of 200 draws: sd 0.07


@pytest.mark.parametrize("rng", ["aes", "os"])
def test_uniforms_fill_the_unit_interval(rng):
    u = stream(rng, None, "coins").uniform(20_000)
    assert u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


def test_system_streams_ignore_torchs_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(stream("aes", None, "noise", 0, "c").normal((8,)))
    assert not torch.equal(*draws)


def test_purposes_rounds_and_clients_have_streams_of_their_own():
    names = list(itertools.product(("noise", "batches"), range(20), ("a", "b", "ab")))
    first = {tuple(stream("aes", 7, *n).normal((4,)).tolist()) for n in names}
    assert len(first) == len(names)


def test_an_insecure_seed_repeats():
    a, b = (stream("aes", 7, "noise", 3, "a").normal((100,)) for _ in range(2))
    assert torch.equal(a, b)


def test_seeds_that_torch_cannot_tell_apart_are_told_apart():
    # torch keeps 32 bits of a seed: the trap this module exists for
    low, high = (torch.Generator().manual_seed(s) for s in (5, 5 + 2**32))
    assert torch.equal(torch.randn(8, generator=low), torch.randn(8, generator=high))
    a, b = (stream("aes", s, "noise").normal((8,)) for s in (5, 5 + 2**32))
    assert not torch.equal(a, b)


@pytest.fixture(params=[True, False], ids=["wide", "narrow"])
def cipher(request, monkeypatch):
    """Both ways to the same words, whichever the processor likes better."""
    monkeypatch.setattr("fedtorch.privacy.noise.keystream.wide_cipher", lambda: request.param)


def test_the_cipher_is_aes_256_in_counter_mode(cipher):
    # known answer: test case 14 of the GCM specification (McGrew & Viega 2005), zeros under a zero key
    words = keystream(bytes(32))(2, Scratch())
    assert words.tobytes().hex() == "cea7403d4d606b6e074ec5d3baf39d18"


def test_a_new_nonce_begins_before_the_counter_ends(cipher, monkeypatch):
    monkeypatch.setattr("fedtorch.privacy.noise.keystream.LIMIT", 64)
    words, scratch = keystream(bytes(32)), Scratch()
    drawn = np.concatenate([words(n, scratch).copy() for n in (6, 2, 5, 8, 1)])
    assert len(np.unique(drawn)) == len(drawn)
    # in the second nonce too, by its own counter
    zeros = AESGCM(bytes(32)).encrypt((1).to_bytes(12), bytes(40), None)[:40]
    assert drawn[8:13].tobytes() == zeros
    monkeypatch.setattr("fedtorch.privacy.noise.keystream.LIMIT", 1 << 35)
    whole = keystream(bytes(32))(10, Scratch())
    assert np.array_equal(drawn[:8], whole[:8])
    # ten words are beyond it, so the last four of them come from the next nonce
    monkeypatch.setattr("fedtorch.privacy.noise.keystream.LIMIT", 64)
    words = keystream(bytes(32))
    assert np.array_equal(words(6, scratch), whole[:6])
    assert np.array_equal(words(4, scratch), drawn[8:12])


def test_words_go_on_where_they_stopped_and_every_bit_of_the_key_counts():
    whole, pieces = keystream(bytes(32))(6, Scratch()), keystream(bytes(32))
    assert np.array_equal(whole, np.concatenate([pieces(2, Scratch()), pieces(4, Scratch())]))
    for byte in (0, 13, 31):
        key = bytearray(32)
        key[byte] = 1
        assert not np.array_equal(whole, keystream(bytes(key))(6, Scratch()))


def test_blocks_do_not_overlap():
    x = stream("aes", None, "noise").normal((5 * BLOCK + 3,))
    assert len(x.unique()) == len(x)


@pytest.mark.parametrize("rng", ["aes", "os"])
def test_noise_on_a_row_is_the_same_noise_rounded_once(rng, monkeypatch):
    monkeypatch.setattr("os.urandom", lambda n: bytes(range(256)) * (n // 256) + bytes(n % 256))
    exact = torch.linspace(-1, 1, 2 * BLOCK + 7)
    row = exact.clone()
    stream(rng, None, "noise").add(row, 0.25, Scratch())
    noise = stream(rng, None, "noise").normal((len(row),))
    assert torch.equal(row, (exact + 0.25 * noise).float())


@pytest.mark.parametrize("rng", ["aes", "os"])
def test_a_row_of_many_blocks_is_noised_to_its_end(rng, monkeypatch):
    monkeypatch.setattr("fedtorch.privacy.noise.streams.BLOCK", 8)
    row = torch.zeros(1501)
    stream(rng, None, "noise").add(row, 1.0, Scratch())
    assert len(row.unique()) == len(row)
    assert stats.kstest(row.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("rng", ["aes", "os"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_noised_where_it_lies(rng, dtype):
    table = torch.zeros(7, 5, dtype=dtype)
    stream(rng, None, "noise").add(table[:, 2], 1.0, Scratch())  # not contiguous
    stream(rng, None, "noise").add(table[3, 3:], 1.0, Scratch())
    noised = table != 0
    assert noised[:, 2].all() and noised[3, 3:].all()
    assert noised.sum() == 9


@pytest.mark.parametrize("rng", ["aes", "os"])
def test_a_row_is_noised_and_added_in_one_pass_where_that_is_offered(rng, monkeypatch):
    monkeypatch.setattr("os.urandom", lambda n: bytes(range(256)) * (n // 256) + bytes(n % 256))
    rows, weights = torch.linspace(-1, 1, BLOCK + 7).repeat(2, 1), torch.full((3, BLOCK + 7), 0.3)
    stream(rng, None, "noise").add(rows[0], 0.25, Scratch())
    took = stream(rng, None, "noise").add(rows[1], 0.25, Scratch(), (weights[1], -0.01))
    assert took is (rng == "aes")  # four draws are summed first
    alone = torch.equal(rows[1], rows[0]) and bool((weights[1] == 0.3).all())
    assert alone is (rng == "os")
    moved = torch.full((BLOCK + 7,), 0.3).add_(rows[0], alpha=-0.01)
    torch.testing.assert_close(
        weights[1], moved if took else torch.full_like(moved, 0.3), rtol=2e-7, atol=0
    )
    assert (weights[::2] == 0.3).all()


def test_odd_and_empty_shapes():
    for rng in ("aes", "os"):
        assert stream(rng, None, "x").normal((3, 1, 5)).shape == (3, 1, 5)
        assert stream(rng, None, "x").normal(()).shape == ()
        assert stream(rng, None, "x").normal((0, 4)).shape == (0, 4)
