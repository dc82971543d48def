"""What is under way between a server and its clients, and what of it arrives in a round."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch

from fedtorch import seeds
from fedtorch.aggregation.mean import Gathering, Held, HiddenSum
from fedtorch.channel import base as channel
from fedtorch.recipe import Recipe
from fedtorch.rounds.figures import Metrics, Reports
from fedtorch.rounds.observers import Observer, looks
from fedtorch.rounds.synchronous import Demands, Draw, Due, Rounds, ServerStep
from fedtorch.types import Failure, Params, Released, Task, Tasks


class Arrival(NamedTuple):
    """What came back of some clients' visits."""

    outcome: Released | Failure
    task: Task
    """What they were sent."""
    factor: float
    """What their changes are multiplied by."""
    now: Params | None = None
    """The model of today, where theirs is to be mixed into it."""


@dataclass
class UnderWay:
    """A pace at work: the step that it has found, who is under way, and what those were sent."""

    pace: Rounds
    asked: Demands
    flights: Any = None
    """As the pace left them, plain values."""
    tasks: dict[int, Task] = field(default_factory=dict)
    """What those under way were sent, by round."""
    drawn: ServerStep | None = None

    def step(self, round: int, seed: int, draw: Draw) -> ServerStep:
        """Whom this round asks and whose work it takes, found once."""
        if self.drawn is None:
            self.drawn = self.pace.step(self.flights, round, seed, draw, self.asked)
        return self.drawn

    def arrivals(
        self,
        step: ServerStep,
        task: Task,
        ids: Sequence[str],
        session: Any,
        now: Callable[[], Params],
    ) -> Iterator[Arrival]:
        """Let them train in an engine's ``session``; first come those who were lost on the way.

        ``task``: of this round; ``now``: copies the model of today.
        """
        for i, why in step.lost.items():
            yield Arrival(Failure(ids[i], *why), task, 1.0)
        if (
            len(step.due) > 1
            and getattr(session, "joins", False)
            and not any(due.mixes for due in step.due)
        ):
            who = [(ids[i], n) for n, due in enumerate(step.due) for i in due.who]
            each = ((self._sent(due), due.factor) for due in step.due)
            session.join(who, Tasks(*zip(*each, strict=True)))
            yield from (Arrival(outcome, task, 1.0) for outcome in session.collect())
            return
        for due in step.due:
            sent, today = self._sent(due), now() if due.mixes else None
            session.submit([ids[i] for i in due.who], sent)
            for outcome in session.collect():
                yield Arrival(outcome, sent, due.factor, today)

    def _sent(self, due: Due) -> Task:
        """What these clients were sent."""
        sent = self.tasks[due.version]
        return replace(sent, visit=due.visit) if due.visit else sent

    def land(self, step: ServerStep) -> None:
        """The round is over: who is still under way keeps what it was sent."""
        self.flights = step.flights
        self.tasks = {v: t for v, t in self.tasks.items() if v in step.versions}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; nothing of a pace that keeps nobody under way."""
        if self.flights is None:
            return {}
        tasks = {v: (t.state, t.extras, t.lr, t.privacy) for v, t in self.tasks.items()}
        return {"pace": {"flights": self.flights, "tasks": tasks}}

    def load_state_dict(self, state: Mapping[str, Any], seed: int) -> None:
        """Go on from a checkpoint of a run with this seed."""
        pace = state.get("pace", {"flights": None, "tasks": {}})
        self.flights, self.drawn = pace["flights"], None
        self.tasks = {
            v: Task(sent, extras, v, seed, lr, numbers)
            for v, (sent, extras, lr, numbers) in pace["tasks"].items()
        }


@dataclass(frozen=True)
class Gathered:
    """What came of a round's visits."""

    reports: Reports
    failed: list[Failure]
    """Who has no usable update, and why."""
    coded: int = 0
    """Bytes of the updates as a channel has encoded them."""
    short: bool = False
    """Too few have reported for their sum to be opened."""

    def figures(self) -> Metrics:
        """Who was there."""
        kinds = [f.kind for f in self.failed]
        return {
            # in the order of their ids: chunks are formed by size, which is nobody's to know
            "cohort": sorted(self.reports.ids),
            "failed": {f.id: f.kind for f in sorted(self.failed, key=lambda f: f.id)},
            "clients": len(self.reports.ids),
            "dropped": kinds.count("dropped"),
            "nonfinite": kinds.count("nonfinite"),
        }


def start_sum(recipe: Recipe, held: Held, task: Task, dtype: torch.dtype, asked: int) -> Gathering:
    """Nothing gathered yet, of so many clients that are sent this task; ``dtype``: of the weights."""
    draw = seeds.derive(task.seed, "aggregator", task.round)
    total = recipe.aggregator.start(held, draw, dtype)
    if recipe.hides:
        cast(HiddenSum, total).expect(asked, recipe.privacy, task.privacy.get("clip", 0.0))
    return total


def gather(
    total: Gathering,
    arrivals: Iterable[Arrival],
    recipe: Recipe,
    coded: Mapping[str, Params],
    observers: Sequence[Observer],
) -> Gathered:
    """Decode what clients send as it arrives, show it to who looks on, and add it to ``total``.

    ``coded``: names and shapes of what a channel encodes, by group.
    """
    chunks, failed, size = [], list[Failure](), 0
    for outcome, task, factor, now in arrivals:
        if isinstance(outcome, Failure):
            failed.append(outcome)
            continue
        if recipe.channel:
            size += channel.size(outcome, recipe.channel, coded)
            outcome = channel.decode(recipe.channel, outcome, coded, channel.Turn.of(task))
        outcome = recipe.privacy.taken(outcome, coded, task)
        if not recipe.strategy.only_delta:
            outcome = outcome.beside(recipe.strategy.arrived(outcome.sent))
        if now is not None:
            total.add(mixed(outcome, task.state, now, factor))
        else:
            total.add(outcome if factor == 1 else outcome.scaled(factor))
        chunks.append(Reports(outcome.ids, outcome.weight, outcome.metrics))
        for observer in observers:
            # under masks nobody sees what a client sends, in a simulation neither
            if not recipe.hides and looks(observer):
                # at a copy: nothing stands between a clip and its noise
                observer.sent(deepcopy(outcome))
    reports, short = Reports.of(chunks), False
    if recipe.hides:
        short = cast(HiddenSum, total).short()
        reports = reports.together(opened=not short) if chunks else reports
    return Gathered(reports, failed, size, short)


def mixed(update: Released, sent: Params, now: Params, share: float) -> Released:
    """``share`` of the way from the model of today to that of a client who was ``sent`` another."""
    since = {k: sent[k].double() - now[k].double() for k in update.sent["delta"]}
    delta = {k: share * (v + since[k]) for k, v in update.sent["delta"].items()}
    floats = {k: now[k] + share * (v - now[k]) for k, v in update.buffers.items()}
    return update.beside({"delta": delta}, floats)
