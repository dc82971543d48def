"""Sample-level privacy at a site of another framework: fedtorch trains, and the framework only carries.

What a site's own filter or mod adds to a whole update hides the whole site and costs accuracy. Here single
examples are hidden, by the very steps of fedtorch's own sites, and charged to the same kind of ledger.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fedtorch.aggregation.mean import Mean
from fedtorch.checks import combination
from fedtorch.client import Client
from fedtorch.engines.local import Local
from fedtorch.privacy.alone import Budget, Numbers, alike
from fedtorch.privacy.answers import leave_receipt, tensor
from fedtorch.recipe import Recipe
from fedtorch.strategies import Strategy
from fedtorch.types import ClientError, ConfigError, Failure, Params, Task

log = logging.getLogger("fedtorch.site")


class PrivateVisits:
    """Visits of one site's data by a recipe with a SampleLevel plan, each charged before it trains."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        recipe: Recipe,
        folder: Path | str,
        *,
        site: str = "site",
        most: float | None = None,
        device: str = "cpu",
    ) -> None:
        """Try a batch, and read what this site's data has cost, in ``folder``.

        ``data`` is what a ``Client`` takes; ``most`` that of a ``Budget``. The site gives both, and the
        folder: they should not come with a job. Raises ConfigError where the model or the recipe cannot
        train so, or the plan has no limit.
        """
        plan = recipe.privacy
        if not plan.per_example:
            raise ConfigError(
                f"visits hide single examples, by SampleLevel, not {type(plan).__name__}: give "
                "Recipe(privacy=SampleLevel(...))"
            )
        _carried(recipe, {k: p.detach() for k, p in model.named_parameters() if p.requires_grad})
        combination.check(recipe)
        self.recipe = replace(recipe, privacy=replace(plan, strict=True))
        self.budget = Budget(folder, plan, site=site, most=most)
        self._session = Local(chunk=1, device=device).open(model, [Client(site, data)], self.recipe)
        self._trained = [k for k, p in model.named_parameters() if p.requires_grad]

    def visit(self, weights: Mapping[str, Numbers], round: int) -> dict[str, Numbers]:
        """What may leave: the weights after one visit that starts from ``weights``, in their types.

        Names are those of the model; what is not trained comes back as it was sent. Raises OverBudget, with
        nothing charged or trained, where the budget has no room; ConfigError where the weights are not the
        model's, or its steps ran away.
        """
        given = self._session.given
        sent = {name: tensor(name, v) for name, v in weights.items()}
        if lacking := sorted({*self._trained} - sent.keys()):
            raise ConfigError(
                f"the weights that were sent lack {lacking[0]}, which the model trains"
            )
        for name, value in sent.items():
            if name not in given or given[name].shape != value.shape:
                raise ConfigError(
                    f"{name}, {tuple(value.shape)}, is in what was sent, not in the model"
                )
        _, visit = self.budget.entered(round)
        state = {name: v.to(given[name]) for name, v in sent.items()}
        numbers = self.recipe.privacy.numbers(self.budget.event.noise, {})
        # no two visits share a draw, whatever the server calls its rounds
        task = Task(state, {}, round, 0, self.recipe.learning_rate, numbers, visit)
        self._session.submit([self.budget.site], task)
        try:
            [found] = [*self._session.collect()]
        except (ClientError, MemoryError) as e:
            # the text may quote a row of data, and frameworks send what a script raises
            log.error("round %d: %s", round, str(e) or type(e).__name__)
            raise ConfigError(
                f"{self.budget.site}, round {round}: its model or data raised an error: see its own log"
            ) from None
        if isinstance(found, Failure):
            raise ConfigError(f"{self.budget.site}, round {round}: {found.reason}; lower lr")
        for name, change in found.sent["delta"].items():
            sent[name] = (sent[name].double() + change[0].cpu()).to(sent[name].dtype)
        leave_receipt(self.budget.folder, sent)
        return {name: alike(sent[name], v) for name, v in weights.items()}


def _carried(recipe: Recipe, params: Params) -> None:
    """Raises ConfigError for what the server of another framework would not do."""
    strategy = recipe.strategy
    plain = strategy.only_delta and not strategy.measures and not strategy.server
    beside = strategy.init(params) or strategy.remember(params)
    if not plain or beside or type(strategy).step is not Strategy.step:
        raise ConfigError(
            f"another framework's server carries weights alone, so strategy {strategy} is not known "
            "there: give FedAvg() or FedProx(mu=...), and choose server optimizers on the server"
        )
    if recipe.channel or type(recipe.aggregator) is not Mean:
        raise ConfigError(
            "aggregator and channel are the other framework's: leave them out of the recipe"
        )
