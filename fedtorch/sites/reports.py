"""Checks a site's report, which counts for nothing before, and judges the visits of a round."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fedtorch.channel import base as channel
from fedtorch.engines import messages, wire
from fedtorch.engines.messages import Expected
from fedtorch.engines.wire import Message, MessageError
from fedtorch.privacy import Privacy
from fedtorch.privacy.clipping import joint_norms
from fedtorch.privacy.release import FIGURES
from fedtorch.recipe import Recipe
from fedtorch.strategies.still import sends, uploads
from fedtorch.training.personal import personal, shared
from fedtorch.tree import expand, row, to_float64
from fedtorch.types import CLIP_BIT, ConfigError, Failure, Params, Released, Task

REASONS = {
    "nonfinite": "its update is not finite",
    "error": "its model or data raised an error",
    "budget": "its privacy budget is spent",
    "declined": "it declined what the round's sum would be of",
}
"""Why a site may say that it has no update, and how that is put: in words of ours."""
LONGEST = 1e18
"""Norm beyond which an update is refused: float32 cannot hold its square, nor weights it is added to."""
FACTS = {"run", "visit", "round", "ids", "summed", "failures"}


@dataclass(frozen=True)
class Reader:
    """Reads the reports of one run."""

    expected: Expected
    recipe: Recipe
    figures: tuple[frozenset[str], ...]
    """Which figures a report has: all that the recipe tells or, from a site that is strict, fewer."""
    like: dict[str, Params]
    """What the strategy makes a site send, before a channel encodes it."""
    most_examples: int
    """Largest number of examples a site may say it has: where clients are weighed by size, its weight."""

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module, most_examples: int) -> "Reader":
        """What this model and recipe make a site send."""
        state = dict(model.named_parameters())
        params = {k: state[k].detach() for k in shared(model, recipe.strategy.personal)}
        kinds = [figures(recipe)]
        if recipe.privacy.per_client:
            strict = replace(recipe.privacy, strict=True)
            kinds.append(figures(replace(recipe, privacy=strict)))
        known = expected(recipe, params, model)
        like = uploads(recipe.strategy, params, recipe.strategy.init(params))
        return cls(known, recipe, tuple(dict.fromkeys(kinds)), like, most_examples)

    def header_limit(self) -> int:
        """Bytes of the largest header that an honest report can have."""
        trees: dict[str, Iterable[str]] = {f"sent/{g}": t for g, t in self.expected.sent.items()}
        trees |= {"buffers": self.expected.buffers, "metrics": self.figures[0], "": ("weight",)}
        return wire.header_room(trees)

    def read(self, site: str, task: Task, message: Message) -> Released | Failure:
        """The update, or the site's reason to send none; raises MessageError for anything else."""
        if odd := sorted(message.facts.keys() - FACTS):
            raise MessageError(f"it says {wire.short(odd[0])}, which no report does")
        if message.facts.get("round") != task.round:
            raise MessageError("it is about another round")
        own = {"buffers", "metrics", "", *(f"sent/{g}" for g in self.expected.sent)}
        if odd := sorted(message.groups.keys() - own):
            raise MessageError(f"it sends {wire.short(odd[0])}, which no report has")
        outcome = Message("outcome", message.facts, message.groups)
        update, failures, _ = messages.read_outcome(outcome, [site])
        if not update.ids:
            if failures[0].kind not in REASONS:
                raise MessageError("it gives no reason that is known")
            return Failure(site, failures[0].kind, REASONS[failures[0].kind])
        messages.check(update, self.expected.without(self.rests(task)))
        self._sane(update)
        whole = self._decoded(update, task)
        norm = float(joint_norms({g: s for g, s in whole.sent.items() if g != CLIP_BIT}))
        if not norm <= LONGEST:
            raise MessageError(f"its update has norm {norm:.3g}; at most {LONGEST:g} is taken")
        # what a channel has decoded the server clips itself
        if self.recipe.privacy.central and not self.recipe.channel:
            _clipped(norm, task.privacy["clip"])
        if CLIP_BIT in update.sent and abs(float(update.sent[CLIP_BIT]["bit"])) != 0.5:
            raise MessageError("its bit for the clipping norm is neither 1/2 nor -1/2")
        return update

    def rests(self, task: Task) -> set[str]:
        """Weights that this round's visits do not send."""
        return self.recipe.strategy.rests(self.like["delta"], task.extras)

    def _decoded(self, update: Released, task: Task) -> Released:
        try:
            return channel.decode(self.recipe.channel, update, self.like, channel.Turn.of(task))
        except (ValueError, RuntimeError, IndexError) as e:
            raise MessageError(f"its code cannot be decoded: {wire.short(str(e))}") from e

    def _sane(self, update: Released) -> None:
        """Figures and weight must be such as a visit has."""
        if update.metrics.keys() not in self.figures:
            odd = sorted(update.metrics.keys() ^ self.figures[0])
            raise MessageError(f"its figures are not those of a visit: {wire.short(odd[0])}")
        for name in update.metrics.keys() & {"examples", "visited", "steps"}:
            count = float(update.metrics[name])
            least = 1 if name == "examples" else 0
            if count != int(count) or not least <= count <= 1e15:
                raise MessageError(f"its figure {name!r} is no count")
        if "examples" in update.metrics and float(update.metrics["examples"]) > self.most_examples:
            raise MessageError(
                f"it says that it has more than {self.most_examples:,} examples (--most-examples)"
            )
        if abs(float(update.metrics.get("train_loss", 0))) > torch.finfo(torch.float32).max:
            raise MessageError("its figure 'train_loss' is no loss")
        if not 0 <= float(update.metrics["update_norm"]) <= LONGEST:
            raise MessageError("its figure 'update_norm' is no length")
        sized = self.recipe.weighting == "examples"
        if float(update.weight) != (float(update.metrics["examples"]) if sized else 1):
            raise MessageError(f"its weight is not {'its number of examples' if sized else '1'}")


