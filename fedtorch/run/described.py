"""A run made in Python as a config names it, so that what goes on can be held to what began."""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fedtorch.data.base import Data
from fedtorch.run import cli, objects
from fedtorch.run.called import called, lax, short, worded
from fedtorch.types import ConfigError

PYTHON = "python"
"""Who made the run, in its config."""

LAYERS = "model_layers"
"""What a run of an older version does not tell."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run's config says that was made in Python."""

    made_by: str = PYTHON
    python: str
    """Its release, whose code a lambda's digest is of."""
    dataset: str
    clients: int
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    model_layers: str
    """As the model prints them, with rates, strides and activations that its weights do not show."""
    loss: str
    scheduler: str | None = None
    strategy: Any
    aggregator: Any
    channel: Any
    participation: Any
    pace: Any
    privacy: Any
    optimizer: str
    optimizer_args: dict[str, Any]
    schedule: Any
    threat: Any = None
    rounds: int
    seed: int


def described(server: Any, rounds: int, data: Data | None = None) -> dict[str, Any]:
    """All that decides a run beside its data and its model's weights: plain values by name."""
    table: dict[str, Any] = _plain(
        objects.describe(_options(server, rounds, data)) | _training(server)
    )
    return table


def same_run(
    before: Mapping[str, Any], now: Mapping[str, Any], path: Path, free: tuple[str, ...] = ()
) -> None:
    """Raises ConfigError that names the first option in which two runs differ; rounds may, and ``free``."""
    was, here = cli.flat(dict(before)), cli.flat(dict(now))
    if was.pop("python", None) != here.pop("python", None):
        was, here = ({k: lax(v) for k, v in table.items()} for table in (was, here))
    free = free if LAYERS in was else (*free, LAYERS)
    for name in {**was, **here}:
        if name not in ("rounds", *free) and was.get(name) != here.get(name):
            raise ConfigError(
                f"the run in {path} has {name} = {was.get(name)!r}, not {here.get(name)!r}: "
                "make the Server as it was, or choose another folder"
            )


def _options(server: Any, rounds: int, data: Data | None) -> Options:
    """The run as a config names it: what was made in Python by the names of its classes."""
    recipe, plan = server.recipe, server.recipe.privacy
    loss = recipe.step or recipe.local or recipe.loss
    optimizer = recipe.client_optimizer
    return Options(
        python=".".join(platform.python_version_tuple()[:2]),
        dataset="in memory" if data is None else data.name,
        clients=len(server.ids),
        model=type(server.model).__name__,
        model_layers=layers(server.model),
        loss=called(loss),
        scheduler=None if recipe.scheduler is None else called(recipe.scheduler),
        strategy=recipe.strategy,
        aggregator=recipe.aggregator,
        channel=recipe.channel,
        participation=server.participation,
        pace=server.pace,
        privacy=plan if plan.claims else None,
        optimizer=called(optimizer.name),
        optimizer_args=_plain(dict(optimizer.args)),
        schedule=server.schedule,
        threat=server.threat,
        rounds=rounds,
        seed=server.seed,
    )


def layers(model: nn.Module) -> str:
    """A model's layers on a line, compiled or not; where an object lies in memory is left out."""
    made = getattr(model, "_orig_mod", model)
    return short(" ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(made)).split()))


def _training(server: Any) -> dict[str, Any]:
    return {k: v for k, v in server.recipe.training().items() if v is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value if v is not None]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of NumPy's a checkpoint would not come back
    return worded(value)
