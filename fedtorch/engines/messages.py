"""Tasks and outcomes as messages, and what a server checks before it believes an outcome."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtorch.engines.wire import Message, MessageError, short
from fedtorch.tree import to_float64
from fedtorch.types import Failure, Params, Released, Stack, Task, Tasks

Memory = dict[str, dict[str, Params]]
"""Client memory: id -> group -> name -> tensor."""


class Outcome(NamedTuple):
    """What came of a chunk of clients."""

    update: Released
    failures: list[Failure]
    memory: Memory
    """Where the engine keeps it for the worker; always empty from a site."""


class Expected(NamedTuple):
    """The tensors every client's update must have: group -> name -> (shape, dtype)."""

    sent: dict[str, dict[str, tuple[torch.Size, torch.dtype]]]
    buffers: dict[str, tuple[torch.Size, torch.dtype]]

    def without(self, names: set[str]) -> "Expected":
        """Of a visit in which some weights rest."""
        kept = {g: {k: v for k, v in t.items() if k not in names} for g, t in self.sent.items()}
        return Expected(kept, self.buffers) if names else self


def task_message(task: Task, **facts: Any) -> Message:
    """A task, and whatever else the engine wants to say with it."""
    own = {"round": task.round, "seed": task.seed, "lr": task.lr, "privacy": task.privacy}
    own |= {"again": task.visit} if task.visit else {}
    groups = {"state": task.state} | {f"extras/{g}": e for g, e in task.extras.items()}
    return Message("task", own | facts, groups)


def read_task(message: Message) -> Task:
    """The task in a message; raises MessageError when there is none."""
    _kind(message, "task")
    privacy = _fact(message, "privacy", (dict,))
    if len(privacy) > 8:
        raise MessageError("the privacy plan has more numbers than any plan")
    return Task(
        state=message.groups.get("state", {}),
        extras=_under(message, "extras/"),
        round=_whole_fact(message, "round", 0, 1 << 31),
        seed=_whole_fact(message, "seed", -(1 << 64), 1 << 64),
        lr=_finite(_fact(message, "lr", (int, float)), "the learning rate"),
        privacy={k: _finite(v, "a number of the privacy plan") for k, v in privacy.items()},
        visit=_whole_fact(message, "again", 0, 1 << 31) if "again" in message.facts else 0,
    )


def asking(tasks: Task | Tasks) -> Message:
    """A task, or several for clients that train in one call, to a worker of this machine or cluster."""
    if isinstance(tasks, Task):
        return task_message(tasks)
    each = [task_message(task) for task in tasks.each]
    groups = {f"{n}/{g}": tree for n, m in enumerate(each) for g, tree in m.groups.items()}
    return Message("tasks", {"each": [m.facts for m in each], "factors": [*tasks.factors]}, groups)


def asked(message: Message) -> Task | Tasks:
    """The other way round: it comes from the process that started this one."""
    if message.kind != "tasks":
        return read_task(message)
    each = [
        read_task(Message("task", facts, _under(message, f"{n}/")))
        for n, facts in enumerate(message.facts["each"])
    ]
    return Tasks(tuple(each), tuple(message.facts["factors"]))


def outcome_message(
    outcome: Outcome, asked: Sequence[str], own_types: bool = False, **facts: Any
) -> Message:
    """An outcome; clients go by their place in ``asked``.

    ``own_types``: what is sent stays in them, as what went through a channel must, and needs no room as
    float64.
    """
    update, failures, memory = outcome
    if not isinstance(update, Released):
        raise TypeError(
            f"only what a privacy plan released may be sent, not {type(update).__name__}"
        )
    place = {id: k for k, id in enumerate(asked)}
    # in float64, as everybody's: in what type a solver adds up is no other's business
    widened = update.summed and not own_types
    sent = {g: to_float64(s) if widened else s for g, s in update.sent.items()}
    groups = {f"sent/{g}": s for g, s in sent.items()}
    groups |= {"buffers": update.buffers, "metrics": update.metrics, "": {"weight": update.weight}}
    for id, kept in memory.items():
        groups |= {f"memory/{place[id]}/{g}": tree for g, tree in kept.items()}
    own = {
        "ids": list(update.ids),
        "summed": update.summed,
        "failures": [[f.id, f.kind, f.reason] for f in failures],
    }
    return Message("outcome", own | facts, groups)


