"""Gradient inversion: examples of clients out of what they send, plain, under privacy and under masks.

Each client takes the step that gives away most: of few examples, all in one batch. What is attacked is
what the trust model lets somebody see, taken from a round of the real server. The owner of the data holds
the result against the true examples, which no attacker has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch.aggregation.mean import Mean
from fedtorch.attacks import reconstruct
from fedtorch.attacks.masks import masked
from fedtorch.attacks.seen import only_mean, seen, who_sees
from fedtorch.client import Client
from fedtorch.options import COUNT, POSITIVE, check, fit, typed
from fedtorch.privacy import DEFAULT, Nothing
from fedtorch.recipe import Recipe
from fedtorch.secure.roster import LEAST
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.outline import copied
from fedtorch.training.step import pair
from fedtorch.types import ConfigError, Params

GOOD = 20.0
"""Decibels from which one sees what a picture shows."""
MANY, FEW = 10, 2
"""Clients that are attacked unless told otherwise: by division, and by search, which takes seconds."""


@dataclass(frozen=True, kw_only=True)
class GradientAttack:
    """Options of ``invert``."""

    clients: int | None = None
    """How many clients are attacked; none: 10, and 2 where each takes seconds."""
    examples: int = 1
    """Examples that each client has in its batch."""
    steps: int = 1
    """Local steps of each client, all of them on that batch."""
    epsilon: float = 8.0
    """Of the private twin of a run without a plan: all of it is spent in this one step, at delta 1e-5."""
    way: Literal["auto", "divide", "match"] = "auto"
    """divide: out of a first linear layer, exact for an example alone; match: look for an example with that
    gradient; auto: divide where the model has such a layer."""

    def __post_init__(self) -> None:
        """Refuse what is no number of clients, examples, steps, or no epsilon."""
        check(self, "attack", clients=COUNT, examples=COUNT, steps=COUNT, epsilon=POSITIVE)


@dataclass(frozen=True)
class View:
    """What one party sees, and what an attack makes of it."""

    name: str
    who: str
    """Who sees what."""
    found: Tensor
    """An example for each that is held, cut to the range of the data, [N, ...]."""
    near: Tensor
    """How near, in decibels, [N]."""
    own: bool = False
    """Whether it is what the run itself lets somebody see."""

    @property
    def middle(self) -> float:
        """Median decibels."""
        return float(self.near.median())


@dataclass(frozen=True)
class Inverted:
    """What came of the attack."""

    way: str
    held: Tensor
    """The true examples, [N, ...]."""
    low: float
    high: float
    views: tuple[View, ...]
    notes: tuple[str, ...] = ()
    mean_off: float | None = None
    """Largest difference of the mean opened under masks to the true mean."""

    def table(self) -> dict[str, Any]:
        """For a file: figures, and no example."""
        rows = {
            v.name: {
                "who_sees_what": v.who,
                "this_run": v.own,
                "psnr_median": round(v.middle, 3),
                "psnr": [round(n, 3) for n in v.near.tolist()],
                "above_20_decibels": int((v.near > GOOD).sum()),
            }
            for v in self.views
        }
        off = {} if self.mean_off is None else {"mean_under_masks_is_off_by": self.mean_off}
        return {
            "attack": "gradient",
            "way": self.way,
            "examples": len(self.held),
            "views": rows,
            **off,
        }


def invert(
    model: nn.Module,
    clients: Sequence[Client],
    recipe: Recipe,
    options: GradientAttack = GradientAttack(),
    *,
    seed: int = 0,
) -> Inverted:
    """Attack the first step of some clients, each on its first examples, from the weights of ``model``.

    Shown are a plain step, the same under the recipe's own plan (or, where it has none, one that spends
    ``options.epsilon`` in this step), one message under masks, and the mean that masks let through. Raises
    ConfigError where data, model or recipe do not fit.
    """
    fit("options of the attack", options, GradientAttack)
    _plain_steps(recipe)
    everyone = _cut(clients, options.examples)
    x, y = _examples(everyone[:1])
    layer = reconstruct.first_layer(copied(model), x[:1])
    way = _way(options, layer, y)
    victims = everyone[: options.clients or (MANY if way == "divide" else FEW)]
    x, y = _examples(victims)
    low, high = float(x.min()), float(x.max())
    if not low < high:
        raise ConfigError(
            "attack gradient: all numbers of the examples are alike, and nothing is to be found"
        )
    attack = _Attack(model, victims, everyone, x, low, high, layer or "", recipe, options, seed)
    return attack.run(way)


@dataclass(frozen=True)
class _Attack:
    """One attack under way."""

    model: nn.Module
    clients: Sequence[Client]
    """Who is attacked."""
    everyone: Sequence[Client]
    """Who takes part where what is seen is a mean."""
    x: Tensor
    low: float
    high: float
    layer: str
    recipe: Recipe
    options: GradientAttack
    seed: int
    notes: list[str] = field(default_factory=list)

    def run(self, way: str) -> Inverted:
        """All views, in the order in which they are shown."""
        find: Callable[[Sequence[Params]], Tensor | None]
        find = self._divided if way == "divide" else self._matched
        plain = replace(
            self.recipe, privacy=Nothing(), aggregator=Mean(), channel=(), steps=self.options.steps,
            batch_size=None,
        )  # fmt: skip
        sent = seen(self.model, self.clients, plain, self.seed)
        views, off = [*self._views(find, sent)], None
        if way == "divide" and len(self.clients) >= LEAST:
            more, off = self._under_masks(sent)
            views += more
        return Inverted(way, self.x, self.low, self.high, tuple(views), tuple(self.notes), off)

    def _views(
        self, find: Callable[[Sequence[Params]], Tensor | None], sent: Sequence[Params]
    ) -> Iterator[View]:
        claims, hides = self.recipe.privacy.claims, self.recipe.hides
        own = not claims and not hides
        yield self._view("plain", "the server, each client's plain update", find(sent), own)
        made = self._noised()
        crowd = self.everyone if only_mean(made) else self.clients
        try:
            found = find(seen(self.model, crowd, made, self.seed))
        except ConfigError as e:
            if claims:
                raise
            self.notes.append(f"the run has no private twin: {e}")
            return
        if found is None:
            self.notes.append(
                "under the run's plan one sees the mean of several clients, which no search takes apart: "
                "that view is left out"
            )
        else:
            yield self._view("private", who_sees(made), found, claims)

    def _noised(self) -> Recipe:
        """The recipe under its own plan, or under one that spends all in this step."""
        own = self.recipe
        if own.privacy.claims:
            steps = None if own.privacy.per_example else self.options.steps  # the plan has its own
            return replace(own, steps=steps, batch_size=None)
        plan = replace(
            DEFAULT,
            epsilon=self.options.epsilon, rounds=1, steps=1, sample_rate=1.0,
            batch_size=float(self.options.examples),
        )  # fmt: skip
        return replace(own, privacy=plan, aggregator=Mean(), channel=(), steps=None)

    def _under_masks(self, sent: Sequence[Params]) -> tuple[list[View], float]:
        """One client's message, and the mean of all."""
        like = sent[0]
        flat = [np.concatenate([v.double().flatten().numpy() for v in u.values()]) for u in sent]
        messages, mean = masked(flat)
        off = float(np.abs(mean - np.mean(flat, axis=0)).max())
        own = not self.recipe.privacy.claims and self.recipe.hides
        noise = self._divided([_parted(m, like) for m in messages])
        opened = self._divided([_parted(mean, like)])
        who, count = "the server under masks", len(self.clients)
        return [
            self._view("message", f"{who}, each client's message", noise, own),
            self._view(
                "mean",
                f"the server under masks, the mean of {count} clients (nearest row)",
                opened,
                own,
            ),
        ], off

    def _view(self, name: str, who: str, found: Tensor | None, own: bool) -> View:
        assert found is not None
        cut = found.view(self.x.shape).clamp(self.low, self.high)
        return View(name, who, cut, reconstruct.psnr(cut, self.x, self.low, self.high), own)

    def _divided(self, updates: Sequence[Params]) -> Tensor:
        """Of each update its first row, or where it is of several examples the row nearest to each."""
        head = f"{self.layer}." if self.layer else ""
        each = self.x.double().flatten(1).split(len(self.x) // len(updates))
        found = []
        for update, true in zip(updates, each, strict=True):
            rows = reconstruct.divide(
                update[f"{head}weight"].double(), update[f"{head}bias"].double()
            )
            alone = rows[: len(true)] if len(true) == 1 and len(rows) else None
            found.append(
                reconstruct.nearest(rows, true, self.low, self.high) if alone is None else alone
            )
        return torch.cat(found)

    def _matched(self, updates: Sequence[Params]) -> Tensor | None:
        """An example that has each update's gradient; None where an update is of several clients."""
        if len(updates) < len(self.x):
            return None
        found = []
        for update in updates:
            gradient = {k: -v.double() for k, v in update.items()}
            classes = _classes(self.model, self.x[:1])
            guess = reconstruct.label(reconstruct.last_of(gradient, classes))
            target = torch.tensor([guess])
            example, _ = reconstruct.match(
                self.model, self.recipe.asked, gradient, self.x.shape[1:], target, self.low, self.high,
                self.seed,
            )  # fmt: skip
            found.append(example)
        return torch.cat(found)


def _plain_steps(recipe: Recipe) -> None:
    name = str(recipe.client_optimizer.name).lower()
    if recipe.local is not None or name != "sgd":
        how = "a local update of their own" if recipe.local is not None else f"optimizer {name}"
        raise ConfigError(
            f"attack gradient reads gradients out of steps of SGD, and the run's clients have {how}: an "
            "attacker undoes that first, which this attack does not"
        )
    if recipe.strategy.personal or recipe.strategy.trains:
        raise ConfigError(
            f"attack gradient knows visits of plain local steps, of all weights, and strategy "
            f"{typed(recipe.strategy)} has others: attack a run of fedavg with the same model and data"
        )


def _cut(clients: Sequence[Client], examples: int) -> list[Client]:
    """The clients with no more than their first examples."""
    able = [c for c in clients if len_of(c.data) >= examples]
    if not able:
        raise ConfigError(f"attack.examples {examples} is more than any client has: take fewer")
    return [Client(c.id, fetch(c.data, torch.arange(examples))) for c in able]


def _examples(clients: Sequence[Client]) -> tuple[Tensor, Tensor]:
    """What they hold, [K * examples, ...]."""
    batches = [pair(fetch(c.data, torch.arange(len_of(c.data)))) for c in clients]
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x, _ in batches):
        raise ConfigError(
            "attack gradient looks for numbers, as pictures and tables have, and these inputs are none "
            "(such as numbers of words): attack membership takes them"
        )
    if len({x.shape for x, _ in batches}) > 1:
        raise ConfigError("attack gradient needs examples of one size, and these differ")
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _way(options: GradientAttack, layer: str | None, y: Tensor) -> str:
    if options.way == "divide" and layer is None:
        raise ConfigError(
            "attack.way divide needs a linear layer with a bias that takes the flat input as it is, and "
            "the model has none: take attack.way match"
        )
    if layer is not None and options.way != "match":
        return "divide"
    if options.examples > 1 or options.steps > 1:
        raise ConfigError(
            "attack.way match looks for one example behind one step: leave examples and steps out, or "
            "attack a model whose first layer is linear"
        )
    if y.dim() != 1 or y.is_floating_point():
        raise ConfigError(
            "attack.way match reads the class out of the gradient first, and these data have no classes: "
            "attack a model whose first layer is linear"
        )
    return "match"


def _classes(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        output = copied(model).eval()(x)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ConfigError("attack.way match needs a model that gives a score for each class")
    return int(output.shape[1])


def _parted(flat: np.ndarray, like: Mapping[str, Tensor]) -> Params:
    """A flat vector as the tensors that it was made of."""
    parts = torch.from_numpy(flat).split([v.numel() for v in like.values()])
    return {k: p.view(v.shape) for (k, v), p in zip(like.items(), parts, strict=True)}
