"""Numbers rounded to whole ones at random, so that masks and Skellam noise can take them."""

import math

import numpy as np

from fedtorch.privacy.noise.streams import Stream


def reach(norm: float, coordinates: int) -> float:
    """L2 norm at most of so many numbers of L2 norm ``norm`` when they are rounded at random.

    This, and not ``norm``, is what one client can change. A rounding is longer with a chance of exp(-1/2)
    at most, and then it is done again: theorem 1 of Kairouz, Liu and Steinke 2021 (arXiv:2102.06387), whose
    other bound, norm + sqrt(coordinates), is never below this one.
    """
    return math.sqrt(norm * norm + coordinates / 4 + norm + math.sqrt(coordinates) / 2)


def rounded(numbers: np.ndarray, most: float, coins: Stream) -> np.ndarray:
    """Each number to one of its two neighbours, so that it is the same on average: whole numbers, int64.

    Guarantee: their norm is at most ``most``; all are rounded again until it is.
    """
    below = np.floor(numbers)
    part = numbers - below
    while True:
        whole = below + (coins.uniform(len(part)).numpy() < part)
        if float(whole @ whole) <= most * most:
            found: np.ndarray = whole.astype(np.int64)
            return found