def _clipped(norm: float, clip: float) -> None:
    """Under client-level privacy nobody moves the sum by more than the clipping norm."""
    if norm > clip * (1 + 1e-6):
        raise MessageError(f"its update has norm {norm:.6g}, above the clipping norm {clip:.6g}")


def figures(recipe: Recipe) -> frozenset[str]:
    """Names of the figures that a client tells under this recipe."""
    return frozenset(recipe.privacy.disclosed(dict.fromkeys(FIGURES, torch.ones(1))))


def expected(recipe: Recipe, params: Params, model: nn.Module) -> Expected:
    """Names, shapes and dtypes of an honest update: an upload of a visit that changed nothing."""
    like = uploads(recipe.strategy, params, recipe.strategy.init(params))
    whole = sends(recipe.strategy, params, recipe.strategy.init(params))
    sent = {g: to_float64(expand(p)) for g, p in (whole | recipe.privacy.beside).items()}
    if (
        recipe.privacy.claims and not recipe.privacy.masked
    ):  # adaptive clipping sends one number more
        task = Task({}, {}, 0, 0, 1.0, {"clip": 1.0, "noise": 1.0})
        sent = recipe.privacy.client(sent, torch.ones(1), task, ["nobody"])
    if recipe.channel:
        sent = sent | {g: expand(p) for g, p in channel.layout(recipe.channel, like).items()}
    own = personal(model, recipe.strategy.personal)
    floats = {k: b for k, b in model.named_buffers() if b.is_floating_point() and k not in own}
    # private clients send no statistics of their data
    floats = floats if recipe.privacy.statistics else {}
    return Expected(
        {g: messages.schema(row(s, 0)) for g, s in sent.items()},
        messages.schema(floats),
    )


@dataclass(eq=False)
class Assignment:
    """One site's part in one round."""

    site: str
    task: Task
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    asked: float = field(default_factory=time.monotonic)
    taken: bool = False
    outcome: Released | Failure | None = None
    place: int = 0
    """Reports of the round that were there when this one came, itself included."""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0

    @property
    def updated(self) -> bool:
        """Whether it brought an update."""
        return isinstance(self.outcome, Released)

    def missed(self, why: str) -> None:
        """It brought nothing in time: late, or absent if the site never asked for the task."""
        self.outcome = Failure(self.site, "late" if self.taken else "absent", why)


def judge(
    visits: Sequence[Assignment], most: int, least: int, deadline: float
) -> Sequence[Assignment]:
    """Give every visit of a round that is over its outcome; the order stays.

    Of the updates the ``most`` that came first count, and none when there are fewer than ``least``.
    """
    first = sorted((v for v in visits if v.updated), key=lambda v: v.place)[:most]
    for visit in visits:
        if visit.outcome is None or (visit.updated and visit not in first):
            full = len(first) == most
            visit.missed(f"{most} others had reported" if full else f"no report in {deadline:g} s")
        elif visit.updated and len(first) < least:
            few = f"only {len(first)} sites reported"
            visit.outcome = Failure(visit.site, "toofew", few)
    return visits


def check_enough(enough: int, minimum: int, sites: int, privacy: Privacy) -> None:
    """Refuse over-selection where it would void what a privacy plan promises, and numbers without sense."""
    if not minimum <= enough <= sites:
        raise ConfigError(
            f"enough must be between minimum ({minimum}) and the {sites} sites, got {enough}"
        )
    if privacy.central:
        raise ConfigError(
            "enough voids the claim of client-level privacy: were one client not there, a slower one "
            "would take its place, and the sum would change by twice the clipping norm; leave it out"
        )
    if privacy.strict:
        raise ConfigError(
            "privacy.strict keeps from everybody how long sites take, but with enough the model "
            "depends on who was first; leave one of them out"
        )
