"""What parts of a user's own are called: two that differ have two names, in any process."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedtorch.run.called import LONGEST, called, lax


class Focal:
    """A loss with an option, and a count that is none."""

    def __init__(self, gamma=2.0, weight=None):
        self.gamma, self.weight, self.seen = gamma, weight, 0

    def __call__(self, output, target):
        self.seen += 1
        return output


def focal(gamma):
    def loss(output, target, shift=0.0):
        return output * gamma + shift

    return loss


def counting():
    count = 0

    def loss(output, target):
        nonlocal count
        count += 1
        return output

    return loss


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            partial(F.cross_entropy, label_smoothing=0.1),
            partial(F.cross_entropy, label_smoothing=0),
        ),
        (partial(focal, 1), partial(focal, 2)),
        (partial(focal, "x" * 500), partial(focal, "x" * 501)),
        (lambda o, y: o, lambda o, y: o * 2),
        (focal(1.0), focal(2.0)),
        (Focal(1.0), Focal(2.0)),
        (Focal(1.0).__call__, Focal(2.0).__call__),
        (Focal(weight=torch.ones(3)), Focal(weight=torch.zeros(3))),
        (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(torch.zeros(3))),
        (nn.SmoothL1Loss(beta=2.0), nn.SmoothL1Loss(beta=3.0)),
        (partial(focal, {"a": [1, np.float32(2)]}), partial(focal, {"a": [1, np.float32(3)]})),
    ],
)
def test_two_parts_that_differ_have_two_names(one, other):
    assert called(one) != called(other)
    assert max(len(called(one)), len(called(other))) <= LONGEST


def test_a_name_stays_while_a_part_is_used():
    for part in (Focal(3.0), counting()):
        before = called(part)
        part(1, 2)
        assert called(part) == before
    assert (
        called(Focal(3.0)) == "Focal(gamma=3.0)" and called(focal(1)) == "loss(shift=0.0, gamma=1)"
    )
    assert called(F.cross_entropy) == "cross_entropy" and called(torch.optim.Adam) == "Adam"
    itself = Focal()
    itself.weight = itself
    assert called(itself) == "Focal(weight=Focal)"
    assert called(partial(focal, [0] * 20_000)) == "focal(list of 20000)"


@pytest.mark.parametrize(
    "held", [set, frozenset, lambda v: Focal(set(v)), lambda v: [SimpleNamespace(of=set(v))]]
)
def test_a_set_has_one_name_in_whatever_order_a_process_has_it(held):
    assert list({0, 8}) != list({8, 0})
    one, other, third = (called(partial(focal, held(v))) for v in ([0, 8], [8, 0], [0, 9]))
    assert one == other != third


def test_what_torch_wraps_is_called_as_what_is_inside():
    assert called(torch.no_grad()(focal(1.0))) == called(focal(1.0)) != called(focal(2.0))


def test_a_lambda_is_known_by_its_code_and_in_another_release_by_nothing():
    same = [called(eval("lambda o, y: o + 1", of)) for of in ({}, {"__name__": "mine"})]
    assert same[0] == same[1] and same[0].startswith("<lambda> ")
    assert lax(same[0]) == lax(called(eval("lambda o, y: o - 1"))) == "<lambda>"
