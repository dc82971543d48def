"""Whether what a strategy makes of one client is that client's alone, and the names of its groups are free.

Strategies are given K clients at once. One that takes a mean over them lets a client move what others
send: no clip bounds that, and which clients train side by side is the machine's to say.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.channel.base import UNSENT
from fedtorch.strategies.base import Strategy
from fedtorch.strategies.still import still
from fedtorch.training.correction import correction
from fedtorch.training.personal import GROUP
from fedtorch.tree import tmap
from fedtorch.types import BUFFERS, CLIP_BIT, ConfigError, Context, Params, Stack

TAKEN = {"sends": {BUFFERS, CLIP_BIT}, "remembers": {GROUP}}
"""Names of groups that mean something else."""

Half = Callable[[Stack, Context], Any]


def check(strategy: Strategy, params: Params, extras: Mapping[str, Params]) -> None:
    """Raises ConfigError where a strategy of a user's own mixes clients, or takes a name that is taken."""
    kind = type(strategy)
    uploads = {"upload": strategy.upload, "following": strategy.upload}
    own = uploads | {"correct": _correct(strategy), "correction": _shift(strategy)}
    own = {k: f for k, f in own.items() if not _ours(getattr(kind, k))}
    if not own:
        return
    for name, half in own.items():
        one, other = (_found(half, strategy, params, extras, seed) for seed in (1, 2))
        if name in uploads:
            _free(f"{kind.__name__}.{name}", "sends", one[0])
            _free(f"{kind.__name__}.{name}", "remembers", one[1])
        if not _alike(one, other):
            raise ConfigError(
                f"{kind.__name__}.{name} makes what it gives one client depend on others that train "
                "beside it: make row k of every [K, ...] from row k alone (no mean over the first axis)"
            )


def _ours(method: Any) -> bool:
    """Those that come with fedtorch have tests of their own, and large models are spared the trial."""
    return bool(method.__module__.startswith("fedtorch.strategies."))


def _correct(strategy: Strategy) -> Half:
    return lambda params, ctx: strategy.correct(tmap(torch.cos, params), params, ctx)


def _shift(strategy: Strategy) -> Half:
    return lambda params, ctx: correction(strategy, ctx)


def _found(
    half: Half, strategy: Strategy, params: Params, extras: Mapping[str, Params], seed: int
) -> Any:
    """What it makes of two clients, of whom the second is another with each ``seed``."""
    beside = torch.Generator().manual_seed(seed)
    first = torch.Generator().manual_seed(0)

    def two(v: Tensor) -> Tensor:
        draws = (torch.randn(v.shape, generator=g).to(v) for g in (first, beside))
        return torch.stack([v + 0.1 * draw for draw in draws])

    memory = {g: tmap(two, m) for g, m in strategy.remember(params).items()}
    steps, one = torch.tensor([3, 3 + seed]), still(strategy, params, extras)
    ctx = replace(one, memory=memory, steps=steps, lr=0.1, seeds=(0, seed))
    with torch.no_grad(), seeds.seeded(0):
        return half(tmap(two, params), ctx)


def _alike(one: Any, other: Any) -> bool:
    """Whether the first client's rows are."""
    if isinstance(one, Tensor):
        return torch.allclose(one[0], other[0], rtol=1e-4, atol=1e-6, equal_nan=True)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(v, other[k]) for k, v in one.items())
    if isinstance(one, tuple):
        return all(map(_alike, one, other))
    return bool(one == other)


def _free(who: str, what: str, groups: Mapping[str, Stack]) -> None:
    for name in groups:
        if name in TAKEN[what] or name.startswith(UNSENT):
            raise ConfigError(
                f"{who} {what} a group {name!r}, a name that means something else: take another"
            )
