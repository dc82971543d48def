"""The article's noise is not private at its epsilon; ours is."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "article_noise.py"


@pytest.fixture
def article():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def test_the_toys_noise_is_uniform(article):
    x = article.toy(torch.zeros(100_000, dtype=torch.float64), 2.0)
    assert x.abs().max() <= 0.5
    assert x.var().item() == pytest.approx(1 / (3 * 2.0**2), rel=0.02)


def test_the_toy_is_named_for_certain_and_the_calibrated_is_not(article):
    assert article.attack_toy() > 5 * article.EPSILON
    assert article.attack_calibrated() <= article.EPSILON


def test_calibrated_noise_has_the_scale_of_twice_the_clip(article):
    x = article.calibrated(torch.zeros(20_000, 1, dtype=torch.float64), 0.5)
    assert x.abs().mean().item() == pytest.approx(2 / 0.5, rel=0.03)  # mean of |Laplace(b)| is b
