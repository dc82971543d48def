"""Clients who lie, in a simulation: what they train on, and what they send in place of what they learned.

A liar of the rows sees what every honest client sends in the round. Whoever claims that a rule holds has
to try it against these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.aggregation.mean import Aggregator, Gathering, Held
from fedtorch.client import Client
from fedtorch.options import ANY, COUNT, NOT_NEGATIVE, check
from fedtorch.tree import split
from fedtorch.types import ConfigError, Params, Released


@dataclass(frozen=True, kw_only=True)
class Threat:
    """So many clients lie, drawn by the run's seed; one of your own overrides ``rows`` or ``data``."""

    liars: int = 1
    """How many of all clients lie."""

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        ranges = dict.fromkeys(("scale", "std", "epsilon"), NOT_NEGATIVE)
        check(self, "threat", liars=COUNT, classes=COUNT, z=ANY, **ranges)

    def who(self, ids: Sequence[str], seed: int) -> tuple[str, ...]:
        """Ids of those who lie."""
        if self.liars >= len(ids):
            raise ConfigError(
                f"threat.liars {self.liars} leaves no honest one of {len(ids)} clients: take fewer"
            )
        drawn = torch.randperm(len(ids), generator=seeds.generator(seed, "liars"))
        return tuple(sorted(ids[k] for k in drawn[: self.liars].tolist()))

    def fits(self, data: Sequence[Dataset]) -> None:
        """Raises ConfigError where the data of all clients are not what it needs."""

    def fitted(self, data: Sequence[Dataset]) -> "Threat":
        """With what was left open, found in the data of all clients."""
        return self

    def data(self, data: Dataset) -> Dataset:
        """What a liar trains on in place of its own data."""
        return data

    def idle(self, clients: int) -> str:
        """Why it harms nobody among so many clients, and what would; empty: it may."""
        return ""

    def triggered(self, test: Dataset) -> Dataset | None:
        """Rows on which accuracy is the attack's success; none: it is what the honest rows lose."""
        return None

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """What liars send, [L, d] in float64, from what honest ones send, [H, d], and what they learned."""
        return own


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """An aggregator that liars send to: it sees their rows in place of what they learned."""

    linear: ClassVar[bool] = False

    rule: Aggregator
    threat: Threat
    who: tuple[str, ...]

    def start(
        self, held: Held | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> "Forged":
        """Nobody yet."""
        return Forged(self.rule.start(held, seed, dtype), self.threat, self.who, seed)


def attacked(
    recipe: Any, clients: Sequence[Client], threat: Threat, seed: int
) -> tuple[Any, list[Client]]:
    """The recipe and the clients with liars among them; raises ConfigError where clients are elsewhere."""
    if not all(isinstance(c, Client) for c in clients):
        raise ConfigError(
            "threat is for simulations, and these clients are elsewhere: leave it out"
        )
    threat.fits([c.data for c in clients])
    threat = threat.fitted([c.data for c in clients])
    trusted = getattr(
        recipe.aggregator, "trusts", None
    )  # it does not lie, or the rule would mean nothing
    who = threat.who(sorted(c.id for c in clients if c.id != trusted), seed)
    own = [_lying(c, threat) if c.id in who else c for c in clients]
    return replace(recipe, aggregator=Attacked(rule=recipe.aggregator, threat=threat, who=who)), own


def _lying(client: Client, threat: Threat) -> Client:
    data = threat.data(client.data)
    if data is client.data:
        return client
    return Client(client.id, data, client.validation, sampler=client.sampler)


@dataclass
class Forged:
    """Keeps a round's updates until the liars have seen the honest ones."""

    rule: Gathering
    threat: Threat
    who: tuple[str, ...]
    seed: int
    came: list[Released] = field(default_factory=list)
    """One client each."""

    @property
    def held(self) -> Held:
        """The rule's."""
        return self.rule.held

    @property
    def figures(self) -> dict[str, Any]:
        """The rule's, and who lied."""
        here = [u.ids[0] for u in self.came if u.ids[0] in self.who]
        return self.rule.figures | ({"liars": sorted(here)} if here else {})

    def add(self, update: Released) -> None:
        """Each client by itself, copied: what a worker sends it overwrites with the next client."""
        for k, id in enumerate(update.ids):
            one = slice(k, k + 1)
            sent = {g: {n: v[one].clone() for n, v in s.items()} for g, s in update.sent.items()}
            floats = {n: v[one].clone() for n, v in update.buffers.items()}
            figures = {n: v[one] for n, v in update.metrics.items()}
            weight = update.weight[one]
            self.came.append(Released.received((id,), sent, floats, weight, figures))

    def sums(self) -> dict[str, Params]:
        """Raises TypeError: liars are not of the sum that noise is made for."""
        raise TypeError("an attacked rule takes no sum")

    def result(self, start: Params) -> tuple[dict[str, Params], Params]:
        """What the rule makes of honest and forged updates, in the order of ids."""
        came = sorted(self.came, key=lambda u: u.ids)
        lying = [u for u in came if u.ids[0] in self.who]
        honest = [u for u in came if u.ids[0] not in self.who]
        forged = {}
        if lying and honest:
            rows = self.threat.rows(_as_rows(honest), _as_rows(lying), self.seed)
            forged = {u.ids[0]: row for u, row in zip(lying, rows, strict=True)}
        for update in came:
            if update.ids[0] in forged:
                shapes = {n: v.shape[1:] for n, v in update.sent["delta"].items()}
                delta = split(forged[update.ids[0]].double()[None], shapes)
                update = update.beside({"delta": delta})
            self.rule.add(update)
        return self.rule.result(start)


def _as_rows(updates: Sequence[Released]) -> Tensor:
    rows = [
        torch.cat([v.double().cpu().flatten() for v in u.sent["delta"].values()]) for u in updates
    ]
    return torch.stack(rows)
