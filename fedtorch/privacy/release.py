"""The one way out for what clients learned: clip and noise of the plan, and no side door."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, from_numpy

from fedtorch.tree import expand, moving, per_client, sq_norms, tmap
from fedtorch.types import NUMBERS, Params, Raw, Released, Stack, Task

FIGURES = frozenset(("train_loss", "examples", "visited", "steps", "update_norm"))
"""Figures of a visit that a client may tell at most, each by its name."""

LARGEST_LOSS = 1e6
"""Under a plan losses beyond it, or that are no numbers, are told as this."""

ToSend = tuple[dict[str, Stack], Stack, Tensor, Tensor]
"""What is sent, buffers, norms as they are sent, and who was finite."""


class Guard(Protocol):
    """What the way out asks of a privacy plan."""

    claims: ClassVar[bool]
    statistics: ClassVar[bool]

    @property
    def always_reports(self) -> bool:
        """Whether a client whose update is not finite sends zero."""

    def client(
        self, sent: dict[str, Stack], examples: Tensor, task: Task, ids: Sequence[str]
    ) -> dict[str, Stack]:
        """What leaves the client in place of ``sent``, each group [K, ...]."""

    def scale(self, norms: Tensor, examples: Tensor, task: Task) -> Tensor:
        """What each update is multiplied by, [K], where a sum will do."""

    def disclosed(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Figures that clients may report under the plan, of ``figures``, [K] each."""

    @property
    def beside(self) -> dict[str, Params]:
        """What a client sends for the plan's own figures, in names and shapes."""

    def tell(self, examples: Tensor, task: Task, id: str) -> Tensor:
        """What one client sends for them."""


def let_go(plan: Guard, raw: Raw, task: Task) -> tuple[Released, Tensor]:
    """What leaves the clients, and whose visit was finite, [K] bool (``Privacy.release``)."""
    found = _mean(plan, raw, task) if raw.groups is None else _each(plan, raw, task)
    sent, buffers, norms, good = found
    keep = _reporting(plan, good)
    ids, weight = raw.ids, raw.weight
    figures = plan.disclosed(raw.figures | {"update_norm": norms})
    if not keep.all():  # a mask copies everything
        ids = tuple(i for i, k in zip(ids, keep.tolist(), strict=True) if k)
        weight, figures = weight[keep], {name: v[keep] for name, v in figures.items()}
        if raw.groups is not None:
            sent = {g: {n: v[keep] for n, v in s.items()} for g, s in sent.items()}
            buffers = {n: v[keep] for n, v in buffers.items()}
    if raw.groups is not None:
        buffers = moving(buffers, task.state)
    released = Released.received(ids, sent, buffers, weight, figures, raw.groups is None)
    return released, good if raw.settled is None else good & raw.settled


def _reporting(plan: Guard, good: Tensor) -> Tensor:
    return torch.ones_like(good) if plan.always_reports else good


def _each(plan: Guard, raw: Raw, task: Task) -> ToSend:
    """Every client's own upload, its buffers, its norm as it is sent, and whether it was finite."""
    groups = raw.groups or {}
    norms = {g: sq_norms(s) for g, s in groups.items()}
    good = torch.stack([n.isfinite() for n in norms.values()]).all(0).cpu()
    if raw.settled is not None and not plan.claims:
        good = good & raw.settled
    if plan.claims:
        groups = plan.client(groups | _told(plan, raw, task), raw.examples, task, raw.ids)
        norms["delta"] = sq_norms(groups["delta"])
    if raw.measured:  # which a plan that claims anything refuses
        scale, numbers = raw.measured(norms["delta"].sqrt().cpu())
        delta = tmap(lambda v: v * per_client(scale, v), groups["delta"])
        groups = groups | {"delta": delta} | ({NUMBERS: numbers} if numbers else {})
    buffers = raw.results.rows()[1] if plan.statistics else {}
    buffers = {k: v for k, v in buffers.items() if k not in raw.personal}
    return groups, buffers, norms["delta"].sqrt().cpu(), good


def _mean(plan: Guard, raw: Raw, task: Task) -> ToSend:
    """The same of the weighted mean of those that are finite, each scaled: one row."""
    # where the plan clips by a norm it must not be less than the exact one
    norms = raw.results.sq_norms(upper=plan.always_reports).cpu().sqrt()
    if raw.settled is not None and not plan.claims:
        norms = torch.where(raw.settled, norms, torch.nan)
    fine = np.isfinite(norms.numpy())  # by torch four calls of a microsecond or more
    good, part, share = from_numpy(fine), plan.scale(norms, raw.examples, task), raw.weight.double()
    if not fine.all():
        norms, part = torch.where(good, norms, 0), torch.where(good, part, 0.0)
        share = torch.where(counted := _reporting(plan, good), share, 0)
        if not counted.any():
            return {"delta": {}}, {}, norms, good
    share = share / share.sum()
    scaled, numbers = share * part, dict[str, Tensor]()
    if raw.measured:
        scale, numbers = raw.measured(norms)
        scaled = scaled * scale
    sent = {"delta": expand(raw.results.weighted_sum(scaled))}
    for group, (times, alike) in raw.following.items():
        found = raw.results.weighted_sum(share * part * times)
        sent[group] = {n: v[None] + alike[n].to(v) for n, v in found.items()}
    if numbers:
        sent[NUMBERS] = {n: (share @ v)[None] for n, v in numbers.items()}
    for group, stack in _told(plan, raw, task).items():
        sent[group] = {n: (share @ v)[None] for n, v in stack.items()}
    buffers = raw.results.mean_buffers(share) if plan.statistics else {}
    return sent, buffers, norms * part, good


def _told(plan: Guard, raw: Raw, task: Task) -> dict[str, Stack]:
    """What the plan's own figures are sent as, [K, ...] each; zeros where none are due."""
    clients, names = len(raw.ids), plan.beside
    if not raw.told:
        return {g: {n: v.expand(clients, *v.shape) for n, v in p.items()} for g, p in names.items()}
    rows = [plan.tell(e, task, i) for e, i in zip(raw.told, raw.ids, strict=True)]
    return {g: dict.fromkeys(p, torch.stack(rows)) for g, p in names.items()}


def finite_loss(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """With losses that are numbers: a server takes others for a broken message, and drops the client."""
    if "train_loss" not in figures:
        return figures
    loss = figures["train_loss"].nan_to_num(LARGEST_LOSS).clamp(-LARGEST_LOSS, LARGEST_LOSS)
    return figures | {"train_loss": loss}
