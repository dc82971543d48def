"""A simulated clock: how long a visit takes is drawn and never measured, so that a run repeats."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedtorch import disk, seeds
from fedtorch.options import NOT_NEGATIVE, POSITIVE, check
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds of a visit: those of its start, examples and bytes, times the client's speed and a draw."""

    start: float = 0.0
    """Seconds that a visit takes whatever it does."""
    example: float = 1.0
    """Seconds for an example, every pass counted."""
    megabyte: float = 0.0
    """Seconds for a megabyte, up or down."""
    spread: float = 0.0
    """Standard deviation of the logarithm of clients' speeds, which stay for the run; 0: all alike."""
    line_spread: float = 0.0
    """The same of the seconds for a megabyte, beside the client's speed."""
    jitter: float = 0.0
    """Each visit takes 1 + |N(0, jitter)| times as long, as in FedBuff's experiments (arXiv:2106.06639)."""

    def __post_init__(self) -> None:
        """Refuse time that runs backwards."""
        names = ("start", "example", "megabyte", "spread", "line_spread", "jitter")
        check(self, "pace.clock", **dict.fromkeys(names, NOT_NEGATIVE))

    def seconds(self, client: int, visit: int, examples: int, bytes: int, seed: int) -> float:
        """How long the visit of this number takes."""
        line = math.exp(self.line_spread * _of(seed, "line", client)) if self.line_spread else 1
        plain = self.start + examples * self.example + bytes / 1e6 * self.megabyte * line
        own = math.exp(self.spread * _of(seed, "speed", client)) if self.spread else 1
        return plain * own * self._late(visit, seed)

    def _late(self, visit: int, seed: int) -> float:
        if not self.jitter:  # without a draw, which takes longer than all else
            return 1
        return 1 + abs(self.jitter * _normal(seed, "seconds", visit))


class Device(NamedTuple):
    """A line of a trace, or several with the same name."""

    speed: float
    """How many times as long everything takes."""
    megabyte: float | None
    windows: tuple[tuple[float, float], ...]
    """When it can be asked, in seconds, ascending; none: always."""


@dataclass(frozen=True, kw_only=True)
class Trace(Clock):
    """The same with devices from a CSV file, which are dealt out to clients in turn."""

    path: str = ""
    """CSV with the columns device and any of speed (how many times as long), megabyte (seconds for one),
    from and to (seconds between which it can be asked; a device may have several lines of those)."""
    period: float | None = None
    """Seconds after which those times come again; none: as soon as the last of the file is over."""

    def __post_init__(self) -> None:
        """Refuse a file that is none."""
        super().__post_init__()
        check(self, "pace.clock", period=POSITIVE)
        if not self.path:
            raise ConfigError("pace.clock trace needs pace.clock.path, a CSV file of devices")
        self._devices()

    def seconds(self, client: int, visit: int, examples: int, bytes: int, seed: int) -> float:
        """How long the visit of this number takes; once begun it goes on."""
        device = self._device(client)
        line = self.megabyte if device.megabyte is None else device.megabyte
        plain = self.start + examples * self.example + bytes / 1e6 * line
        return plain * device.speed * self._late(visit, seed)

    def begins(self, client: int, now: float) -> float:
        """When it can be asked, now or later."""
        windows = self._device(client).windows
        if not windows:
            return now
        period = self._period()
        past = period * math.floor(now / period)
        for round in (past, past + period):
            for begin, end in windows:
                if now < round + end:
                    return max(now, round + begin)
        raise AssertionError("a window of the next period is always later")

    def _device(self, client: int) -> Device:
        devices = self._devices()
        return devices[client % len(devices)]

    def _devices(self) -> tuple[Device, ...]:
        return _read(self.path)

    def _period(self) -> float:
        last = max(end for d in self._devices() for _, end in d.windows)
        return last if self.period is None else max(last, self.period)


@lru_cache(8)
def _read(path: str) -> tuple[Device, ...]:
    """The devices of a file, in the order in which it names them; raises ConfigError naming a line."""
    try:
        with disk.regular(Path(path)).open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            columns, lines = table.fieldnames or [], [*table]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"pace.clock.path {path!r} cannot be read: {e}") from e
    known = {"device", "speed", "megabyte", "from", "to"}
    if odd := sorted(set(columns) ^ known & {*columns, "device"}):
        raise ConfigError(
            f"{path}: {odd[0]!r} is not of the columns device, speed, megabyte, from, to"
        )
    if ("from" in columns) != ("to" in columns) or not lines:
        raise ConfigError(f"{path} needs a line for each device, and from and to together")
    found: dict[str, Device] = {}
    for number, line in enumerate(lines, 2):
        speed, megabyte, begin, end = (
            _seconds(path, number, line, name) for name in ("speed", "megabyte", "from", "to")
        )
        window = () if begin is None or end is None else ((begin, end),)
        if (begin is None) != (end is None) or (window and not begin < end):  # type: ignore[operator]
            raise ConfigError(f"{path} line {number}: from must come before to")
        device = found.get(line["device"], Device(1.0 if speed is None else speed, megabyte, ()))
        found[line["device"]] = device._replace(windows=tuple(sorted((*device.windows, *window))))
    return tuple(found.values())


def _seconds(path: str, number: int, line: dict[str, Any], name: str) -> float | None:
    text = line.get(name)
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{path} line {number}: {name} must be a number >= 0, got {text!r}")
    return value


def begins(clock: Any, client: int, now: float) -> float:
    """When a client can be asked, now or later; a clock that does not say so has all at all times."""
    return float(clock.begins(client, now)) if hasattr(clock, "begins") else now


def work_of(recipe: Any, examples: int) -> int:
    """Examples that a visit takes, every pass counted; under Poisson sampling, those that are expected."""
    plan = recipe.privacy.per_example
    if plan is not None:
        return int(plan.steps * plan.batch_size)
    if recipe.steps is not None:
        taken = (recipe.batch_size or examples) * recipe.accumulate
        return int(recipe.steps * min(taken, examples))
    return int(recipe.epochs * examples)


def shares(counts: Sequence[int]) -> dict[str, float]:
    """How unequally clients have taken part so far."""
    ordered = sorted(counts)
    return {
        "visits_min": float(ordered[0]),
        "visits_median": (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2,
        "visits_max": float(ordered[-1]),
    }


@lru_cache(1 << 14)
def _of(seed: int, purpose: str, client: int) -> float:
    """What stays a client's for the run, drawn once."""
    return _normal(seed, purpose, client)


def _normal(seed: int, *purpose: str | int) -> float:
    return float(torch.randn((), generator=seeds.generator(seed, *purpose), dtype=torch.float64))
