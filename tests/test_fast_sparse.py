import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedtorch import Client, Local, Recipe, Server
from fedtorch.fast.chunk_data import Rows
from fedtorch.fast.sparse import pays, sparse
from fedtorch.kernels.compile import available, loops

pytestmark = pytest.mark.skipif(not available(), reason="without numba no product leaves zeros out")


def few(*shape, share=0.2, dtype=torch.float32):
    draw = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=draw, dtype=dtype)
    return x * (torch.rand(shape, generator=draw) < share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [1, 5, 16, 63, 64, 65, 80, 81, 128, 200])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 95), (40, 200)])
def test_a_product_is_that_of_the_whole_matrix(shape, q, dtype):
    x, dense = few(*shape, dtype=dtype), few(shape[1], q, share=1.0, dtype=dtype)
    torch.testing.assert_close(sparse(x).times(dense), x @ dense, rtol=1e-5, atol=1e-5)
    back = few(shape[0], q, share=1.0, dtype=dtype)
    torch.testing.assert_close(sparse(x.T).times(back), x.T @ back, rtol=1e-5, atol=1e-5)


def test_a_matrix_of_zeros_and_one_without_any():
    dense = torch.ones(6, 3)
    assert torch.equal(sparse(torch.zeros(4, 6)).times(dense), torch.zeros(4, 3))
    assert torch.equal(sparse(torch.ones(4, 6)).times(dense), torch.full((4, 3), 6.0))


def test_a_transposed_matrix_is_taken_as_it_is():
    x, w = few(9, 50), few(20, 50, share=1.0)
    torch.testing.assert_close(sparse(x).times(w.T), x @ w.T)


@pytest.mark.parametrize("height", [1, 4])
def test_what_a_product_starts_from_is_left_alone(height):
    x, w, b = few(height, 50), few(50, 20, share=1.0), few(20, share=1.0)
    kept = b.clone()  # a single row of it is no copy by itself, and it is the server's bias
    torch.testing.assert_close(sparse(x).times(w, b), x @ w + b)
    assert torch.equal(b, kept)


def test_it_pays_where_enough_is_zero_and_numba_is_there(monkeypatch):
    assert pays(few(50, 100), 100) and not pays(few(50, 100, share=0.6), 100)
    assert not pays(few(50, 100), 40)  # most columns are 0 throughout, and left out anyhow
    assert not pays(few(50, 100).bfloat16(), 100)
    monkeypatch.setattr("fedtorch.fast.sparse.loops", lambda module: None)
    assert not pays(few(50, 100), 100)


def rows(x):
    return Rows(x, torch.zeros(len(x)), (len(x) // 2, len(x) - len(x) // 2))


def test_rows_are_sparse_only_where_they_are_finite():
    x = few(20, 90)
    assert rows(x).sparse is not None
    x[3, 4] = torch.inf
    assert rows(x).sparse is None


def test_rows_that_stay_out_may_hold_anything():
    stay = torch.arange(20) >= 10
    for share in (0.2, 0.9):
        x, D = few(20, 90, share=share), few(20, 11, share=1.0)
        D[:10], wanted = 0, D[10:].T @ x[10:]
        if share == 0.9:  # no product without zeros, where what is not finite would meet them
            x[3, 4] = torch.nan
        assert (rows(x).sparse is None) is (share == 0.9)
        torch.testing.assert_close(rows(x).back(D, False, stay), wanted)


def test_nan_and_a_negative_zero_are_seen_for_what_they_are():
    x = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, -2.0, 1e-45]])
    found = sparse(x)
    assert found.columns.tolist() == [2, 3, 4, 5] and found.values.tolist()[2:] == [-2.0, x[0, 5]]
    assert rows(torch.cat([x, x])).used.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("zeros", [0, 50])
def test_bits_do_not_depend_on_what_finds_room(zeros, numba, monkeypatch):
    # a run that is resumed, or another worker, has other chunks in its memory
    ends = []
    for room in (1 << 30, 0):
        monkeypatch.setattr("fedtorch.fast.chunk_data.ROOM", room)
        ends.append(trained(monkeypatch, loops if numba else lambda module: None, zeros))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def trained(monkeypatch, loops, zeros=0):
    asked = []
    for where in ("sparse", "ops"):
        name = f"fedtorch.fast.{where}.loops"
        monkeypatch.setattr(name, lambda module, where=where: asked.append(where) or loops(module))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(90, 90), nn.ReLU(), nn.Linear(90, 90), nn.Tanh(), nn.Linear(90, 4)
    )
    data = [
        TensorDataset(few(n, 90) * (torch.arange(90) >= zeros), torch.arange(n) % 4)
        for n in (24, 17, 12)
    ]
    clients = [Client(str(k), d) for k, d in enumerate(data)]
    recipe = Recipe(lr=0.1, batch_size=5, epochs=2)
    server = Server(model, clients, recipe, engine=Local(solver="fast"), seed=1)
    server.fit(3, progress=False)
    assert {"sparse", "ops"} <= set(asked)
    return server.model.state_dict()


def test_training_is_the_same_with_and_without_compiled_loops(monkeypatch):
    with monkeypatch.context() as patch:
        one = trained(patch, loops)
    other = trained(monkeypatch, lambda module: None)
    for name, v in one.items():
        torch.testing.assert_close(v, other[name], rtol=1e-5, atol=1e-6)
