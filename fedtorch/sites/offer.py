"""What will be trained, in names and numbers: the server's offer, and a site's look at it.

A plan names a model, a loss, an optimizer and a strategy; the site has their code already, or refuses.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from fedtorch.aggregation.mean import Aggregator, Mean
from fedtorch.channel.base import Stage
from fedtorch.data import columns
from fedtorch.data.base import facts_of
from fedtorch.data.tokens import PREFIX
from fedtorch.options import TrainingOptions
from fedtorch.privacy import Nothing, Privacy
from fedtorch.privacy import models as checks
from fedtorch.privacy.columns import KINDS
from fedtorch.recipe import Recipe
from fedtorch.run import huggingface, objects, steps, zoo
from fedtorch.run.huggingface import LoRA
from fedtorch.run.names import CHOICES
from fedtorch.strategies import FedAvg, Strategy
from fedtorch.training.evaluate import Judge
from fedtorch.training.losses import DEFAULTS, LOSSES, Loss, no_loss
from fedtorch.training.optimizer import ClientOptimizer, by_name
from fedtorch.types import ConfigError

OFFERED = (
    "lora",
    "strategy",
    "strategy.server",
    "aggregator",
    "channel",
    "privacy",
    "privacy.adaptive",
    "privacy.bands",
)
"""Choices of a plan: their names must be fedtorch's own."""
MODEL_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
PUBLISHED = re.compile(r"hf:[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?")
"""A model of Hugging Face as a plan names it: by its folder's own name, or its name on the hub."""
TOKENS: dict[str, type] = {"vocab_size": int, "padding": int, "language": bool, "tokens": str}
"""Facts of a model of Hugging Face beside the usual ones, and their types."""
RUN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_OUTPUTS = 1_000_000
MOST_ROUNDS = 1 << 31