def read_outcome(message: Message, asked: Sequence[str]) -> Outcome:
    """The outcome in a message; each client asked must be in it once, and no other."""
    _kind(message, "outcome")
    ids = _strings(message.facts.get("ids"))
    listed = message.facts.get("failures")
    rows = listed if isinstance(listed, list) else [None]
    failures = [Failure(*_strings(row, 3)) for row in rows]
    if sorted([*ids, *(f.id for f in failures)]) != sorted(asked):
        raise MessageError("it is about other clients than those asked")
    weight = message.groups.get("", {}).get("weight")
    if weight is None or weight.shape != (len(ids),) or weight.dtype not in _FLOATS:
        raise MessageError("it has no weight for each client")
    memory: Memory = {}
    for group, tree in _under(message, "memory/").items():
        place, _, name = group.partition("/")
        if not (place.isascii() and place.isdecimal() and int(place) < len(asked)):
            raise MessageError("it has memory of another client")
        memory.setdefault(asked[int(place)], {})[name] = tree
    update = Released.received(
        ids=tuple(ids),
        sent=_under(message, "sent/"),
        buffers=message.groups.get("buffers", {}),
        weight=weight,
        metrics=message.groups.get("metrics", {}),
        summed=message.facts.get("summed") is True,
    )
    return Outcome(update, failures, memory)


def check(update: Released, expected: Expected) -> None:
    """Refuse an update that differs from what this model and strategy send, or is not finite."""
    clients = len(update.ids)
    rows = 1 if update.summed else clients
    if update.sent.keys() != expected.sent.keys():
        raise MessageError(f"it sends {_listed(update.sent)}, not {_listed(expected.sent)}")
    for group, names in expected.sent.items():
        _same_rows(update.sent[group], names, rows)
    # those that the visit moved
    own = {k: v for k, v in expected.buffers.items() if k in update.buffers}
    _same_rows(update.buffers, own, rows)
    if not bool(((update.weight > 0) & update.weight.isfinite()).all()):
        raise MessageError("its weight is not a positive number")
    for name, values in update.metrics.items():
        if values.shape != (clients,) or values.dtype not in _FLOATS:
            raise MessageError(f"its figure {short(name)} is not one number for each client")
    for tree in (*update.sent.values(), update.buffers, update.metrics):
        for name, values in tree.items():
            if not bool(values.isfinite().all()):
                raise MessageError(f"{short(name)} is not finite")


def digest(tree: Params) -> str:
    """One number for the names, types and numbers of tensors: the same on every machine, or they differ."""
    found = hashlib.sha256()
    for name in sorted(tree):
        v = tree[name].detach().cpu().contiguous()
        found.update(f"{name} {v.dtype} {list(v.shape)}\n".encode())
        found.update(v.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def short_digests(tree: Params) -> list[str]:
    """A few digits of each tensor's own, in the order of their names: which of them differ."""
    return [digest({"": tree[name]})[:16] for name in sorted(tree)]


def schema(tree: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype by name."""
    return {k: (v.shape, v.dtype) for k, v in tree.items()}


def same_schema(tree: Params, names: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Refuse tensors of other names, shapes or dtypes."""
    if tree.keys() != names.keys():
        odd = sorted(tree.keys() ^ names.keys())[0]
        raise MessageError(f"{short(odd)} is on one side only")
    for name, (shape, dtype) in names.items():
        if tree[name].shape != shape or tree[name].dtype != dtype:
            raise MessageError(
                f"{short(name)} is {list(tree[name].shape)} {tree[name].dtype}, "
                f"not {list(shape)} {dtype}"
            )


_FLOATS = (torch.float32, torch.float64)


def _same_rows(
    stack: Stack, names: dict[str, tuple[torch.Size, torch.dtype]], clients: int
) -> None:
    rows = {k: (torch.Size((clients, *shape)), dtype) for k, (shape, dtype) in names.items()}
    same_schema(stack, rows)


def _listed(groups: Mapping[str, object]) -> str:
    return ", ".join(map(short, sorted(groups)[:4])) or "nothing"


def _under(message: Message, prefix: str) -> dict[str, Params]:
    return {g.removeprefix(prefix): t for g, t in message.groups.items() if g.startswith(prefix)}


def _kind(message: Message, kind: str) -> None:
    if message.kind != kind:
        raise MessageError(f"a message of kind {short(message.kind)}, not {kind!r}")


def _fact(message: Message, name: str, kinds: tuple[type, ...]) -> Any:
    value = message.facts.get(name)
    if type(value) not in kinds:
        raise MessageError(f"the fact {name!r} is missing or of a wrong type")
    return value


def _whole_fact(message: Message, name: str, least: int, end: int) -> int:
    value = int(_fact(message, name, (int,)))
    if not least <= value < end:
        raise MessageError(f"the fact {name!r} is out of range")
    return value


def _finite(value: Any, what: str) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise MessageError(f"{what} is not finite")
    return number


def _strings(value: Any, count: int | None = None) -> list[str]:
    if not (isinstance(value, list) and all(isinstance(v, str) and len(v) < 1000 for v in value)):
        raise MessageError("a list of names is wrong")
    if count is not None and len(value) != count:
        raise MessageError("a list of names is of a wrong length")
    return value
