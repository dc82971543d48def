"""A stage of the channel: after the privacy plan, before the wire. What is raw it never sees."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from fedtorch.options import check
from fedtorch.tree import row, tmap
from fedtorch.types import Params, Released, Stack

UNSENT = "unsent/"
"""Before the name of a group in a client's memory: what its codes have left out so far."""


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """One way to send less; one of your own overrides ``encode`` and ``decode``.

    Error feedback (Seide et al. 2014; Stich et al. 2018, arXiv:1809.07599): a client encodes its update
    and what earlier codes left out, together, and keeps what this code leaves out. A code that is biased,
    as that of the largest numbers is, needs it to reach what training without a channel reaches.
    """

    linear: ClassVar[bool] = False
    """Whether the sum of codes decodes to the sum of updates."""

    feedback: bool = True
    """Clients keep what was left out, and add it to their next update."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check(self, "channel")

    @abstractmethod
    def encode(self, sent: Stack) -> Stack:
        """One group of K clients, [K, ...] each in float64 -> tensors of any names and types, [K, ...].

        Their shapes hang on the group's alone. They travel as they are, and are counted so.
        """

    @abstractmethod
    def decode(self, code: Stack, like: Params) -> Stack:
        """What ``encode`` made, in float64 and in the names and shapes of ``like``, [K, ...].

        Raises ValueError for a code that ``encode`` does not make: at the server it came from outside.
        """


def encode(
    channel: Sequence[Stage],
    released: Released,
    groups: Collection[str],
    memory: Sequence[Mapping[str, Params]],
) -> tuple[Released, list[dict[str, Params]]]:
    """What K clients send in place of ``released``, and what each has to remember of it, [K].

    ``groups``: the strategy's; what a plan sends besides goes as it is. ``memory``: of each client. Raises
    TypeError for anything that no plan has released.
    """
    if not isinstance(released, Released):
        raise TypeError(f"a channel is for what is released, not for {type(released).__name__}")
    left: list[dict[str, Params]] = [{} for _ in memory]

    def code(stage: Stage, group: str, whole: Stack) -> Stack:
        name = UNSENT + group
        for n, v in whole.items() if stage.feedback else ():
            earlier = [m[name][n].to(v) if name in m else torch.zeros_like(v[0]) for m in memory]
            whole = whole | {n: v + torch.stack(earlier)}
        made = stage.encode(whole)
        if stage.feedback:
            over = tmap(torch.sub, whole, stage.decode(made, row(whole, 0)))
            for k, mine in enumerate(left):
                mine[name] = row(over, k)
        return made

    for stage in channel:
        released = released.mapped(partial(code, stage), groups)
    return released, left


def decode(channel: Sequence[Stage], coded: Released, like: Mapping[str, Params]) -> Released:
    """What was sent, as the aggregator takes it; ``like``: a group's names and shapes."""
    for stage in channel:
        coded = coded.mapped(partial(_decoded, stage, like), like)
    return coded


def _decoded(stage: Stage, like: Mapping[str, Params], group: str, code: Stack) -> Stack:
    return stage.decode(code, like[group])


def size(coded: Released, groups: Collection[str]) -> int:
    """Bytes of all tensors of these groups, each in its own type."""
    return sum(v.numel() * v.element_size() for g in groups for v in coded.sent[g].values())
