"""What the server sees under masks: a message that is noise, and the mean."""

import numpy as np
import pytest

from fedtorch.attacks.masks import masked
from fedtorch.secure.refused import Refused


def test_a_message_is_noise_and_the_mean_is_right():
    vectors = [np.random.default_rng(k).normal(size=2000) for k in range(3)]
    sent, mean = masked(vectors)
    assert np.abs(mean - np.mean(vectors, axis=0)).max() <= 2.0**-41
    for message, own in zip(sent, vectors, strict=True):
        # uniform over all 64 bits, 40 of them behind the point
        assert abs(message.std() / (2.0**24 / 12**0.5) - 1) < 0.1
        assert abs(np.corrcoef(message, own)[0, 1]) < 0.1
    assert not np.array_equal(masked(vectors)[0][0], sent[0])  # other keys each time


def test_of_two_each_would_know_the_others():
    with pytest.raises(Refused):
        masked([np.zeros(4)] * 2)
