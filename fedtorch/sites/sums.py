"""What stands in a secure sum of a run: the same for its server and for every site that joined its plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtorch.privacy.clipping import joint_norms
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.encode import (
    Coding,
    Figures,
    Layout,
    from_words,
    seal,
    shortened,
    to_words,
    unseal,
)
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import Member, Terms, task_digest
from fedtorch.sites.offer import Plan
from fedtorch.sites.reports import Reader
from fedtorch.tree import expand, row
from fedtorch.types import CLIP_BIT, ConfigError, Released, Task


@dataclass(frozen=True)
class Sums:
    """Terms and coding of the sums of one run."""

    reader: Reader
    """Knows what this model and recipe make a site send."""
    secure: Secure

    @property
    def noised(self) -> bool:
        """Whether what a site sends is noised there, and charged, each time that it is asked."""
        return self.reader.recipe.privacy.per_client

    @property
    def tells(self) -> bool:
        """Whether examples and losses ride in the sum: where each site's own noise counts, they do not."""
        return not self.noised

    def layout(self, task: Task) -> Layout:
        """Where what stands; weights that rest in this round are not in it."""
        return layout_of(self.reader, task)

    def terms(
        self,
        run: str,
        attempt: bytes,
        members: Sequence[Member],
        threshold: int,
        task: Task,
    ) -> Terms:
        """Of one attempt; ``task`` is filled. Raises Refused for terms that nobody should accept."""
        if threshold < (least := self.secure.needed(len(members))):
            why = f"a threshold of {threshold} is below the {least} of {len(members)} that the plan has"
            raise Refused("terms", why)
        if (privacy := self.reader.recipe.privacy).masked:
            try:
                privacy.holds(len(members), threshold)
            except ConfigError as e:
                raise Refused("terms", str(e)) from e
        made = self.secure.terms(
            run=run,
            round=task.round,
            attempt=attempt,
            task=task_digest(task),
            members=tuple(members),
            size=self.layout(task).size,
            privacy=privacy,
        )
        made = replace(made, threshold=threshold)
        made.check()
        return made

    def seal(self, terms: Terms, update: Released, task: Task) -> np.ndarray:
        """One site's update as words, ready for its masks; raises Refused where it is not finite."""
        weight = float(update.weight) / self._cap
        figures = Figures(min(weight, 1.0))
        if self.tells:
            told = update.metrics
            figures = Figures(figures.weight, float(told["examples"]), float(told["train_loss"]))
        laid = self.layout(task)
        values, coding = as_vector(laid, update, task), _coding(terms)
        if self.reader.recipe.privacy.central and terms.width == 32:
            values = shortened(coding, values, task.privacy["clip"], laid.places(CLIP_BIT))
        return to_words(seal(coding, values, figures), terms.width)

    def unseal(self, terms: Terms, words: np.ndarray, ids: Sequence[str], task: Task) -> Released:
        """The update of all of ``ids`` together; raises Refused for a sum that they cannot have.

        Figures are those of all, parted alike.
        """
        values, figures = unseal(_coding(terms), from_words(words), len(ids))
        figures = replace(figures, weight=figures.weight * self._cap)
        total = together(self.layout(task), values, ids, task, figures, self.tells)
        norm = float(joint_norms({g: s for g, s in total.sent.items() if g != CLIP_BIT}))
        clip = task.privacy.get("clip", 0.0)
        if self.reader.recipe.privacy.central and norm > clip * (1 + 1e-6):
            raise Refused(
                "sum", f"the mean has norm {norm:.6g}, above the clipping norm {clip:.6g}"
            )
        return total

    @property
    def _cap(self) -> float:
        return self.secure.weight_cap or 1.0


def layout_of(reader: Reader, task: Task) -> Layout:
    """Where what stands in a sum of a round; weights that rest in it are not in it."""
    expected = reader.expected.without(reader.rests(task))
    sent = {g: {k: tuple(s) for k, (s, _) in names.items()} for g, names in expected.sent.items()}
    return Layout.of(sent, {k: tuple(s) for k, (s, _) in expected.buffers.items()})


def as_vector(layout: Layout, update: Released, task: Task) -> np.ndarray:
    """One site's update as a vector, of buffers what its visit added to them; ``task`` is filled."""
    own = {g: row(s, 0) for g, s in update.sent.items()}
    changes = {k: v[0].double() - task.state[k].double() for k, v in update.buffers.items()}
    return layout.flat(own, changes)


def together(
    layout: Layout, mean: np.ndarray, ids: Sequence[str], task: Task, figures: Figures, tells: bool
) -> Released:
    """The update of all of ``ids`` together: their mean, and figures of all, parted alike.

    ``tells``: examples and losses have come with it.
    """
    sent, changes = layout.unflat(mean)
    each = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
    loss = torch.full_like(each, figures.loss)
    told = {"examples": each * figures.examples, "train_loss": loss} if tells else {}
    return Released.received(
        ids=tuple(ids),
        sent={g: expand(s) for g, s in sent.items()},
        buffers=expand({k: task.state[k].double() + v for k, v in changes.items()}),
        weight=each * figures.weight,
        metrics={"clamped": each * figures.clamped, **told},
        summed=True,
    )


def check_apart(plan: Plan) -> None:
    """Refuse what sites would tell beside the sum, or in one of few; raises ConfigError."""
    if isinstance(plan.aggregator, Secure) and plan.aggregator.neighbours is not None:
        raise ConfigError(
            "aggregator.neighbours is for simulations: against a server that lies to some, every site "
            "shares masks with all others; leave it out"
        )
    if plan.standardize:
        raise ConfigError(
            "standardize has each site tell the server statistics of its own columns, in no sum of all: "
            "with aggregator secure (or he) leave it out, and let sites scale by public numbers "
            "(dataset.bounds)"
        )


def _coding(terms: Terms) -> Coding:
    return Coding(terms.width, len(terms.members), terms.range, terms.scale)
