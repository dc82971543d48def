import math
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtorch import tree


def example(k: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(k)
    return {"w": torch.randn(2, 3, generator=g), "b": torch.randn((), generator=g)}


def test_stack_and_row_are_inverse():
    models = [example(k) for k in range(4)]
    stacked = tree.stack(models)
    assert stacked["w"].shape == (4, 2, 3)
    assert stacked["b"].shape == (4,)
    for k, model in enumerate(models):
        assert all(torch.equal(tree.row(stacked, k)[n], v) for n, v in model.items())


def test_expand_broadcasts_against_any_number_of_clients():
    shared, stacked = tree.expand(example(0)), tree.stack([example(k) for k in range(3)])
    difference = tree.tmap(torch.sub, stacked, shared)
    assert torch.equal(difference["w"][0], torch.zeros(2, 3))


def test_per_client_scales_each_client_by_its_own_number():
    scale = torch.tensor([1.0, 10.0])
    out = tree.per_client(scale, torch.ones(2, 3, 4)) * torch.ones(2, 3, 4)
    assert out[0].sum() == 12
    assert out[1].sum() == 120


def test_sq_norms_are_over_all_tensors_of_a_client():
    stacked = {"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([4.0, 2.0])}
    assert tree.sq_norms(stacked).tolist() == [25.0, 4.0]


def test_finite_is_per_client():
    stacked = {"a": torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, 0.0]])}
    stacked["b"] = torch.tensor([1.0, 1.0, float("inf")])
    assert tree.finite_per_client(stacked).tolist() == [True, False, False]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6))
def test_weighted_sum_is_the_sum(weight):
    models = [example(k) for k in range(len(weight))]
    got: dict[str, torch.Tensor] = {}
    for m, w in zip(models, weight, strict=True):
        tree.add_weighted(got, tree.stack([m]), torch.tensor([w]))
    together: dict[str, torch.Tensor] = {}
    tree.add_weighted(together, tree.stack(models), torch.tensor(weight))
    assert torch.allclose(got["w"], together["w"])
    want = sum(w * m["w"].double() for w, m in zip(torch.tensor(weight), models, strict=True))
    assert torch.allclose(got["w"], want)
    assert got["w"].dtype == torch.float64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_long_row_is_added_by_parts_with_the_same_bits(monkeypatch, layout):
    monkeypatch.setattr(tree, "IN_CACHE", 7)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 2, 2, generator=g).to(memory_format=layout) for _ in range(2))
    total: dict[str, torch.Tensor] = {}
    for v, weight in ((a, 0.3), (b, 7.0)):
        tree.add_weighted(total, {"w": v[None]}, torch.tensor([weight], dtype=torch.float64))
    assert torch.equal(total["w"], a.double() * 0.3 + b.double() * 7.0)


def test_finite_holds_where_a_float32_square_does_not():
    assert tree.finite_per_client({"a": torch.tensor([[3e38], [float("inf")]])}).tolist() == [
        True,
        False,
    ]


def test_norms_of_an_empty_stack_are_empty():
    for width in (3, tree.SHORT + 1):  # an empty Poisson batch has none
        assert tree.exact_sq_norms(torch.zeros(0, width)).shape == (0,)


def test_norms_of_long_rows_are_never_less_than_they_are():
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(7, n, generator=g) for n in (5, 1024, 3000, tree.SHORT + 1)]
    for part in parts:
        part[2] *= 1e-25  # whose squares float32 has not
        part[3] *= 1e25
        part[4] = 0
        part[5, -1] = math.inf
        part[6, :3] *= 1e-25
    found, want = tree.exact_sq_norms(*parts), torch.cat(parts, 1).double().square().sum(1)
    assert found.dtype == torch.float64
    assert bool((found >= want * (1 - 1e-12)).all())
    torch.testing.assert_close(found, want, rtol=2e-5, atol=0)
    alone = torch.stack([tree.exact_sq_norms(p) for p in parts]).sum(0)
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=0)
    parts[1][0, 7] = math.nan
    assert tree.exact_sq_norms(*parts)[:2].isnan().tolist() == [True, False]


class Odd(OrderedDict):
    """Whose items are attributes too, as those of Hugging Face's outputs."""

    def __init__(self, **given):
        super().__init__()
        for k, v in given.items():
            self[k] = v

    def __setitem__(self, k, v):
        super().__setitem__(k, v)
        self.__dict__[k] = v


@dataclass(frozen=True)
class Held:
    x: torch.Tensor
    name: str = "held"


def nestings():
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    pair = namedtuple("pair", "x y")
    return [
        (x, y), [x, (y, None)], {"x": x, "y": {"z": y}}, pair(x, y), Odd(x=x, y=y),
        UserDict(x=x, y=y), MappingProxyType({"x": x}), Held(x), x.max(1),
    ]  # fmt: skip


@pytest.mark.parametrize("batch", nestings(), ids=lambda b: type(b).__name__)
def test_nestings_of_every_kind_are_cut_joined_and_filled(batch):
    assert tree.size(batch) == 3
    few = [tree.rows(batch, torch.tensor([k])) for k in range(3)]
    whole = tree.joined([tree.rows(f, slice(None)) for f in few])
    found = [tree.leaves(b) for b in (batch, whole)]
    assert found[0] and all(map(torch.equal, *found))
    doubled = tree.filled(batch, [2 * t for t in tree.leaves(batch)])
    kinds = (type(batch), dict) if isinstance(batch, MappingProxyType) else type(batch)
    assert isinstance(doubled, kinds) and isinstance(whole, kinds)
    assert all(
        torch.equal(2 * t, u) for t, u in zip(*map(tree.leaves, (batch, doubled)), strict=True)
    )
    stacked = tree.mapped(lambda *each: torch.stack(each), batch, doubled)
    assert all(t.shape[0] == 2 for t in tree.leaves(stacked))
    if isinstance(batch, Odd):
        assert torch.equal(doubled.x, 2 * batch.x)
    if isinstance(batch, Held):
        assert doubled.name == "held"
