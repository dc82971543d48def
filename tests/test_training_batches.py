from dataclasses import dataclass, replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset, TensorDataset

from fedtorch.training.batches import (
    alike,
    batch_order,
    batch_orders,
    batches,
    fetch,
    in_parts,
    least,
    side_by_side,
    steps_of,
)


@dataclass(frozen=True)
class Order:
    epochs: int = 1
    steps: int | None = None
    batch_size: int | None = 4
    drop_last: bool = False
    accumulate: int = 1


@given(st.integers(1, 50), st.integers(1, 3), st.integers(1, 60), st.integers(0, 2**31))
def test_each_epoch_sees_every_example_once(n, epochs, batch, seed):
    rows = batch_order(n, Order(epochs, batch_size=batch), seed)
    per_epoch = -(-n // min(batch, n))
    assert len(rows) == epochs * per_epoch
    for e in range(epochs):
        seen = rows[e * per_epoch : (e + 1) * per_epoch].flatten()
        assert sorted(seen[seen >= 0].tolist()) == list(range(n))


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**31))
def test_drop_last_never_pads(n, batch, seed):
    rows = batch_order(n, Order(batch_size=batch, drop_last=True), seed)
    assert (rows >= 0).all()
    assert rows.shape[1] == min(batch, n)


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_accumulated_batches_are_those_of_a_pass_in_order(n, batch, many, drop_last, seed):
    one = Order(batch_size=batch, drop_last=drop_last)
    plain = [r[r >= 0].tolist() for r in batch_order(n, one, seed)]
    plan = batch_order(n, replace(one, accumulate=many, epochs=2), seed)
    data = TensorDataset(torch.arange(n), torch.arange(n))
    found = [[(b[0].tolist(), s) for b, s in step] for step in in_parts(data, plan, batch)]
    assert len(plan) == len(found) == steps_of(n, replace(one, accumulate=many, epochs=2))
    groups = [plain[k : k + many] for k in range(0, len(plain), many)]
    assert [[b for b, _ in step] for step in found[: len(groups)]] == groups
    for step in found:
        shares = [s for _, s in step]
        assert abs(sum(shares) - 1) < 1e-9
        assert all(abs(s - len(b) / sum(len(c) for c, _ in step)) < 1e-9 for b, s in step)


def test_steps_take_the_place_of_epochs():
    assert len(batch_order(10, Order(epochs=1, steps=7), 0)) == 7
    assert len(batch_order(10, Order(epochs=100, steps=2), 0)) == 2


def test_order_follows_the_seed():
    a, b, c = (batch_order(30, Order(), s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_several_clients_draw_what_each_draws_alone():
    order, sizes, seeds = Order(epochs=2, batch_size=4), [9, 3, 9], [5, 6, 7]
    found = batch_orders(sizes, order, seeds)
    alone = [batch_order(n, order, s) for n, s in zip(sizes, seeds, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert not torch.equal(found[0], found[2])


def test_full_batch_is_every_example_in_order():
    assert batch_order(5, Order(epochs=2, batch_size=None), 0).tolist() == [[0, 1, 2, 3, 4]] * 2


class Squares(Dataset):
    def __init__(self, n: int, start: int = 0) -> None:
        self.n, self.start = n, start

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(self.start + i)]), (self.start + i) ** 2


def test_fetch_collates_any_dataset_as_a_loader_would():
    x, y = fetch(Squares(5), torch.tensor([3, 1]))
    assert x.tolist() == [[3.0], [1.0]]
    assert y.tolist() == [9, 1]


def test_side_by_side_masks_what_a_client_does_not_have():
    datasets = [Squares(5), Squares(2, start=100)]
    tables = [TensorDataset(*fetch(d, torch.arange(len(d)))) for d in datasets]
    plans = [batch_order(len(d), Order(epochs=2, batch_size=3), k) for k, d in enumerate(datasets)]
    for these in (datasets, tables):
        seen = [[], []]
        for (x, y), mask in side_by_side(these, plans):
            assert x.shape[:2] == y.shape == mask.shape == (2, 3)
            for k in range(2):
                seen[k] += y[k][mask[k]].tolist()
                # what stands in for a missing example is the client's own
                assert (x[k] >= 100).all() == (k == 1)
        assert sorted(seen[0]) == sorted([0, 1, 4, 9, 16] * 2)
        assert sorted(seen[1]) == sorted([100**2, 101**2] * 2)


def test_clients_alike_are_never_filled_up():
    data = [TensorDataset(torch.arange(5.0) + 10 * k, torch.arange(5)) for k in range(2)]
    plans = [batch_order(5, Order(epochs=2, batch_size=3), k) for k in range(2)]
    assert alike(plans) and not alike([*plans, batch_order(6, Order(epochs=2, batch_size=3), 0)])
    assert not alike([plans[0], plans[1][:2]])
    assert alike([batch_order(9, Order(steps=2), 0), batch_order(11, Order(steps=2), 0)])
    steps = [*side_by_side(data, plans, cut=True)]
    assert [tuple(x.shape) for (x, _), _ in steps] == [(2, 3), (2, 2)] * 2
    assert all(bool(mask.all()) for _, mask in steps)
    for k in range(2):
        seen = torch.cat([x[k] for (x, _), _ in steps[:2]])
        assert sorted(seen.tolist()) == data[k].tensors[0].tolist()


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9) | st.none(), st.booleans())
def test_the_smallest_batch_is_computed_beforehand(n, batch, steps, drop_last):
    order = Order(batch_size=batch, steps=steps, drop_last=drop_last)
    assert least(n, order) == (batch_order(n, order, 0) >= 0).sum(1).min()


def test_batches_are_the_plan_step_by_step():
    x = torch.arange(23.0)[:, None]
    data = TensorDataset(x, x[:, 0])
    for order in (
        Order(batch_size=5, epochs=3),
        Order(batch_size=5, steps=7),
        Order(batch_size=None, epochs=2),
    ):
        steps = batch_order(23, order, 1)
        got = list(batches(data, steps))
        assert len(got) == len(steps)
        for index, (bx, by) in zip(steps, got, strict=True):
            assert torch.equal(bx, x[index[index >= 0]]) and torch.equal(by, bx[:, 0])
        plain = list(batches(Subset(data, range(23)), steps))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(got, plain, strict=True))


def test_rows_are_picked_alike_from_every_memory_layout():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 4, 4, generator=g)
    index = torch.tensor([4, 0, 0, 5])
    for layout in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        picked, _ = fetch(TensorDataset(layout, torch.arange(6)), index)
        assert torch.equal(picked, layout[index])
        assert picked.stride() == layout[index].stride()
