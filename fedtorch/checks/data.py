"""Samplers and DataLoaders that clients came with, held to the recipe before training."""

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks.keeps import held_by
from fedtorch.checks.stays import is_generator
from fedtorch.checks.tried import first
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import Collated, Drawn, drawn, fetch, uncollated
from fedtorch.tree import parts
from fedtorch.types import ConfigError

LOOKED_AT = 8
"""Examples that a dataset is asked for alone and together."""

MOST_PARTS = 20
"""Parts of a list that are looked into."""


def check(clients: Sequence[Client], recipe: Recipe) -> list[str]:
    """What is to be said of samplers and loaders; raises ConfigError naming a client and the fix."""
    for client in clients:
        if client.sampler is not None:
            _draws(client, client.sampler, recipe)
        if recipe.privacy.per_example:
            _far_apart(client)
    said = generators(clients)
    if recipe.privacy.per_example:  # the plan draws the batches, and says so
        return said
    for client in clients:
        if client.loader is not None:
            _agrees(client, recipe)
    kept = [c.id for c in clients if c.loader and not (c.loader.shuffled or c.sampler)]
    if not kept:
        return said
    more = f", as of {len(kept) - 1} more," if len(kept) > 1 else ""
    return [
        *said,
        f"the DataLoader of client {kept[0]}{more} does not shuffle, but here each pass does (to keep "
        "the order: sampler=lambda seed, round: range(n))",
    ]


@contextmanager
def readable() -> Iterator[None]:
    """Raises ConfigError where an example that is tried cannot be read, or put together with others."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
        if not any(frame.f_code is fetch.__code__ for frame in frames):
            raise
        raise ConfigError(
            f"taking examples of a client's dataset failed: {type(e).__name__}: {first(e)}{uncollated(e)}"
        ) from e


def generators(clients: Sequence[Client]) -> list[str]:
    """A sentence for a dataset that draws by a generator of its own, which no seed begins anew."""
    seen: set[int] = {id(torch.default_generator)}
    for client in clients:
        name = _generator(client.data, seen)
        if name and not _repeats(client):
            return [
                f"the dataset of client {client.id} draws by a generator of its own, {name}, from where "
                "whoever took the last example left it, and a resumed run begins it anew: torch.randn, "
                "np.random and random are seeded for each visit"
            ]
    return []


def _generator(data: Any, seen: set[int]) -> str:
    """The name of a generator that a dataset, its dataset or a transform of theirs holds; empty: none."""
    todo = [("", data)]
    for where, value in todo:  # which grows
        if is_generator(value) and id(value) not in seen:
            return where
        if id(value) in seen or isinstance(
            value, (type, ModuleType, Tensor, np.ndarray, nn.Module)
        ):
            continue
        seen.add(id(value))
        todo += [(f"{where}.{k}".lstrip("."), v) for k, v in _held(value)]
    return ""


def _held(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, (list, tuple)):  # as transforms in a row
        return enumerate(value[:MOST_PARTS])
    if isinstance(value, (FunctionType, MethodType, partial)):
        return held_by(value)
    home = str(type(value).__module__).partition(".")[0]
    takes = getattr(type(value), "__getitem__", None)
    beside = [("__getitem__", takes)] if home != "torch" and isinstance(takes, FunctionType) else []
    return [*getattr(value, "__dict__", {}).items(), *beside]


def _repeats(client: Client) -> bool:
    """Whether examples are the same when taken again by the same seed."""
    data: Any = client.data.data if isinstance(client.data, Collated) else client.data
    taken: list[list[Any]] = []
    try:
        for _ in range(2):
            with seeds.seeded(0):
                taken.append([data[k] for k in range(min(len(client), LOOKED_AT))])
    except Exception:  # whoever trains on them says it better
        return True
    return _same(*taken)


def _draws(client: Client, sampler: Drawn, recipe: Recipe) -> None:
    if recipe.privacy.per_example:
        raise ConfigError(
            f"client {client.id} has a sampler, but sample-level privacy draws the batches itself (its "
            "epsilon holds for those alone): leave the sampler out, or protect clients (privacy client)"
        )
    try:
        found = [drawn(sampler, len(client), 0, 0) for _ in range(2)]
    except Exception as e:
        what = (
            str(e) if isinstance(e, ValueError) else f"its sampler fails: {type(e).__name__}: {e}"
        )
        raise ConfigError(f"client {client.id}: {what}") from e
    if not torch.equal(*found):
        raise ConfigError(
            f"client {client.id}: its sampler gives other places when asked again with the same seed, so "
            "that no run could be repeated: draw from the seed, or leave out its own generator"
        )


def _far_apart(client: Client) -> None:
    """What a dataset gives for several examples at once must be what it gives for each: it may mix them."""
    data: Any = client.data.data if isinstance(client.data, Collated) else client.data
    if not hasattr(data, "__getitems__") or len(client) < 2:
        return
    places = [*range(min(len(client), LOOKED_AT))]
    with seeds.seeded(0):
        each, again = ([data.__getitems__([k])[0] for k in places] for _ in range(2))
        if not _same(each, again):  # it draws, and draws other numbers in company
            return
        together = [*data.__getitems__(places)]
    if not _same(each, together):
        raise ConfigError(
            f"client {client.id}: its dataset's __getitems__ gives other examples in company than alone, "
            "and sample-level privacy clips each by itself: prepare each example alone, by a transform of "
            "single examples, or protect clients (privacy client)"
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two examples, nestings of numbers and whatever else, hold the same."""
    if (inside := parts(one)) is not None:
        others = parts(other) or []
        return len(inside) == len(others) and all(map(_same, inside, others))
    if isinstance(one, (Tensor, np.ndarray, int, float)):
        a, b = torch.as_tensor(one), torch.as_tensor(other)
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    return not isinstance(one, str) or bool(one == other)


def _agrees(client: Client, recipe: Recipe) -> None:
    """The recipe decides how batches are cut, for all clients."""
    assert client.loader is not None
    own, n = client.loader, len(client)
    size = recipe.batch_size or n
    if own.batch_size != size and min(own.batch_size, size) < n:
        raise ConfigError(
            f"client {client.id}: its DataLoader has batch_size {own.batch_size}, and the recipe "
            f"{recipe.batch_size}: give Recipe(batch_size={own.batch_size}), or the dataset alone "
            "(loader.dataset)"
        )
    if own.drop_last != recipe.drop_last and n % own.batch_size:
        raise ConfigError(
            f"client {client.id}: its DataLoader has drop_last={own.drop_last}, and the recipe "
            f"{recipe.drop_last}: give Recipe(drop_last={own.drop_last}), or the dataset alone "
            "(loader.dataset)"
        )
