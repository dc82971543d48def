"""Masks: of the full width, of many keys at once, and gone where they cancel."""

import numpy as np
import pytest

from fedtorch.secure import streams


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("size", [1, 2, 7, 16_384, 16_385, 40_001])
def test_many_streams_are_each_alone_and_cancel(dtype, size):
    keys = [bytes([k]) * 32 for k in range(3)]
    both = np.arange(size).astype(dtype)
    streams.add(both, [(keys[0], 1), (keys[1], 1), (keys[2], -1)])
    alone = np.arange(size).astype(dtype)
    for key, sign in zip(keys, (1, 1, -1), strict=True):
        streams.add(alone, [(key, sign)])
    assert np.array_equal(both, alone)
    streams.add(both, [(keys[2], 1), (keys[0], -1), (keys[1], -1)])
    assert np.array_equal(both, np.arange(size).astype(dtype))


def test_a_stream_is_aes_in_counter_mode_from_its_first_word():
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes(range(32))
    counter = bytes(12) + (2).to_bytes(4)  # GCM keeps the first for its tag
    own = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(400_000))
    total = np.zeros(100_000, np.uint32)
    streams.add(total, [(key, 1)])
    assert np.array_equal(total, np.frombuffer(own, "<u4"))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_masks_have_the_full_width_and_no_favourites(dtype):
    total = np.zeros(1 << 15, dtype)
    streams.add(total, [(b"k" * 32, 1)])
    counts = np.bincount(total.view(np.uint8), minlength=256)
    expected = total.nbytes / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert 170 < chi < 350  # 255 degrees of freedom: 1e-5 on either side
