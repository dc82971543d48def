"""A run that a site has joined: the model that it built, what a task of it may hold, and its training."""

import logging

import torch
from torch import nn

from fedtorch.channel.base import remembers
from fedtorch.client import Client
from fedtorch.engines import messages, wire
from fedtorch.engines.base import Session
from fedtorch.engines.messages import Outcome
from fedtorch.engines.wire import Message, MessageError
from fedtorch.recipe import Recipe
from fedtorch.sites.offer import Plan
from fedtorch.sites.state import Base
from fedtorch.strategies.still import uploads
from fedtorch.training.personal import GROUP, given, personal
from fedtorch.types import ClientError, ConfigError, Failure, Params, Released, Task

NOBODY = Released.received((), {}, {}, torch.zeros(0))
"""The update of a site that sends none."""

Schema = dict[str, tuple[torch.Size, torch.dtype]]

log = logging.getLogger("fedtorch.site")


class Joined:
    """The plan, and what this site has built of it."""

    def __init__(self, plan: Plan, model: nn.Module, recipe: Recipe) -> None:
        """Before any task; a run that asks for statistics of columns first has none yet."""
        self.plan, self.model, self.recipe = plan, model, recipe
        self.schema: dict[str, Schema] = {}
        """What a task may hold: shape and type of each tensor, by group."""
        self.has = ""
        """Digest of what this site's model has beside what every task brings."""
        self.wanted: object = None
        """The same of the server's."""

    def open(self, session: Session, base: Base, wanted: object) -> None:
        """Get ready to train; ``base``: what a server sent once, the frozen part of a model."""
        self.session, self.base, self.wanted = session, base, wanted
        model, strategy, recipe = self.model, self.recipe.strategy, self.recipe
        own = personal(model, strategy.personal)
        trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        params = {k: p.detach() for k, p in trained.items() if k not in own}
        self.given = given(model, strategy.personal)
        whole = messages.schema(self.given)
        rest = {k: v for k, v in whole.items() if k not in params}
        self.schema = {"state": whole, "rest": rest}
        self.kept = base.of(rest)
        self.given |= self.kept
        for group, tree in strategy.init(params).items():
            self.schema[f"extras/{group}"] = messages.schema(tree)
        floats = {k: b for k, b in model.named_buffers() if b.is_floating_point()}
        memory = strategy.remember(params | (floats if strategy.floats else {}))
        memory |= {GROUP: {k: self.given[k] for k in own}} if own else {}
        if recipe.channel:
            sends = uploads(strategy, params, strategy.init(params))
            memory |= remembers(recipe.channel, sends)
        self.remembered = {g: messages.schema(tree) for g, tree in memory.items()}
        self.has = self._digest()

    def call(self) -> dict[str, object]:
        """What a call for work says of this site."""
        facts: dict[str, object] = {"run": self.plan.run, "has": self.has}
        facts |= {"scaled": bool(self.plan.center)} if self.plan.standardize else {}
        if self.has and self.has != self.wanted:  # only what differs is sent
            rest = {k: self.given[k] for k in self.schema["rest"]}
            facts |= {"own": messages.short_digests(rest)}
        return facts

    def read(self, message: Message) -> Task:
        """The task in a message; raises MessageError unless it is one of the plan."""
        task = messages.read_task(message)
        groups = {g: t for g, t in message.groups.items() if t}
        if odd := sorted((groups.keys() ^ self.schema.keys()) - {"rest"}):
            raise MessageError(f"the group {wire.short(odd[0])} of the task is on one side only")
        for group, names in self.schema.items():
            some = groups.get(group, {})
            # what never changes is in no task, or once in one
            left = self.schema["rest"].keys() - some.keys() if group in ("state", "rest") else ()
            messages.same_schema(some, {k: v for k, v in names.items() if k not in left})
        if "rest" in groups:
            self.given |= groups["rest"]
            self.has = self._digest()
            if self.wanted is not None and self.has != self.wanted:
                raise MessageError("the frozen weights that came are not those that the run has")
            self.base.keep(self.kept | groups["rest"])
        task = task.filled(self.given)
        if task.lr <= 0:
            raise MessageError(f"the learning rate is {task.lr:g}")
        if self.plan.privacy:
            try:
                self.plan.privacy.hold(task.privacy, task.round)
            except ConfigError as e:
                raise MessageError(f"round {task.round + 1}: {e}") from e
        return task

    def fits(self, memory: dict[str, Params]) -> bool:
        """Whether it is a memory of this run."""
        # a client that is never finite may have nothing but what its codes left out
        return all(messages.schema(t) == self.remembered.get(g) for g, t in memory.items())

    def train(self, client: Client, task: Task) -> Outcome:
        """One visit; an error of the model or the data stays in this site's own log."""
        self.session.submit([client.id], task)
        try:
            (outcome,) = [*self.session.collect()]
        except (ClientError, MemoryError) as e:
            # the text may quote a row of data
            log.error("round %d: %s", task.round + 1, str(e) or type(e).__name__)
            outcome = Failure(client.id, "error", "its model or data raised an error")
        if isinstance(outcome, Failure):
            return Outcome(NOBODY, [outcome], {})
        return Outcome(outcome, [], {})

    def _digest(self) -> str:
        return messages.digest({k: self.given[k] for k in self.schema["rest"]})
