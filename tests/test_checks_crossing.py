"""Rows that hang on other examples are found before layers are listened to, whatever the examples show."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtorch import Client, Recipe, Server
from fedtorch.checks.crossing import crosses, loss_crosses
from fedtorch.privacy import SampleLevel
from fedtorch.training.losses import cross_entropy

X, Y = torch.rand(8, 4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Rows(nn.Module):
    """A layer among rows that ``by`` moves; of made-up examples all numbers are ``real``."""

    def __init__(self, by) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.by, self.mid, self.out = by, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.by(self.mid, x, (x != 0).any(-1)))


def order(x, real):
    """As a matrix: the longest first, which moves nothing where all are of one length."""
    return F.one_hot(real.sum(1).argsort(descending=True, stable=True), len(x)).to(x)


def product(mid, x, real):
    moved = order(x, real)
    return moved.T @ mid((moved @ x.flatten(1)).view(x.shape)).sum(1)


def einsum(mid, x, real):
    moved = order(x, real)
    return torch.einsum("ji,jd->id", moved, mid(torch.einsum("ij,jtd->itd", moved, x)).sum(1))


def by_sum(mid, x, real):
    moved = order(x, real)
    return moved.T @ mid((moved[..., None, None] * x).sum(1)).sum(1)


def soft(mid, x, real):
    h = x.sum(1)
    return mid(torch.softmax(h @ h.T, 1) @ h)


def running(mid, x, real):
    h = mid(x.cumsum(0)).sum(1)
    return torch.cat([h[:1], h[1:] - h[:-1]])


def rolled(mid, x, real):
    by = int((~real).sum())  # 0 of examples without padding
    return mid(x.roll(by + 1, 0)).roll(-by - 1, 0).sum(1)


def rolled_by_padding(mid, x, real):
    return torch.where((~real).any(), mid(x.roll(1, 0)).roll(-1, 0), mid(x)).sum(1)


def rolled_by_zeros(mid, x, real):
    by = int((x == 0).sum())  # of halves and wholes a multiple of the examples that are tried
    return mid(x.roll(by, 0)).roll(-by, 0).sum(1)


def scattered(mid, x, real):
    at = real.sum(1).argsort(descending=True, stable=True)
    return mid(torch.zeros_like(x).scatter(0, at[:, None, None].expand_as(x), x)).sum(1)[at]


def ranked(mid, x, real):
    return mid(x.sort(0).values).sum(1)


def shut(mid, x, real):
    h = mid(x).sum(1)
    return h + (~real).any().to(x) * (h - h.mean(0))


def without_nan(mid, x, real):
    h = mid(x.nan_to_num()).sum(1)
    return h + (~real).sum() * h.mean(0).nan_to_num()


def if_any(mid, x, real):
    return mid(x).sum(1) if real.all() else running(mid, x, real)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - 0 * x.mean(0)

    @staticmethod
    def backward(ctx, d):
        return d


class Back(Centred):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return d - 0 * d.mean(0)


def centred(mid, x, real):
    return Centred.apply(mid(x).sum(1))


def back(mid, x, real):
    return Back.apply(mid(x).sum(1))


MOVED = [
    product, einsum, by_sum, soft, running, rolled, rolled_by_zeros, rolled_by_padding, scattered, ranked,
    shut, without_nan, centred, if_any,
]  # fmt: skip


@pytest.mark.parametrize("by", MOVED)
def test_the_layer_that_meets_rows_of_others_is_named(by):
    found = crosses(Rows(by), (X, Y), Recipe(), "layers")
    assert found in ("layer mid", "layer out")


@pytest.mark.parametrize("mode", ["layers", "hooks", "ghost"])
def test_what_comes_back_from_others_is_found_in_each_way(mode):
    net = Rows(lambda mid, x, real: Back.apply(mid(x)))
    assert crosses(net, (X[:, 0], Y), Recipe(), mode) == "layer mid"


class Words(nn.Module):
    """Whole numbers, which hold no NaN: the order is another where one has zeros."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.moves, self.table, self.out = moves, nn.Embedding(9, 5), nn.Linear(5, 3)

    def forward(self, x):
        moved = order(x, x != 0) if self.moves else torch.eye(len(x), dtype=x.dtype)
        return self.out(self.table(moved @ x).sum(1))[moved.argmax(0)]


def test_rows_of_whole_numbers_are_tried_with_zeros_among_them():
    x = 1 + torch.arange(32).view(8, 4) % 7
    assert crosses(Words(True), (x, Y), Recipe(), "layers") == "layer table"


def masked(mid, x, real):
    return mid(x).masked_fill(~real[..., None], 0).sum(1)


def attended(mid, x, real):
    share = (x @ x.mT).masked_fill(~real[:, None], -torch.inf).softmax(-1)
    return mid(share @ x).sum(1)


def asserted(mid, x, real):
    assert bool(x.isfinite().all())
    return mid(x).amax(1)


@pytest.mark.parametrize("by", [masked, attended, asserted])
def test_rows_that_are_their_examples_alone_are_left_alone(by):
    net = Rows(by)
    before = [p.clone() for p in net.parameters()]
    assert crosses(net, (X, Y), Recipe(), "layers") is None
    assert all(map(torch.equal, before, net.parameters()))
    assert not any(m._forward_hooks for m in net.modules())


def test_what_fails_with_nan_is_marked_behind_its_layers_alone():
    def both(mid, x, real):
        return centred(mid, x, real) + asserted(mid, x, real)

    assert crosses(Rows(both), (X, Y), Recipe(), "layers") == "layer out"


@pytest.mark.parametrize("by", [rolled, back])
def test_such_a_model_trains_by_examples_one_by_one(by):
    plan = SampleLevel(noise_multiplier=1.0, rounds=1, steps=1, sample_rate=1.0, batch_size=8)
    server = Server(Rows(by), [Client("c", (X, Y))], Recipe(privacy=plan))
    (said,) = (n for n in map(str, server.notes) if "private gradients are taken" in n)
    assert "layers: a row of layer mid hangs on other examples" in said and "formulas" not in said


def gated(z, y):
    each = cross_entropy(z, y)
    return each + (z.amax() > 1e9) * (each - each.mean())


def test_a_loss_is_tried_alike():
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    assert loss_crosses(net, (X, Y), Recipe(loss=gated))
    assert not loss_crosses(net, (X, Y), Recipe(loss=nn.CrossEntropyLoss(reduction="none")))


@pytest.mark.parametrize(("loss", "quick"), [(gated, False), (F.multi_margin_loss, True)])
def test_the_fast_path_takes_no_loss_in_which_examples_might_meet(loss, quick):
    def each(z, y):
        return loss(z, y, reduction="none") if quick else loss(z, y)

    plan = SampleLevel(noise_multiplier=1.0, rounds=1, steps=1, sample_rate=1.0, batch_size=8)
    net, recipe = nn.Linear(5, 3), Recipe(loss=each, privacy=plan)
    notes = Server(net, [Client("c", (X[:, 0], Y))], recipe).notes
    assert any(str(n).startswith("fast path") for n in notes) == quick


def cut(mid, x, real):
    many = int(real.sum(1).max())
    return mid(x * (torch.arange(x.shape[1]) < many)[:, None]).sum(1)


def test_what_the_longest_example_does_to_shorter_ones_is_found():
    assert crosses(Rows(cut), (X, Y), Recipe(), "layers") == "layer mid"


def test_a_constant_that_is_nan_is_nobodys():
    def marked(mid, x, real):
        return mid(torch.where(x > 2, torch.nan, x)).sum(1)

    assert crosses(Rows(marked), (X, Y), Recipe(), "layers") is None