@dataclass(frozen=True)
class Plan(TrainingOptions):
    """Everything a site must know besides its data, once a run."""

    run: str
    """Which run this is."""
    model: str = "mlp"
    model_args: dict[str, Any] = field(default_factory=dict)
    lora: LoRA | None = None
    """Adapters in place of the whole of a model of Hugging Face."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Shape of an example, number of outputs: what the model is built from."""
    weights: str = ""
    """Digest of the weights that the server's files of a model hf: have; none: they are drawn, and sent."""
    place: str = ""
    """Where the files of a model hf: lie on this machine, which is told to nobody."""
    kind: str = "classification"
    """classification, binary or regression: what the targets are."""
    loss: str = "cross_entropy"
    step: str = ""
    """In place of a loss: package.module:function that every site has, and has agreed to by this name."""
    eval_step: str = ""
    """The same of how a site judges the model on its own test rows."""
    strategy: Strategy = FedAvg()
    aggregator: Aggregator = Mean()
    channel: tuple[Stage, ...] = ()
    privacy: Privacy | None = None
    optimizer: str = "sgd"
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    """Features of a table, in their order, that every site must have; none: sites agree by themselves."""
    classes: list[str] = field(default_factory=list)
    """The same of the classes, in the order of the outputs."""
    standardize: list[str] = field(default_factory=list)
    """Columns that sites scale by private statistics of all of them, with public ranges: age=20:90."""
    statistics: str = "quartiles"
    """Which: quartiles or sums."""
    center: list[float] = field(default_factory=list)
    """Of each of these columns, once it is known."""
    width: list[float] = field(default_factory=list)
    rounds: int | None = None
    """Rounds of the run; how many of them privacy pays for, and done again, is ``privacy.rounds``."""

    def build(self) -> tuple[nn.Module, Recipe]:
        """Model and recipe, from code that is installed here."""
        recipe = Recipe(
            self.lora.strategy(self.strategy) if self.lora else self.strategy,
            loss=no_loss if self.step else LOSSES[self.loss],
            step=steps.function_named("step", self.step) if self.step else None,
            optimizer=ClientOptimizer(self.optimizer, self.optimizer_args),
            privacy=self.privacy or Nothing(),
            aggregator=self.aggregator,
            channel=self.channel,
            **self.training(),
        )
        model = self._model()
        return checks.mended(model, recipe.privacy), recipe

    def outline(self) -> None:
        """Build the model as far as its size is known, of Hugging Face without its weights."""
        if self.place:
            huggingface.build(self.place, self._facts, self.lora, drawn=True)
        else:
            self.build()

    @property
    def shape(self) -> list[int] | None:
        """Of one example of numbers; None where it is of tokens, or not said."""
        shape = None if self.place else self.facts.get("input_shape")
        return None if shape is None else list(shape)

    def _model(self) -> nn.Module:
        if not self.place:
            return zoo.build(self.model, self.facts, self.model_args)
        drawn = huggingface.weightless(self.place)
        return huggingface.build(self.place, self._facts, self.lora, drawn)

    @property
    def _facts(self) -> dict[str, Any]:
        return self.facts | {"tokenizer": self.place.removeprefix(PREFIX)}

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Public range of each column that is scaled by statistics."""
        return columns.ranges(self.standardize)

    def judging(
        self, recipe: Recipe, model: nn.Module, data: Dataset
    ) -> tuple[Mapping[str, Loss], Judge | None]:
        """By which metrics and step the model is judged on test rows of one's own."""
        return steps.judging(recipe, self.eval_step, self.kind, ["auto"], model, data)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as a table for a message."""
    table: dict[str, Any] = objects.describe(replace(plan, place=""))
    missing = {k: None for k in ("steps", "batch_size") if getattr(plan, k) is None}
    return table | missing


def read(table: dict[str, Any], models: Sequence[str], runs: Sequence[str] = ()) -> Plan:
    """The plan in a table that arrived; raises ConfigError for anything this site does not have.

    ``models`` may be trained, and these are the steps that it ``runs``. Other names that would make Python
    import something are refused before anything looks them up; nothing is built yet.
    """
    model, optimizer = _chosen(table, "model"), _chosen(table, "optimizer", "sgd")
    place = _place(model, models)
    if not isinstance(model, str) or not (
        place or (MODEL_NAME.fullmatch(model) and model in models)
    ):
        fix = ""
        if isinstance(model, str) and PUBLISHED.fullmatch(model):
            fix = f"; where it has the files, it agrees by --models {model}=FOLDER"
        raise ConfigError(
            f"this site does not train model {model!r}; it trains {', '.join(models)}{fix}"
        )
    for option in ("step", "eval_step"):
        name = table.get(option, "")
        if name and (not isinstance(name, str) or name not in runs):
            raise ConfigError(
                f"this site does not run {option} {str(name)[:200]!r}; it runs "
                f"{', '.join(runs) or 'none'}: where that is code it has, it agrees by naming it in --steps"
            )
    if table.get("loss") not in [*LOSSES]:
        raise ConfigError(f"this site knows no loss {table.get('loss')!r}")
    if not isinstance(optimizer, str) or optimizer.lower() not in by_name():
        raise ConfigError(f"this site knows no optimizer {optimizer!r}")
    for choice in OFFERED:
        _known(table, choice)
    # what is null was not given; the first of the choices would be taken for it
    plan: Plan = objects.construct(
        Plan, {k: v for k, v in table.items() if v is not None or k not in CHOICES}
    )
    plan = replace(plan, place=place)
    if bool(place) != ("tokens" in plan.facts):
        raise ConfigError(
            "a plan has facts of tokens for a model of Hugging Face, and only for such"
        )
    if not RUN_NAME.fullmatch(plan.run):
        raise ConfigError(f"a run cannot be called {plan.run!r}")
    _consistent(plan)
    return plan


def _place(model: Any, models: Sequence[str]) -> str:
    """Where a site has a model hf: that it agrees to, each as hf:FOLDER or hf:NAME=FOLDER; else nothing."""
    for entry in models:
        name, equals, where = entry.partition("=")
        if entry.startswith(PREFIX) and model == (
            name if equals else huggingface.public_name(entry)
        ):
            return PREFIX + where.removeprefix(PREFIX) if equals else entry
    return ""


def _chosen(table: dict[str, Any], choice: str, default: Any = None) -> Any:
    value = table.get(choice, default)
    return value.get("name") if isinstance(value, dict) else value


def _known(table: Any, choice: str) -> None:
    for key in choice.split("."):
        table = table.get(key) if isinstance(table, dict) else None
    for part in table if isinstance(table, list) else [table]:
        name = part.get("name") if isinstance(part, dict) else part
        if name is not None and name not in [*CHOICES[choice]]:
            raise ConfigError(f"this site knows no {choice} {name!r}")


def _consistent(plan: Plan) -> None:
    """Facts must be those of some data: a model is built from them before any is seen."""
    if plan.kind not in DEFAULTS:
        raise ConfigError(f"a plan's kind is one of {', '.join(DEFAULTS)}, not {plan.kind!r}")
    if plan.rounds is not None and not 1 <= plan.rounds < MOST_ROUNDS:
        raise ConfigError("a plan's rounds must be a whole number, 1 or more")
    _scaled(plan)
    if not plan.facts:
        return
    shape, outputs = plan.facts.get("input_shape"), plan.facts.get("num_classes", 0)
    if not isinstance(shape, (list, tuple)) or len(shape) > 8:
        shape = [0]
    if not all(type(n) is int and n > 0 for n in (*shape, outputs)) or outputs > MOST_OUTPUTS:
        raise ConfigError("a plan's facts need input_shape and num_classes, in whole numbers")
    facts = facts_of(tuple(shape), outputs, plan.kind)
    given = plan.facts | {"input_shape": tuple(shape)}
    if plan.place:
        given = {k: v for k, v in given.items() if k not in TOKENS}
        _tokens(plan.facts)
    for name, value in given.items():
        if name not in facts:
            raise ConfigError(f"a plan has the facts {', '.join(facts)}, and no {name!r}")
        if value != facts[name]:
            raise ConfigError(
                f"the plan's facts do not belong together: {name} is {value!r}, not {facts[name]!r}"
            )


def _scaled(plan: Plan) -> None:
    """Statistics of columns, and centers and widths that they can have given."""
    noise = plan.privacy.statistics_noise if plan.privacy else None
    if bool(plan.standardize) != bool(noise):
        raise ConfigError(
            "a plan that scales columns by private statistics must pay for them, and only such"
        )
    if plan.statistics not in KINDS:
        raise ConfigError(f"a plan's statistics are {' or '.join(KINDS)}, not {plan.statistics!r}")
    ranges = [*plan.ranges.values()]
    if not plan.center and not plan.width:
        return
    found = [*zip(ranges, plan.center, plan.width, strict=False)]
    good = len(ranges) == len(plan.center) == len(plan.width)
    if not good or not all(a <= c <= b and 0 < w <= b - a for (a, b), c, w in found):
        raise ConfigError("a plan's centers and widths are not such as its columns can have")


def _tokens(facts: dict[str, Any]) -> None:
    """Facts of tokens, of such types that a model may be built from them."""
    for name, kind in TOKENS.items():
        value = facts.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < MOST_OUTPUTS):
            raise ConfigError(f"a plan's fact {name!r} is none of a model of Hugging Face")
