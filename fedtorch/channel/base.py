"""A stage of the channel: after the privacy plan, before the wire. What is raw it never sees."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch

from fedtorch import seeds
from fedtorch.options import briefly, check
from fedtorch.tree import expand, nbytes, row, stack, tmap, to_float64
from fedtorch.types import AUDIT, ConfigError, Params, Released, Stack, Task

UNSENT = "unsent/"
"""Before the name of a group in a client's memory: what its codes have left out, or go on from."""

THEN = "then/"
"""Before the names of what the next stage has made of a code."""


def without_unsent(memory: Mapping[str, Params]) -> dict[str, Params]:
    """What a client remembers but for the channel's part and an audit's: what its strategy knows."""
    return {g: m for g, m in memory.items() if not g.startswith(UNSENT) and g != AUDIT}


@dataclass(frozen=True)
class Turn:
    """What coding one visit may draw from and go on from."""

    common: int = 0
    """A seed that the server and all clients of the visit have."""
    own: tuple[int, ...] = ()
    """A seed of each client's, [K]; the server decodes without."""
    memory: Stack = field(default_factory=dict)
    """What each client has kept of its code before (``Stage.kept``), [K, ...]."""

    @classmethod
    def of(cls, task: Task, ids: Sequence[str] = ()) -> "Turn":
        """From the run's seed, never from a secret: whoever decodes may know these."""
        own = tuple(seeds.derive(task.seed, "channel", *task.draw, i) for i in ids)
        return cls(seeds.derive(task.seed, "channel", *task.draw), own)

    def within(self, *purpose: str | int) -> "Turn":
        """Of one group and stage: none draws what another has drawn."""
        own = tuple(seeds.derive(s, *purpose) for s in self.own)
        return Turn(seeds.derive(self.common, *purpose), own)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One way to send less; one of your own overrides ``encode`` and ``decode``.

    One that draws, or goes on from its last code, overrides ``coded`` and ``decoded`` in their place.
    Error feedback (Seide et al. 2014; Stich et al. 2018, arXiv:1809.07599): a client encodes its update
    and what earlier codes left out, together, and keeps what this code leaves out. A code that is biased,
    as that of the largest numbers is, needs it to reach what training without a channel reaches.
    """

    def __init_subclass__(cls) -> None:
        """Show what differs from the defaults."""
        briefly(cls)

    linear: ClassVar[bool] = False
    """Whether codes of one visit may be added up, and their sum decoded."""
    leads: ClassVar[bool] = False
    """Whether another stage may follow, which encodes the floating tensors of this one's code."""
    unbiased: ClassVar[bool] = False
    """Whether what is decoded is drawn: right on average, and no single time."""

    feedback: bool = True
    """Clients keep what was left out, and add it to their next update."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check(self, "channel")
        kind = type(self)
        for plain, drawn in (("encode", "coded"), ("decode", "decoded")):
            if all(getattr(kind, name) is getattr(Stage, name) for name in (plain, drawn)):
                raise ConfigError(f"channel {kind.__name__} overrides neither {plain} nor {drawn}")

    def encode(self, sent: Stack) -> Stack:
        """One group of K clients, [K, ...] each in float64 -> tensors of any names and types, [K, ...].

        Their shapes hang on the group's alone. They travel as they are, and are counted so.
        """
        return self.coded(sent, Turn())

    def decode(self, code: Stack, like: Params) -> Stack:
        """What ``encode`` made, in float64 and in the names and shapes of ``like``, [K, ...].

        Raises ValueError for a code that ``encode`` does not make: at the server it came from outside.
        """
        return self.decoded(code, like, Turn())

    def coded(self, sent: Stack, turn: Turn) -> Stack:
        """The same as ``encode``, of a stage that draws from ``turn`` or goes on from its memory."""
        return self.encode(sent)

    def decoded(self, code: Stack, like: Params, turn: Turn) -> Stack:
        """The same as ``decode``; ``turn`` has the common seed alone."""
        return self.decode(code, like)

    def first(self, like: Params) -> Params:
        """What a client goes on from before its first code of such a group."""
        return {}

    def kept(self, code: Stack) -> Stack:
        """What it goes on from next time, [K, ...] in the names and shapes of ``first``."""
        return {}


Channel = Sequence[Stage]


def encode(
    channel: Channel,
    released: Released,
    groups: Collection[str],
    memory: Sequence[Mapping[str, Params]],
    turn: Turn = Turn(),
) -> tuple[Released, list[dict[str, Params]]]:
    """What K clients send in place of ``released``, and what each has to remember of it, [K].

    ``groups``: the strategy's; what a plan sends besides goes as it is. ``memory``: of each client. Raises
    TypeError for anything that no plan has released.
    """
    if not isinstance(released, Released):
        raise TypeError(f"a channel is for what is released, not for {type(released).__name__}")
    left: list[dict[str, Params]] = [{} for _ in memory]

    def code(group: str, whole: Stack) -> Stack:
        name = UNSENT + group
        whole = to_float64(whole)
        if any(stage.feedback for stage in channel):
            for n, v in whole.items():
                earlier = [
                    m[name][n].to(v) if name in m else torch.zeros_like(v[0]) for m in memory
                ]
                whole = whole | {n: v + torch.stack(earlier)}
        made, over, kept = _coded(channel, whole, turn.within(group), name, memory)
        for k, mine in enumerate(left):
            mine |= {g: row(s, k) for g, s in kept.items()}
            if over is not None:
                mine[name] = row(over, k)
        return made

    return (released.mapped(code, groups) if channel else released), left


def _coded(
    channel: Channel, whole: Stack, turn: Turn, name: str, memory: Sequence[Mapping[str, Params]]
) -> tuple[Stack, Stack | None, dict[str, Stack]]:
    """The code; what its stages with feedback leave out, in the names of ``whole``; what they keep."""
    stage, *rest = channel
    like, name = row(whole, 0), f"{name}/{len(rest)}"
    if first := stage.first(like):
        turn = replace(turn, memory=stack([to_float64(m.get(name, first)) for m in memory]))
    code = stage.coded(whole, turn)
    kept = {name: kept} if (kept := stage.kept(code)) else {}
    plain = stage.decoded(code, like, turn) if any(s.feedback for s in channel) else {}
    over = tmap(torch.sub, whole, plain) if stage.feedback else None
    if rest:
        values, others = _parted(code)
        inner, more, later = _coded(rest, values, turn.within("then"), name, memory)
        if more is not None:  # seen from here: what is decoded less for it
            less = stage.decoded(others | tmap(torch.sub, values, more), like, turn)
            over = tmap(torch.sub, whole if stage.feedback else plain, less)
        code, kept = others | {THEN + n: v for n, v in inner.items()}, kept | later
    return code, over, kept


def _parted(code: Stack) -> tuple[Stack, Stack]:
    """What a next stage encodes, in float64, and what goes as it is."""
    values = {n: v.double() for n, v in code.items() if v.is_floating_point()}
    return values, {n: v for n, v in code.items() if n not in values}


def decode(
    channel: Channel, coded: Released, like: Mapping[str, Params], turn: Turn = Turn()
) -> Released:
    """What was sent, as the aggregator takes it; ``like``: a group's names and shapes."""
    if not channel:
        return coded

    def whole(group: str, code: Stack) -> Stack:
        return _decoded(channel, code, like[group], turn.within(group))

    return coded.mapped(whole, like)


