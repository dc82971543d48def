"""What a site's report must be to count; nothing that a site sends is believed before."""

from dataclasses import dataclass

import torch
from torch import nn

from fedtorch.client import Recipe
from fedtorch.engines import messages
from fedtorch.engines.messages import Expected
from fedtorch.engines.wire import Message, MessageError
from fedtorch.strategies import Strategy
from fedtorch.tree import expand, row
from fedtorch.types import Context, Failure, Params, Task, Update

KINDS = ("nonfinite", "error", "budget")
"""Why a site may say that it has no update."""


@dataclass(frozen=True)
class Reader:
    """Reads the reports of one run."""

    expected: Expected
    uniform: bool
    """Every weight must be 1."""

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module) -> "Reader":
        """What this model and recipe make a site send."""
        params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
        return cls(expected(recipe, params, model), recipe.weighting == "uniform")

    def read(self, site: str, task: Task, message: Message) -> Update | Failure:
        """The update, or the site's reason to send none; raises MessageError for anything else."""
        if message.facts.get("round") != task.round:
            raise MessageError("it is about another round")
        outcome = Message("outcome", message.facts, message.groups)
        update, failures, _ = messages.read_outcome(outcome, [site])
        if not update.ids:
            if failures[0].kind not in KINDS:
                raise MessageError("it gives no reason that is known")
            return failures[0]
        messages.check(update, self.expected)
        if self.uniform and not bool((update.weight == 1).all()):
            raise MessageError("its weight is not 1")
        return update


def expected(recipe: Recipe, params: Params, model: nn.Module) -> Expected:
    """Names, shapes and dtypes of an honest update: an upload of a visit that changed nothing."""
    strategy: Strategy = recipe.strategy
    ctx = Context(
        expand(params),
        {g: expand(e) for g, e in strategy.init(params).items()},
        {g: expand(m) for g, m in strategy.remember(params).items()},
        torch.ones(1),
        1.0,
    )
    sent = strategy.upload(expand(params), ctx)[0]
    if recipe.privacy:  # adaptive clipping sends one number more
        task = Task({}, {}, 0, 0, 1.0, {"clip": 1.0, "noise": 1.0})
        sent = recipe.privacy.client(sent, torch.ones(1), task, ["nobody"])
    floats = {k: b for k, b in model.named_buffers() if b.is_floating_point()}
    floats = {} if recipe.privacy else floats  # private clients send no statistics of their data
    return Expected(
        {g: {k: (v.shape, torch.float64) for k, v in row(s, 0).items()} for g, s in sent.items()},
        messages.schema(floats),
    )
