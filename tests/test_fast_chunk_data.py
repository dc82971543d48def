import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedtorch import Client, Local, Recipe, Server
from fedtorch.fast import chunk_data, dual
from fedtorch.fast.chunk_data import Rows
from fedtorch.fast.ops import Ops, ops_for
from fedtorch.kernels.compile import available

numba = pytest.mark.skipif(not available(), reason="without numba no product leaves zeros out")


def few(*shape, share=0.2):
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draw) * (torch.rand(shape, generator=draw) < share)


def rows(x):
    return Rows([x], torch.zeros(len(x)), (len(x) // 2, len(x) - len(x) // 2), ops_for(x))


@numba
def test_rows_are_sparse_where_enough_is_zero_and_all_is_finite():
    x = few(20, 90)
    assert rows(x).sparse is not None
    assert rows(few(20, 90, share=0.6)).sparse is None
    assert rows(x.bfloat16()).sparse is None
    assert Rows([x], x, (20,), Ops()).sparse is None
    narrow = few(50, 100, share=0.5) * (torch.arange(100) < 40)  # most columns are left out anyhow
    assert rows(narrow).sparse is None and len(rows(narrow).used) == 40
    x[3, 4] = torch.inf
    assert rows(x).sparse is None


def test_clients_that_meet_by_chance_are_multiplied_by_themselves_with_the_same_bits(monkeypatch):
    monkeypatch.setattr(chunk_data, "AGAIN", 3)
    sizes, kept, like = (130, 7, 1, 40), chunk_data.Kept(), torch.zeros(1)
    sets = [TensorDataset(few(n, 300) * (torch.arange(300) < 200), torch.zeros(n)) for n in sizes]
    a, b, c = (kept.rows(sets, like.device, ops_for(like)) for _ in range(3))
    assert len(a.parts) == len(b.parts) == 4 and c.often
    assert next(iter(kept.chunks.values()))[2] is c and a.finite and torch.equal(a.used, c.used)
    if available():
        w, bias, D = few(300, 77, share=1.0), few(77, share=1.0), few(178, 77, share=1.0)
        assert torch.equal(a.sparse[0].times(w, bias), c.sparse[0].times(w, bias))
        assert torch.equal(a.back(D, False), c.back(D, False))
    sets[1].tensors[0][2, 3] = torch.nan
    changed = kept.rows(sets, like.device, ops_for(like))
    assert not changed.finite and changed.sparse is None
    whole = chunk_data.Kept().rows(sets[:1], like.device, ops_for(like))
    assert not whole.parts, "one client's are one matrix as they are"


def test_columns_in_use_are_those_with_anything_but_zeros():
    x = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, -2.0, 1e-45]])
    assert rows(torch.cat([x, x])).used.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_rows_that_stay_out_may_hold_anything(share):
    stay = torch.arange(20) >= 10
    x, D = few(20, 90, share=share), few(20, 11, share=1.0)
    D[:10], wanted = 0, D[10:].T @ x[10:]
    if share == 0.9:  # no product without zeros, where what is not finite would meet them
        x[3, 4] = torch.nan
    assert (rows(x).sparse is None) is (share == 0.9 or not available())
    torch.testing.assert_close(rows(x).back(D, False, stay), wanted)


def test_weighed_rows_and_their_sum_leave_out_who_has_no_weight():
    D, weight = few(3, 4, 5, share=1.0), torch.tensor([0.5, 0.0, 2.0])
    wanted = D * -weight[:, None, None]
    D[1, 2] = torch.nan
    found, total = dual.weighed(D, weight)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(total, wanted.sum((0, 1)))


def trained(monkeypatch, loops, zeros=0):
    asked = []

    def chosen(like):
        asked.append(like)
        return ops_for(like) if loops else Ops()

    monkeypatch.setattr("fedtorch.fast.solver.ops_for", chosen)
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
    assert asked
    return server.model.state_dict()


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("zeros", [0, 50])
def test_bits_do_not_depend_on_what_finds_room(zeros, loops, monkeypatch):
    # a run that is resumed, or another worker, has other chunks in its memory
    ends = []
    for room in (1 << 30, 0):
        monkeypatch.setattr("fedtorch.fast.chunk_data.CHUNKS_KEPT", room)
        ends.append(trained(monkeypatch, loops, zeros))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@numba
def test_training_is_the_same_with_and_without_compiled_loops(monkeypatch):
    one, other = (trained(monkeypatch, loops) for loops in (True, False))
    for name, v in one.items():
        torch.testing.assert_close(v, other[name], rtol=1e-5, atol=1e-6)
