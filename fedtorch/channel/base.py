"""A stage of the channel: after the privacy plan, before the wire. What is raw it never sees."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
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
    contracts: ClassVar[bool] = False
    """Whether no update is ever longer decoded than before it was encoded, not even by rounding."""

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
    stage: Stage, released: Released, unsent: Mapping[str, Stack], groups: Collection[str]
) -> tuple[Released, dict[str, Stack]]:
    """What is sent in place of ``released``, and what of it stays unsent, by group, [K, ...].

    ``groups``: the strategy's; what a plan sends besides goes as it is. Raises TypeError for anything that
    no plan has released.
    """
    if not isinstance(released, Released):
        raise TypeError(f"a channel is for what is released, not for {type(released).__name__}")
    sent, left = dict(released.sent), dict[str, Stack]()
    for group in groups:
        whole = sent[group]
        if stage.feedback:
            whole = tmap(torch.add, whole, unsent[group])
        sent[group] = stage.encode(whole)
        if stage.feedback:
            left[group] = tmap(torch.sub, whole, stage.decode(sent[group], row(whole, 0)))
    return replace(released, sent=sent), left


def decode(stage: Stage, coded: Released, like: Mapping[str, Params]) -> Released:
    """What was sent, as the aggregator takes it; ``like``: a group's names and shapes."""
    own = {group: stage.decode(coded.sent[group], shapes) for group, shapes in like.items()}
    return replace(coded, sent={**coded.sent, **own})


def size(code: Mapping[str, Stack]) -> int:
    """Bytes of all tensors, each in its own type."""
    return sum(v.numel() * v.element_size() for group in code.values() for v in group.values())
