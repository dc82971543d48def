import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedtorch import ConfigError
from fedtorch.data import Digits
from fedtorch.data.images import _digits, inputs


def test_digits_are_real_and_split_by_the_seed():
    a, b, c = (Digits().load(s) for s in (0, 0, 1))
    assert len(a.train) + len(a.test) == 1797
    assert a.facts["input_shape"] == (1, 8, 8)
    assert a.outputs == 10
    x, y = a.train.tensors
    assert float(x.min()) == 0.0
    assert float(x.max()) == 1.0
    assert sorted(y.unique().tolist()) == list(range(10))
    assert torch.equal(x, b.train.tensors[0])
    assert not torch.equal(x, c.train.tensors[0])


def test_digits_are_scikit_learns_whether_its_table_is_found_or_asked_for(monkeypatch):
    images, target = load_digits(return_X_y=True)
    found = _digits()
    assert np.array_equal(found[:, :-1], images)
    assert np.array_equal(found[:, -1], target)
    monkeypatch.setattr("fedtorch.data.images.find_spec", lambda name: None)
    assert np.array_equal(_digits(), found)


def test_numbers_are_divided_by_the_scale_that_is_given():
    for scale in (1.0, 2.0, 255.0):
        x, done = inputs("t", np.array([[4, 2], [0, 255]], np.uint8), scale, None)
        assert done.scale == scale
        assert torch.equal(x, torch.tensor([[4.0, 2.0], [0.0, 255.0]]) / scale)


def test_no_test_at_all_can_be_asked_for():
    data = Digits(test_fraction=0).load(0)
    assert (len(data.train), len(data.test)) == (1797, 0)


def test_fractions_that_leave_nothing_are_refused():
    for share in (1.0, float("nan"), -0.1):
        with pytest.raises(ConfigError, match="test_fraction"):
            Digits(test_fraction=share).load(0)
