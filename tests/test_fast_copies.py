import numpy as np
import pytest
import torch

from fedtorch.fast import copies, ops
from fedtorch.fast.layers import Leaf, Rule
from fedtorch.fast.schedule import Schedule
from fedtorch.fast.spec import Linear
from fedtorch.kernels.compile import available, loops

COUNTS = np.array([5, 0, 4, 1])
WIDTHS = (1, 7, 15, 16, 17, 40, 64)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch):
    """The loops are held to torch on processors too for which torch is as fast."""
    fast = loops(ops.TILES) if request.param == "compiled" else None
    monkeypatch.setattr(copies, "tiles", lambda like: fast)
    return fast


def drawn(*shape, dtype=torch.float32):
    """Numbers of which some blocks are zeros."""
    made = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=made, dtype=dtype)
    x[1:, :2, : shape[-1] // 2] = 0
    x[0] *= torch.rand(*shape[1:], generator=made, dtype=dtype) < 0.1
    return x


def held(q, p, dtype):
    """Weights and biases of four clients, each client's in one row among other parameters."""
    row = drawn(4, 1, q * p + q + 5, dtype=dtype)[:, 0]
    weight, bias = row[:, 3 : 3 + q * p].unflatten(1, (q, p)), row[:, 3 + q * p : 3 + q * p + q]
    return weight, bias[:, None]


def close(a, b):
    exact = a.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("p", WIDTHS)
def test_products_are_those_of_each_clients_own_weights(way, p, q, dtype):
    a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype)
    weight, bias = held(q, p, dtype)
    for some in (bias, None):
        made = copies.Products(weight, some, way if q >= copies.LEAST else None)
        z, back = made.outputs(a, COUNTS), made.inputs(d, COUNTS)
        masked = made.inputs(d, COUNTS, a)
        few = made.outputs(a[:2], COUNTS[:2]), made.inputs(d[:2], COUNTS[:2])  # two have stopped
        assert torch.equal(few[0], z[:2]) and torch.equal(few[1], back[:2])
        assert z.shape == d.shape and back.shape == a.shape
        assert bool(z.isfinite().all()) and bool(back.isfinite().all())
        for k, n in enumerate(COUNTS):
            close(z[k, :n], a[k, :n] @ weight[k].T + (0 if some is None else some[k]))
            close(back[k, :n], d[k, :n] @ weight[k])
            assert torch.equal(masked[k, :n], back[k, :n] * (a[k, :n] > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("biased", [True, False])
def test_a_narrow_layer_steps_as_a_library_would(way, keep, biased, dtype):
    spec = Linear("w", "b" if biased else None, (10, 40))
    d, a = drawn(4, 5, 10, dtype=dtype), drawn(4, 5, 40, dtype=dtype)
    real = torch.arange(5) < torch.from_numpy(COUNTS)[:, None]
    order = Schedule(*[torch.zeros(4, 5).long()] * 2, real[..., None] / 1, [4], 5, COUNTS[None])
    w, b = drawn(1, 10, 40, dtype=dtype)[0], drawn(1, 1, 10, dtype=dtype)[0]
    rule = Rule(0.1, decay=(1 - keep) / 0.1)
    made = copies.Own(
        spec, Leaf(w, 4, rule, None), Leaf(b, 4, rule, None) if biased else None, order, None
    )
    made.forward(a)
    made.step(d * real[..., None])
    for k, n in enumerate(COUNTS):
        found = made.stack()
        close(found["w"][k], keep * w - d[k, :n].T @ a[k, :n])
        if biased:
            close(found["b"][k], keep * b[0] - d[k, :n].sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("p", WIDTHS)
def test_sums_of_gradients_are_those_of_real_examples(p, q, dtype):
    a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype)
    for biased in (True, False):
        flat = torch.full((q * p + q + 2,), 7.0, dtype=dtype)
        weight, bias = flat[1 : 1 + q * p].view(q, p), flat[1 + q * p : 1 + q * p + q]
        write = copies.sums(d, a, COUNTS, weight, bias if biased else None)
        for k, n in enumerate(COUNTS):
            write(k)
            close(weight, d[k, :n].T @ a[k, :n])
            close(bias, d[k, :n].sum(0) if biased else torch.full((q,), 7.0, dtype=dtype))
            assert flat[0] == flat[-1] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("p", WIDTHS)
def test_norms_are_those_of_outer_products(p, q, dtype):
    a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype) * 1e-25
    norms = copies.sq_norms(d, a, COUNTS, 1.0)
    assert norms.dtype == torch.float64
    for k, n in enumerate(COUNTS):
        wide = torch.cat([a[k, :n], torch.ones(n, 1)], 1).double()
        outer = torch.einsum("no,ni->noi", d[k, :n].double(), wide)
        torch.testing.assert_close(norms[k, :n], outer.square().sum((1, 2)), rtol=1e-5, atol=0)


def test_what_is_not_a_number_is_no_zero(way):
    a, weight = torch.zeros(1, 2, 32), torch.ones(1, 16, 32)
    a[0, 1, 20], a[0, 0, 3] = float("nan"), float("inf")
    two = np.array([2])
    z = copies.Products(weight, None, way).outputs(a, two)
    assert bool(z[0, 1].isnan().all()) and bool((z[0, 0] == float("inf")).all())
    into = torch.empty(16, 32)
    copies.sums(torch.ones(1, 2, 16), a, two, into, None)(0)
    assert bool(into[:, 20].isnan().all()) and bool(into[:, 3].isinf().all())


def test_copies_of_a_transposed_weight_lie_row_by_row(way):
    a, d, start = drawn(4, 5, 32), drawn(4, 5, 16), drawn(1, 32, 16)[0].T
    weight = Leaf(start, 4, Rule(0.1), None).value
    made, all_ = copies.Products(weight, None, way), np.full(4, 5)
    close(made.outputs(a, all_), a @ start.T)
    close(made.inputs(d, all_), d @ start)


@pytest.mark.parametrize(
    ("counts", "out", "loop"),
    [([16, 16], 8, True), ([16, 17], 8, False), ([0, 32], 8, False), ([16, 16], 7, False)],
)
def test_many_rows_and_few_outputs_are_left_to_the_library(counts, out, loop, way):
    live, counts = [2 - (0 in counts)], np.array([counts])
    order = Schedule(*[torch.zeros(2, 32)] * 3, live, 32, counts)
    own = copies.Own(
        Linear("w", None, (out, 4)),
        Leaf(torch.zeros(out, 4), 2, Rule(0.1), None),
        None,
        order,
        None,
    )
    assert own.products.fast is (way if loop else None)


@pytest.mark.skipif(not available(), reason="without numba there are no loops")
@pytest.mark.parametrize("fits", [True, False])
def test_loops_are_for_processors_with_enough_registers_and_for_known_types(fits, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(loops(ops.TILES), "FITS", fits)
    assert (ops.tiles(torch.zeros(1)) is not None) == fits
    assert ops.tiles(torch.zeros(1, dtype=torch.bfloat16)) is None
    assert ops.tiles(torch.zeros(1, device="meta")) is None
    monkeypatch.setattr(ops, "loops", lambda module: None)
    assert ops.tiles(torch.zeros(1)) is None
