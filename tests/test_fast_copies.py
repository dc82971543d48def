import numpy as np
import pytest
import torch

from fedtorch.fast import copies
from fedtorch.fast.chunk_data import Rows
from fedtorch.fast.layers import Leaf, Rule
from fedtorch.fast.reader import Linear
from fedtorch.fast.schedule import LockstepOrder
from loop_case import close, drawn

COUNTS = np.array([5, 0, 4, 1])


def order(counts):
    return LockstepOrder(*[torch.zeros(4, 5).long()] * 2, torch.ones(4, 5, 1), [4], 5, counts[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_is_each_clients_own(keep, biased, dtype):
    spec, rule = Linear("w", "b" if biased else None, (10, 40)), Rule(0.1, decay=(1 - keep) / 0.1)
    d, a = drawn(4, 5, 10, dtype=dtype), drawn(4, 5, 40, dtype=dtype)
    real = torch.arange(5) < torch.from_numpy(COUNTS)[:, None]
    w, b = drawn(1, 10, 40, dtype=dtype)[0], drawn(1, 1, 10, dtype=dtype)[0]
    bias = Leaf(b, 4, rule, None) if biased else None
    made = copies.Own(spec, Leaf(w, 4, rule, None), bias, order(COUNTS), None)
    made.weight.value.add_(drawn(4, 1, 1, dtype=dtype))
    before, extra = made.weight.value.clone(), b if biased else 0
    z, back = made.forward(a), made.backward(d)
    made.mask = "mask"
    masked = made.backward(d)
    made.step(d * real[..., None])
    for k, n in enumerate(COUNTS):
        found = made.stack()
        close(z[k], a[k] @ before[k].T + extra)
        close(back[k], d[k] @ before[k])
        assert torch.equal(masked[k], back[k] * (a[k] > 0))
        close(found["w"][k], keep * before[k] - d[k, :n].T @ a[k, :n])
        if biased:
            close(found["b"][k], keep * b[0] - d[k, :n].sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_norms_of_example_gradients_are_those_of_outer_products(first, biased, dtype):
    x, d = drawn(9, 31, dtype=dtype), drawn(2, 4, 10, dtype=dtype) * 1e-25
    index = torch.tensor([[0, 3, 8, 8], [1, 1, 4, 2]])
    rule, w, b = Rule(0.1), drawn(10, 31, dtype=dtype), drawn(1, 10, dtype=dtype)
    bias = Leaf(b, 2, rule, None) if biased else None
    spec = Linear("w", "b" if biased else None, (10, 31))
    rows = Rows([x], torch.zeros(9), (5, 4)) if first else None
    made = copies.Own(spec, Leaf(w, 2, rule, None), bias, order(np.array([4, 4])), rows)
    made.forward(index if first else x[index])
    norms, a = made.example_sq_norms(d), x[index].double()
    wide = torch.cat([a, torch.full((2, 4, 1), float(biased), dtype=torch.float64)], 2)
    outer = torch.einsum("kno,kni->knoi", d.double(), wide)
    torch.testing.assert_close(norms, outer.square().sum((2, 3)), rtol=1e-5, atol=0)


def test_copies_of_a_transposed_weight_lie_row_by_row():
    assert Leaf(drawn(32, 16).T, 4, Rule(0.1), None).value.is_contiguous()
