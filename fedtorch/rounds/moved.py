"""How a round moved the model, and all the figures that it has to tell."""

from dataclasses import dataclass, field
from functools import cached_property

from fedtorch.recipe import Recipe
from fedtorch.rounds.figures import Metrics, norm, traffic
from fedtorch.rounds.gather import Gathered
from fedtorch.rounds.synchronous import ServerStep
from fedtorch.types import Params, Task


@dataclass(frozen=True)
class Moved:
    """What the step of a round came to."""

    means: dict[str, Params]
    """What was sent, as one and before any noise, by group."""
    buffers: Params
    delta: Params = field(default_factory=dict)
    """What was added to the trainable weights."""
    failed: bool = False
    """The step was not finite, and the round before stands."""
    nobody: bool = False
    """No client counted, and nothing was released."""
    told: dict[str, float] = field(default_factory=dict)
    """Figures of the clients' data that the privacy plan pays for."""

    @cached_property
    def norm(self) -> float:
        """Length of the step."""
        return norm(self.delta)

    @property
    def mean_norm(self) -> float | None:
        """Length of the mean change of the weights, if there is one; the step often is that mean."""
        mean = self.means.get("delta")
        return self.norm if mean is self.delta else norm(mean) if mean else None

    def figures(
        self, task: Task, step: ServerStep, came: Gathered, recipe: Recipe, model: Params
    ) -> Metrics:
        """The round's, but for what a pace, an aggregator or a plan adds, and how long it took.

        ``model``: as it was handed over.
        """
        sent = {"buffers": self.buffers} | ({} if recipe.channel else self.means)
        asked, reported = sum(map(len, step.asked)), len(came.reports.ids)
        # a cosine to the mean is one of a weighted mean
        mean_norm = self.mean_norm if recipe.aggregator.linear else None
        numbers = self.means.get("numbers", {})
        rare = {"step_failed": self.failed, "nobody": self.nobody}
        return {
            "lr": task.lr,
            **came.figures(),
            **came.reports.figures(mean_norm),
            "step_norm": self.norm,
            **{f"strategy_{k}": float(v) for k, v in numbers.items()},
            **{k: 1 for k, v in rare.items() if v},
            **traffic(task, model, sent, asked=asked, reported=reported, coded=came.coded),
        }
