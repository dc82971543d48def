"""Fixed point: exact sums, nothing that wraps, and what rides along."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtorch.secure.encode import (
    LOSS,
    RIDERS,
    Coding,
    Figures,
    Layout,
    from_words,
    seal,
    shortened,
    to_words,
    unseal,
)
from fedtorch.secure.refused import Refused


def test_the_steps_of_the_note():
    assert Coding.of(64, 255).scale == 2**40
    assert Coding.of(64, 256).scale == 2**39  # of one more the sum could wrap
    assert Coding.of(32, 100, 1.0).scale == 21_474_835  # floor((2^31 - 1)/100 - 1/2)
    assert Coding.of(32, 100, 2.0).scale == 10_737_417
    assert Coding.of(64, 10, 2.0**20).scale == 2**39


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([32, 64]), st.integers(1, 300), st.floats(1e-3, 1e4))
def test_so_many_of_the_largest_do_not_wrap(width, clients, bound):
    coding = Coding.of(width, clients, bound)
    top, none = coding.encode(np.array([bound, -bound, 3 * bound]))
    assert none == 1 and top[0] == top[2] == -top[1]
    assert clients * int(top[0]) < 2 ** (width - 1)
    words = to_words(np.array([-int(top[0]) * clients]), width)
    assert int(from_words(words)[0]) == -int(top[0]) * clients


def test_the_mean_is_off_by_a_half_step_at_most():
    rows = np.random.default_rng(0).uniform(-1, 1, (9, 200))
    for width, most in ((64, 2.0**-41), (32, 0.5 / Coding.of(32, 9, 1.0).scale)):
        coding = Coding.of(width, 9, None if width == 64 else 1.0)
        total = sum(seal(coding, row, Figures(1.0)) for row in rows)
        mean, figures = unseal(coding, total, 9)
        assert np.abs(mean - rows.mean(0)).max() <= most + 1e-16
        assert figures.weight == 9  # exactly: equal weights divide by a whole number


def test_numbers_are_rounded_to_even_and_wrap_as_two_complements():
    coding = Coding(32, 3, 8.0, 2)
    assert coding.encode(np.array([0.25, 0.75, -0.25, -0.75, 1.0]))[0].tolist() == [0, 2, 0, -2, 2]
    words = to_words(np.array([-1, 5, -(2**31)]), 32)
    assert words.tolist() == [2**32 - 1, 5, 2**31] and words.dtype == np.uint32
    assert to_words(np.array([-1]), 64).tolist() == [2**64 - 1]
    total = to_words(np.array([-3]), 32) + to_words(np.array([1]), 32)
    assert from_words(total).tolist() == [-2]


def test_weights_examples_and_losses_come_as_sums_alone():
    coding = Coding.of(64, 3)
    told = [Figures(0.5, 50, 2.0), Figures(1.0, 170, 1.0), Figures(0.25, 25, 4.0)]
    rows = np.array([[1.0, -1.0], [2.0, 0.5], [4.0, 8.0]])
    total = sum(seal(coding, row, f) for row, f in zip(rows, told, strict=True))
    mean, figures = unseal(coding, total, 3)
    assert mean == pytest.approx([(0.5 + 2 + 1) / 1.75, (-0.5 + 0.5 + 2) / 1.75], abs=1e-11)
    assert (figures.weight, figures.examples, figures.clamped) == (1.75, 245, 0)
    assert figures.loss == pytest.approx((1 + 1 + 1) / 1.75)


@pytest.mark.parametrize("width", [32, 64], ids=str)
def test_what_is_clamped_is_counted_and_what_is_not_finite_refused(width):
    coding = Coding.of(width, 4, 1.0)
    figures = [Figures(1.0, 1, float("inf")), Figures(1.0, 10.0**12, 1.0), Figures(1.0)]
    rows = np.array([[2.0, 0.1, -3.0], [0.0, 0.1, 0.2], [0.0, -1.0, 1.0]])
    mean, told = unseal(
        coding, sum(seal(coding, r, f) for r, f in zip(rows, figures, strict=True)), 3
    )
    # two numbers, one loss, and at width 32 more examples than there is room for
    assert told.clamped == (4 if width == 32 else 3)
    assert mean == pytest.approx([1 / 3, -0.8 / 3, 0.2 / 3], abs=1e-6)
    assert told.loss == pytest.approx((LOSS + 1) / 3, rel=1e-4)
    for bad in (np.array([np.nan]), np.array([np.inf])):
        with pytest.raises(Refused, match="not finite"):
            seal(coding, bad, Figures(1.0))
    for weight in (0.0, 1.5, float("nan"), -1.0):
        with pytest.raises(Refused, match="a weight of"):
            seal(coding, rows[0], Figures(weight))


def test_a_sum_that_so_many_cannot_have_is_refused():
    coding = Coding.of(64, 3)
    total = sum(seal(coding, np.ones(2), Figures(1.0)) for _ in range(3))
    assert unseal(coding, total, 3)[1].weight == 3
    masks = total.copy()
    masks[0] = 2**62
    weights = total.copy()
    weights[-len(RIDERS)] = 5 << 40
    nothing = total.copy()
    nothing[-len(RIDERS)] = 0
    for bad in (masks, weights, nothing):
        with pytest.raises(Refused, match="no 3 clients have such a sum"):
            unseal(coding, bad, 3)


def test_there_is_no_fixed_point_of_less_than_a_step():
    with pytest.raises(Refused, match="need more bits"):
        Coding.of(32, 100, 1e9)


def test_the_order_is_that_of_names_whatever_the_dictionaries():
    a = Layout.of({"delta": {"w": (2, 2), "b": (1,)}, "c": {"w": ()}}, {"mean": (2,)})
    b = Layout.of({"c": {"w": ()}, "delta": {"b": (1,), "w": (2, 2)}}, {"mean": (2,)})
    assert a == b and a.values == 8 and a.size == 8 + len(RIDERS)
    sent = {"delta": {"w": torch.arange(4.0).view(2, 2), "b": torch.tensor([9.0])}}
    sent["c"] = {"w": torch.tensor(7.0)}
    flat = a.flat(sent, {"mean": torch.tensor([5.0, 6.0])})
    back, changes = a.unflat(flat)
    assert torch.equal(back["delta"]["w"], sent["delta"]["w"].double())
    assert back["c"]["w"].shape == () and changes["mean"].tolist() == [5, 6]
    assert a.unflat(a.flat(sent, {}))[1]["mean"].tolist() == [0, 0]  # a buffer that did not move
    with pytest.raises(Refused, match="delta has no b"):
        a.flat({**sent, "delta": {"w": sent["delta"]["w"]}}, {})
    with pytest.raises(Refused, match="delta has no b of the shape"):
        a.flat({**sent, "delta": sent["delta"] | {"b": torch.zeros(2)}}, {})


def test_rounding_makes_no_update_longer_than_what_noise_is_made_for():
    coding = Coding.of(32, 10_000, 1.0)
    # each number just above half a step, so that rounding takes it up
    steps = round(coding.scale / 1000) // 2 * 2 - 1
    worst = np.full(10**6, (steps + 0.5) / coding.scale)
    norm = float(np.linalg.norm(worst))

    def sent(values):
        return float(np.linalg.norm(coding.encode(values)[0] / coding.scale))

    assert sent(worst) > 1.002 * norm
    short = shortened(coding, worst, norm)
    assert sent(short) <= norm and np.linalg.norm(short) > 0.997 * norm
    few = worst[:9]  # short enough as it is
    assert np.array_equal(shortened(coding, few, norm), few)
    # adaptive clipping's bit has noise of its own, and is not longer than a half either
    both = shortened(coding, np.append(worst, 0.5), norm, (slice(10**6, 10**6 + 1),))
    assert np.array_equal(both[:-1], short) and coding.encode(both)[0][-1] == coding.scale // 2
    assert coding.scale % 2
