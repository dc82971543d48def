"""Visits of more than one pass of local steps, as ``Strategy.train`` asks for them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch.privacy import Nothing
from fedtorch.recipe import Recipe
from fedtorch.strategies.base import Strategy
from fedtorch.training.local_steps import rates
from fedtorch.training.module import resting
from fedtorch.training.results import Results, Stacked
from fedtorch.tree import near
from fedtorch.types import Context, Stack, Task, altered


@dataclass(frozen=True)
class Passes:
    """A strategy's ``solve``: runs local steps from where it says, and copies what they leave."""

    task: Task
    recipe: Recipe
    model: nn.Module
    ctx: Context
    first: Sequence[Tensor]
    """Which examples each client takes in which step of the visit's plain pass, and of any as long."""
    order: Callable[[Recipe], Sequence[Tensor]]
    """The same of a pass of another length."""
    run: Callable[[Sequence[Tensor], Recipe, Context, bool, bool], Results]
    """The solver; told whether it is the visit's plain pass, from the shared weights, and of another
    whether all weights are trained from ones of one kind."""
    noised: list[Results] = field(default_factory=list)
    """Under sample-level privacy the result of the one pass that may be sent."""

    def __call__(
        self,
        *,
        start: Stack | None = None,
        strategy: Strategy | None = None,
        rests: Collection[str] = (),
        epochs: int | None = None,
        steps: int | None = None,
    ) -> Results:
        """One pass; of weights that rest it has those that it started from.

        Under sample-level privacy the pass without arguments is clipped and noised, and no other is.
        """
        # the recipe has been checked, and the others of its parts stay
        asked = altered(self.recipe, strategy=strategy) if strategy else self.recipe
        plan = self.recipe.privacy.per_example
        plain = (
            start is None and strategy is None and not rests and epochs is None and steps is None
        )
        if plan and plain and self.noised:
            raise RuntimeError("sample-level privacy noises one pass a visit: solve() once")
        if plan and not plain:
            steps = plan.steps if epochs is None and steps is None else steps
            asked = replace(asked, privacy=Nothing())
        if steps is not None:
            asked = replace(asked, steps=steps)
        elif epochs is not None:
            asked = replace(asked, steps=None, epochs=epochs)
        again = plan is None and epochs is None and steps is None
        order = self.first if plain or again else self.order(asked)
        own = self.ctx.own | (start or {})
        taken = torch.tensor([len(p) for p in order])
        lr_sum = rates(asked, self.task.lr, taken)
        ctx = replace(self.ctx, own=own, steps=taken, lr_sum=lr_sum)
        # from weights that are all the clients' own, or all the shared ones
        whole = not rests and (start is None or {*self._trained()} <= start.keys())
        with resting(self.model, {*rests}):
            found = self.run(order, asked, ctx, plain, whole and not plan)
        if plain and not isinstance(found, Stacked):  # memory of its own, and maybe but a sum
            self.noised.extend([found] if plan else [])
            return found
        rows, floats = found.rows()
        if not isinstance(found, Stacked):
            return Stacked(rows, floats, found.loss, self.task)
        # copies: the next pass writes over them in the same module
        params = {k: rows[k] if k in rows else self._still(k, own) for k in self._trained()}
        copies = [{k: v.detach().clone() for k, v in near(s).items()} for s in (params, floats)]
        left = Stacked(copies[0], copies[1], found.loss, self.task)
        self.noised.extend([left] if plan and plain else [])
        return left

    def ends(self, weights: Stack, losses: Tensor) -> Stacked:
        """A result that was reached otherwise, with what was sent for all that ``weights`` leave out."""
        params = {k: weights[k] if k in weights else self._still(k, {}) for k in self._trained()}
        return Stacked(params, {}, losses, self.task)

    def check(self, found: Any) -> None:
        """Raises RuntimeError where sample-level privacy is to send what nobody has noised."""
        if self.recipe.privacy.per_example and not any(found is n for n in self.noised):
            who = type(self.recipe.strategy).__name__
            raise RuntimeError(
                f"{who}.train must return what solve() left, which sample-level privacy has noised"
            )

    def _trained(self) -> list[str]:
        return [k for k, p in self.model.named_parameters() if p.requires_grad]

    def _still(self, name: str, own: Stack) -> Tensor:
        clients = len(self.ctx.steps)
        value = own.get(name, self.task.state[name][None])
        return value.expand(clients, *value.shape[1:])
