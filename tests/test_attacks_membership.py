"""Membership attacks hold to known answers: normal scores, ranks by hand, models that remember or not."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedtorch.attacks.membership import (
    MembershipAttack,
    Rates,
    beaten,
    confidence,
    halves,
    infer,
    likelihood_ratio,
)
from fedtorch.types import ConfigError


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_of_normal_scores_lira_finds_what_the_best_test_finds(shift):
    draw, models, n = np.random.default_rng(0), 150, 2000
    inside = halves(n, models, 1)
    # each example has a mean of its own, which no threshold for all of them knows
    phi = 10 * draw.normal(size=n) + draw.normal(size=(models, n)) + shift * inside
    targets = [likelihood_ratio(phi[k], phi[9:], inside[9:]) for k in range(9)]
    found = Rates.of(np.concatenate(targets), inside[:9].ravel())
    normal = NormalDist()
    expected = normal.cdf(shift - normal.inv_cdf(0.99))  # the test of Neyman and Pearson
    assert found.found() == pytest.approx(expected, abs=0.025)
    assert found.auc == pytest.approx(normal.cdf(shift / 2**0.5), abs=0.015)
    assert found.balanced == pytest.approx(normal.cdf(shift / 2), abs=0.015)
    loss = Rates.of(phi[:9].ravel(), inside[:9].ravel())
    assert loss.found() < 0.05


def test_a_likelihood_ratio_is_that_of_the_normal_densities():
    shadows = np.array([[1.0], [3.0], [10.0], [16.0]])
    inside = np.array([[False], [False], [True], [True]])
    out, member = NormalDist(2, 2**0.5), NormalDist(13, 18**0.5)
    for at in (2.0, 7.0, 12.0):
        (ratio,) = likelihood_ratio(np.array([at]), shadows, inside)
        assert ratio == pytest.approx(np.log(member.pdf(at) / out.pdf(at)))


def test_rates_are_counted_and_equal_scores_stay_together():
    rates = Rates.of(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
    assert rates.false.tolist() == [0, 0, 0.5, 1] and rates.true.tolist() == [0, 0.5, 1, 1]
    assert rates.found() == 0.5 and rates.found(0.5) == 1.0
    assert rates.auc == pytest.approx((0.5 + 1 + 1 + 1) / 4 + 0.0)  # pairs in order, a tie a half
    assert rates.balanced == 0.75
    same = Rates.of(np.ones(6), np.arange(6) < 3)
    assert same.found() == 0 and same.auc == 0.5


def test_rmia_compares_with_examples_of_nobodys():
    sure = np.log(np.array([0.8, 0.2]) / (1 - np.array([0.8, 0.2])))
    shadows = np.zeros((2, 2))  # probability a half: ratios 1.6 and 0.4
    population = np.log(np.array([0.1, 0.25, 0.5, 0.9]) / (1 - np.array([0.1, 0.25, 0.5, 0.9])))
    share = beaten(sure, shadows, population, np.zeros((2, 4)))  # ratios .2, .5, 1, 1.8
    assert share.tolist() == [0.75, 0.25]


def test_confidence_is_the_logit_of_the_right_class():
    x, y = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.0, 0.0]]), torch.tensor([2, 1])
    p = x.double().softmax(1)[[0, 1], y]
    found = confidence(nn.Identity(), TensorDataset(x, y), "classification")
    assert found == pytest.approx((p / (1 - p)).log().numpy())
    one, two = torch.tensor([[0.7], [0.7]]), torch.tensor([[1.0], [0.0]])
    assert confidence(nn.Identity(), TensorDataset(one, two), "binary") == pytest.approx(
        [0.7, -0.7]
    )
    with pytest.raises(ConfigError, match="data are for regression"):
        confidence(nn.Identity(), TensorDataset(one, two), "regression")


class Unsure(nn.Module):
    """Right about all, with a probability of four in ten."""

    def forward(self, x):
        return torch.tensor([0.4, 0.3, 0.3]).log().expand(len(x), 3)


def test_who_is_right_is_who_finds_the_class_likeliest_and_need_not_be_sure():
    found = infer(
        lambda inside, seed: (Unsure() for _ in inside),
        numbered(0, 100),
        numbered(100, 100),
        "classification",
        MembershipAttack(shadows=4),
    )
    assert found.train == found.test == 1.0


def test_each_shadow_has_half_of_the_examples():
    inside = halves(101, 17, 0)
    assert (inside.sum(1) == 50).all() and inside.sum(0).min() >= 2 and inside.sum(0).max() <= 15
    assert not np.array_equal(inside, halves(101, 17, 1))


class Remembers(nn.Module):
    """Sure of the examples that it has seen, by their number, beside a noise of its own."""

    def __init__(self, inside, seed, by):
        super().__init__()
        draw = torch.Generator().manual_seed(seed % 2**31)
        self.noise = torch.randn(2000, generator=draw)
        self.noise[: len(inside)] += by * torch.from_numpy(inside)

    def forward(self, x):
        own = self.noise[x[:, 0].long()]
        return torch.stack([own, torch.zeros_like(own)], 1)


def numbered(start, n):
    return TensorDataset(
        torch.arange(start, start + n)[:, None].float(), torch.zeros(n, dtype=torch.int64)
    )


@pytest.mark.parametrize("by, low, high", [(0.0, 0.0, 0.03), (8.0, 0.99, 1.0)])
def test_a_model_that_remembers_is_found_out_and_another_not(by, low, high):
    done = []
    found = infer(
        lambda inside, seed: (Remembers(row, k, by) for k, row in enumerate(inside)),
        numbered(0, 1000),
        numbered(1000, 1000),
        "classification",
        MembershipAttack(shadows=8),
        own=Remembers(np.full(1000, True), 99, by),
        told=done.append,
    )
    assert done == [*range(1, 10)]
    assert low <= found.rates["LiRA"].found() <= high
    assert low <= found.own["LiRA"].found() <= max(high, 0.04)
    if by:
        assert found.train == pytest.approx(1.0) and found.test == pytest.approx(0.5, abs=0.1)
    assert found.table()["attacks"]["LiRA"]["tpr_at_1_percent_fpr"] <= 1


def test_too_few_examples_are_one_sentence():
    with pytest.raises(ConfigError, match="too few"):
        infer(lambda inside, seed: [], numbered(0, 8), numbered(8, 8), "classification")
    with pytest.raises(ConfigError, match=r"attack\.shadows"):
        MembershipAttack(shadows=1)