def _decoded(channel: Channel, code: Stack, like: Params, turn: Turn) -> Stack:
    stage, *rest = channel
    if rest:
        inner = {n.removeprefix(THEN): v for n, v in code.items() if n.startswith(THEN)}
        others = {n: v for n, v in code.items() if not n.startswith(THEN)}
        values = _values(stage, tuple((n, v.shape) for n, v in like.items()))
        code = others | _decoded(rest, inner, values, turn.within("then"))
    return stage.decoded(code, like, turn)


@lru_cache(64)
def _values(stage: Stage, shapes: tuple[tuple[str, torch.Size], ...]) -> Params:
    """Names and shapes of what a next stage encodes of this one's code."""
    zeros = {n: torch.zeros(1, *s, dtype=torch.float64) for n, s in shapes}
    first = expand(stage.first(row(zeros, 0)))
    return row(_parted(stage.coded(zeros, Turn(0, (0,), first)))[0], 0)


def layout(channel: Channel, like: Mapping[str, Params]) -> dict[str, Params]:
    """What each group is sent as, of one client."""
    ones = torch.ones(1)
    still = {g: expand(tmap(torch.zeros_like, p)) for g, p in like.items()}
    code, _ = encode(channel, Released.received(("",), still, {}, ones), like, [{}], Turn(0, (0,)))
    return {g: row(code.sent[g], 0) for g in like}


def remembers(channel: Channel, like: Mapping[str, Params]) -> dict[str, Params]:
    """What a client keeps for its next visit, by group of its memory."""
    still = {g: expand(tmap(torch.zeros_like, p)) for g, p in like.items()}
    sent = Released.received(("",), still, {}, torch.ones(1))
    kept = encode(channel, sent, like, [{}], Turn(0, (0,)))[1][0]
    kinds = [v.dtype for p in like.values() for v in p.values()]
    return {g: tmap(lambda v: v.to(kinds[0]), p) for g, p in kept.items()}


def size(coded: Released, channel: Channel, like: Mapping[str, Params]) -> int:
    """Bytes of all tensors of these groups, each in its own type, of every client that is in it."""
    if coded.summed and like:  # of whose codes only the mean is here
        return len(coded.ids) * bytes_of(channel, like)
    return _bytes({g: coded.sent[g] for g in like})


def bytes_of(channel: Channel, like: Mapping[str, Params]) -> int:
    """Of the code of one client's groups."""
    shapes = tuple((g, n, v.shape, v.dtype) for g, p in like.items() for n, v in p.items())
    try:
        return _length((*channel,), shapes)
    except TypeError:  # a stage of somebody's own that has no hash
        return _bytes(layout(channel, like))


@lru_cache(64)
def _length(
    channel: tuple[Stage, ...], shapes: tuple[tuple[str, str, torch.Size, torch.dtype], ...]
) -> int:
    """The same, found by coding zeros: once for a run, and not in every round."""
    like: dict[str, Params] = {}
    for group, name, shape, kind in shapes:
        like.setdefault(group, {})[name] = torch.zeros(shape, dtype=kind)
    return _bytes(layout(channel, like))


def _bytes(groups: Mapping[str, Params]) -> int:
    return nbytes(v for g in groups.values() for v in g.values())
