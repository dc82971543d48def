"""What a server remembers from round to round beside the weights, and the step that changes it."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from fedtorch import seeds
from fedtorch.aggregation.mean import Held
from fedtorch.strategies.base import Strategy
from fedtorch.tree import all_finite, to_float64
from fedtorch.types import Params


@dataclass(frozen=True)
class ServerState:
    """All of it; a step makes a new one."""

    extras: dict[str, Params]
    """Groups of the strategy that are broadcast."""
    hidden: dict[str, Params]
    """Groups of the strategy that are not."""
    optimizer: dict[str, Any]
    """Moments of the server optimizer, by group."""
    held: Held = field(default_factory=dict)
    """What the aggregator keeps."""

    @classmethod
    def first(cls, strategy: Strategy, params: Params, seed: int) -> "ServerState":
        """Before round 0; ``params`` are the weights that are trained."""
        with seeds.seeded(seeds.derive(seed, "strategy", "init")):
            extras, hidden = strategy.init(params), strategy.hold(params)
        return cls(extras, hidden, strategy.server.init(params) if strategy.server else {})

    def step(
        self, strategy: Strategy, sent: dict[str, Params], share: float, weights: Params, seed: int
    ) -> tuple[Params, "ServerState"]:
        """What the strategy's step and then the server optimizer's add to ``weights``, and the state after.

        ``share``: of all clients that reported, ``seed``: of what the step draws at random.
        """
        computes = strategy.server is not None or type(strategy).step is not Strategy.step
        if computes:  # with what was sent, and does not only add it
            sent = {g: to_float64(v) for g, v in sent.items()}
        optimizer = self.optimizer
        # what a step of the user's own draws at random, a resumed run draws again
        with seeds.seeded(seed) if computes else nullcontext():
            delta, groups = strategy.step(sent, self.extras | self.hidden, share)
            if strategy.server is not None:
                delta, optimizer = strategy.server.step_from(weights, delta, optimizer)
        hidden = {g: groups[g] for g in self.hidden}
        extras = {g: v for g, v in groups.items() if g not in hidden}
        return delta, replace(self, extras=extras, hidden=hidden, optimizer=optimizer)

    @property
    def finite(self) -> bool:
        """Whether all groups and moments are: one infinite moment keeps an optimizer from moving again."""
        kept = [*self.extras.values(), *self.hidden.values(), *self.optimizer.values()]
        return all(map(all_finite, kept))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "extras": self.extras,
            "optimizer": self.optimizer,
            **({"aggregator": self.held} if self.held else {}),
            **({"hidden": self.hidden} if self.hidden else {}),
        }

    def loaded(self, saved: Mapping[str, Any]) -> "ServerState":
        """That of a checkpoint."""
        held, hidden = saved.get("aggregator", {}), saved.get("hidden", self.hidden)
        return ServerState(saved["extras"], hidden, saved["optimizer"], held)
