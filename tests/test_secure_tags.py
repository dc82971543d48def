"""Tags of encrypted sums: they add up, and any other sum has others."""

import numpy as np
import pytest

from fedtorch.secure.tags import TAGS, Tags

NAMES, MOST = ["a", "b", "c"], 85.0
ABOUT = {"round": 1, "task": "00"}


def sums(names=NAMES, about=ABOUT, size=3000):
    rng = np.random.default_rng(1)
    tags = Tags(b"key", about, MOST)
    rows = [rng.uniform(-MOST, MOST, size) for _ in names]
    own = [tags.of(n, r) for n, r in zip(names, rows, strict=True)]
    # what decryption errs by
    return sum(rows) + rng.normal(0, 1e-10, size), sum(own) + rng.normal(0, 1e-10, TAGS), own, rows


def test_the_sum_of_all_fits_and_is_as_small_as_a_number_may_be():
    values, tags, own, _ = sums()
    assert max(np.abs(t).max() for t in own) <= MOST
    assert Tags(b"key", ABOUT, MOST).fit(NAMES, values, tags)
    assert Tags(b"key", ABOUT, MOST).fit(NAMES[::-1], values, tags)
    assert Tags(b"key", ABOUT, MOST).fit(NAMES, values + np.eye(3000)[7] * 1e-8, tags)


@pytest.mark.parametrize("changed", ["number", "name", "fewer", "about", "key", "tag", "most"])
def test_another_sum_does_not_fit(changed):
    values, tags, own, rows = sums()
    key, about, names, most = b"key", ABOUT, NAMES, MOST
    if changed == "number":
        values = values + np.eye(3000)[7] * 0.01
    elif changed == "name":
        names = ["a", "b", "d"]
    elif changed == "fewer":
        values, tags = rows[0] + rows[1], own[0] + own[1]
    elif changed == "about":
        about = ABOUT | {"task": "01"}
    elif changed == "key":
        key = b"kez"
    elif changed == "tag":
        tags = tags + np.eye(TAGS)[0] * 0.01
    else:
        most = MOST + 1
    assert not Tags(key, about, most).fit(names, values, tags)


def test_a_client_s_own_number_hides_its_combination():
    tags = Tags(b"key", ABOUT, MOST)
    found = np.array([tags.of(f"site {k}", np.ones(5)) for k in range(2000)]) / MOST
    counts, _ = np.histogram(found, 16, (-1, 1))
    expected = found.size / 16
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 45  # chi-square, 15 degrees: 1e-4 beyond 44.3
