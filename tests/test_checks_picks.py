"""Models that move rows by what is in them: formulas of layers would clip one example's as another's."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedtorch import Client, Recipe, Server
from fedtorch.checks.picks import picks
from fedtorch.privacy import SampleLevel

X, Y = torch.rand(8, 4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Rows(nn.Module):
    """A layer of which the rows were moved, and one of which they were not."""

    def __init__(self, moved) -> None:
        super().__init__()
        self.moved, self.mid, self.out = moved, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.moved(self.mid, x, (x != 0).any(-1)))


def masked(mid, x, real):
    found = mid(x[real])
    return x.new_zeros(*x.shape[:2], 6).masked_scatter(real[..., None], found).sum(1)


def put(mid, x, real):
    found = x.new_zeros(*x.shape[:2], 6)
    found[real] = mid(x[real])
    return found.sum(1)


def places(mid, x, real):
    at = real.flatten().nonzero()[:, 0]
    some = mid(x.flatten(0, 1).index_select(0, at))
    return some.new_zeros(real.numel(), 6).index_add(0, at, some).unflatten(0, real.shape).sum(1)


def by_length(mid, x, real):
    order = real.sum(1).argsort(descending=True, stable=True)
    return mid(x[order])[order.argsort()].sum(1)


def by_puts(mid, x, real):
    order = real.sum(1).argsort(descending=True, stable=True)
    return mid(torch.empty_like(x).index_copy_(0, order, x))[order].sum(1)


def lists(mid, x, real):
    many = real.sum(1).tolist()
    rows = mid(torch.cat([one[:n] for one, n in zip(x, many, strict=True)]))
    return pad_sequence(rows.split(many), batch_first=True).sum(1)


def one_by_one(mid, x, real):
    many = [int(n) for n in real.sum(1)]
    rows = mid(torch.cat([one[:n] for one, n in zip(x, many, strict=True)]))
    return pad_sequence(rows.split(many), batch_first=True).sum(1)


def dropped(mid, x, real):
    kept = torch.rand(real.shape) > 1e-4
    return x.new_zeros(*x.shape[:2], 6).masked_scatter(kept[..., None], mid(x[kept])).sum(1)


def if_any(mid, x, real):
    assert bool(x.isfinite().all())
    return mid(x).sum(1) if real.all() else masked(mid, x, real)


def if_short(mid, x, real):
    return by_length(mid, x, real) if bool((real.sum(1) < 4).any()) else mid(x).sum(1)


def product(mid, x, real):
    order = real.sum(1).argsort(descending=True, stable=True)
    moved = nn.functional.one_hot(order, len(x)) * 1.0
    return moved.T @ mid((moved @ x.flatten(1)).view(x.shape)).sum(1)


def attended(mid, x, real):
    return mid((x @ x.mT).softmax(-1) @ x).sum(1)


def last(mid, x, real):
    return mid(x)[torch.arange(len(x)), real.sum(1) - 1]


def along(mid, x, real):
    order = real.int().argsort(1)[..., None]
    return mid(x.gather(1, order.expand_as(x))).sum(1)


def filled(mid, x, real):
    assert bool(real.any()) and int(real.sum(1).max()) <= x.shape[1]
    return mid(x).masked_fill(~real[..., None], 0).sum(1)


def let_go(mid, x, real):
    """Memory in which something was made of examples, and then something else."""
    gone = real.cumsum(1)
    left = weakref.ref(gone)
    del gone
    assert left() is None
    return mid(x)[torch.arange(real.numel()).view(real.shape)[:, 0] // real.shape[1]].sum(1)


@pytest.mark.parametrize(
    "moved",
    [
        masked,
        put,
        places,
        by_length,
        by_puts,
        lists,
        one_by_one,
        dropped,
        if_any,
        if_short,
        product,
    ],
)
def test_rows_that_are_moved_by_what_is_in_them_are_found(moved):
    assert picks(Rows(moved), (X, Y), Recipe())


def test_so_are_they_in_a_compiled_model_and_nothing_is_compiled_for_it():
    from torch._dynamo.utils import counters

    model = torch.compile(Rows(masked), backend="eager")
    with torch.no_grad():
        model(X)
    frames = counters["frames"]["total"]
    assert picks(model, (X, Y), Recipe()) and counters["frames"]["total"] == frames > 0


@pytest.mark.parametrize("moved", [last, along, filled, attended, let_go])
def test_what_stays_in_its_row_is_left_alone(moved):
    assert picks(Rows(moved), (X, Y), Recipe()) is None


@pytest.mark.parametrize("moved", [masked, by_length, lists])
def test_formulas_of_layers_do_not_train_such_a_model(moved):
    plan = SampleLevel(noise_multiplier=1.0, rounds=1, steps=1, sample_rate=1.0, batch_size=8)
    x = X.clone()
    x[:4, 2:] = 0  # three rows of each on average
    torch.manual_seed(0)
    server = Server(Rows(moved), [Client("c", (x, Y))], Recipe(privacy=plan))
    (said,) = (n for n in map(str, server.notes) if "private gradients are taken" in n)
    assert "formulas" not in said and "layers: rows are picked by what is in them" in said
