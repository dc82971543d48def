"""A solver for models the fast path can read: K clients in lock-step, layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset

from fedtorch.fast import front, whole
from fedtorch.fast.apart import Apart
from fedtorch.fast.chunk_data import Kept, Rows, taken
from fedtorch.fast.copies import Own
from fedtorch.fast.dropout import Coins, Drop
from fedtorch.fast.dual import First, Hidden, pays
from fedtorch.fast.example_gradients import Examples
from fedtorch.fast.layer_table import Activation
from fedtorch.fast.layers import Act, Given, Layer, Rule, Weights, passed_down
from fedtorch.fast.linear import Steps, linear, plain, strategy
from fedtorch.fast.loss import AnyLoss, CrossEntropy, closed, squeezed
from fedtorch.fast.memory import Memory
from fedtorch.fast.ops import Ops, ops_for
from fedtorch.fast.private import Flat, noised
from fedtorch.fast.projected import Known, Projected
from fedtorch.fast.reader import Chain, Linear
from fedtorch.fast.schedule import LockstepOrder, schedule
from fedtorch.fast.several import Models
from fedtorch.fast.several import Weights as Several
from fedtorch.fast.tuning import CHUNK_BYTES, MOST_CLIENTS, OWN_PRODUCTS
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.recipe import Recipe
from fedtorch.training.batches import batch_order
from fedtorch.training.dropout import Dropout
from fedtorch.training.losses import cross_entropy
from fedtorch.training.stacked import Chunk
from fedtorch.tree import vector
from fedtorch.types import Params, Stack, Task


@dataclass
class Fast:
    """The solver of one model: what was read, and what may be kept between rounds."""

    chain: Chain
    half: bool = False
    """Large products, and the front, in bfloat16."""
    kept: Kept = field(default_factory=Kept)
    memory: Memory = field(default_factory=Memory)
    module: fx.GraphModule | None = None
    """The front; built from the working model on first use."""
    forms: dict[tuple[str, ...], whole.Form | None] = field(default_factory=dict)
    """Of models with parameters of these names."""

    def __getstate__(self) -> dict[str, object]:
        """A worker builds the front from its own model."""
        return self.__dict__ | {"module": None}

    def __call__(
        self,
        model: nn.Module,
        chunk: Chunk,
        task: Task,
        recipe: Recipe,
    ) -> "Visit":
        """Train K clients; the same contract as ``general``."""
        datasets, ctx, private = chunk.datasets, chunk.context, chunk.private
        with torch.no_grad():
            # the data side by side, and who is in which step
            first = next(iter(task.state.values()))
            rows = self.kept.rows(datasets, first.device, ops_for(first))
            order = schedule(chunk.order, rows.starts, first)
            steps = linear(recipe, ctx, task.state, task.lr)
            if private is not None:
                factor = (order.scale > 0).to(order.scale.dtype)
            else:
                factor = order.scale if steps.rule.momentum else order.scale * steps.rule.lr
            # local steps
            held: list[Weights]
            if private is None and (form := self._whole(task.state, recipe, steps, rows, order)):
                own = whole.Whole(form, task.state, steps.rule, self.memory, len(datasets))
                own.visit(rows, order, factor, ctx.steps)
                held, loss = [own], own.loss
            elif private is None and (form := self._behind(task.state, recipe, steps, rows, order)):
                layer = self._first(datasets, rows, order, task.state, steps)
                own = whole.Whole(form, task.state, steps.rule, self.memory, len(datasets))
                own.visit_behind(layer, rows, order, factor, ctx.steps)
                held, loss = [layer, own], own.loss
            elif private is not None:
                head = self._head(rows, order, factor, recipe)
                held = self._private(model, chunk, task, recipe, rows, order, steps, head)
                loss = head.total().cpu() / ctx.steps
            else:
                head, coins = self._head(rows, order, factor, recipe), Coins(chunk.seeds, order)
                layers = self._front(model, rows, coins, task.state, steps)
                layers += joined(self._dense(datasets, rows, coins, task.state, steps))
                held, loss = lockstep(layers, rows, order, head), head.total().cpu() / ctx.steps
        # bfloat16 would round the sum that privacy noises; float32 bounds that far tighter
        return Visit(held, loss, recipe.privacy.claims, first[:0], task.state)

    def joins(self, recipe: Recipe) -> bool:
        """Whether it trains clients that were sent different models ``together``, by such a recipe.

        Their steps are plain, and nothing of the model comes before its dense part or draws.
        """
        sums = recipe.strategy.plain and not (recipe.needs_rows or recipe.hides)
        bare = not (recipe.privacy.claims or recipe.channel)
        return sums and bare and plain(recipe) and not self.draws(recipe)

    def together(
        self,
        datasets: Sequence[Dataset],
        plans: Sequence[Tensor],
        given: tuple[Sequence[Params], Sequence[int]],
        rates: Tensor,
        recipe: Recipe,
    ) -> "Visit":
        """Train K clients by plain steps of their ``rates`` [K]; ``plans``: as in a chunk.

        ``given``: models, and places of those that clients start from. Only sums, norms and losses are to
        be asked of what is left.
        """
        with torch.no_grad():
            models, state = Models(*given, self.kept), given[0][0]
            first = next(iter(state.values()))
            rows = self.kept.rows(datasets, first.device, ops_for(first))
            order = schedule(plans, rows.starts, first)
            # a rate is in the gradients' factor, and nowhere else
            steps = Steps(Rule(0.0), {}, {})
            factor = order.scale * rates.to(first)[:, None, None]
            taken_steps, held = vector([len(p) for p in plans], np.int64), list[Weights]()
            if form := self._whole(state, recipe, steps, rows, order):
                wholes = whole.Wholes(form, models, self.memory)
                wholes.visit(rows, order, factor, taken_steps)
                held, loss = [wholes], wholes.loss
            else:
                head, coins = self._head(rows, order, factor, recipe), Coins((), order)
                layers = joined(self._dense(datasets, rows, coins, state, steps, models))
                held = lockstep(layers, rows, order, head)
                loss = head.total().cpu() / taken_steps
        return Visit(held, loss, False, first[:0], state)

    def form(self, state: Params) -> whole.Form | None:
        """The model as ``whole`` knows it, read once; none: it does not."""
        names = tuple(state)
        if names not in self.forms:
            self.forms[names] = whole.Form.of(self.chain, names)
        return self.forms[names]

    def _whole(
        self, state: Params, recipe: Recipe, steps: Steps, rows: Rows, order: LockstepOrder
    ) -> whole.Form | None:
        """The form of a model whose visits one loop takes, where that is known and the faster way."""
        form = self.form(state)
        if form is None or self.half or recipe.loss is not cross_entropy:
            return None
        return form if whole.pays(form, steps, rows, order) else None

    def _behind(
        self, state: Params, recipe: Recipe, steps: Steps, rows: Rows, order: LockstepOrder
    ) -> whole.Form | None:
        """The same of what comes behind a first layer of which nobody has a copy."""
        form = self.form(state)
        if form is None or self.half or recipe.loss is not cross_entropy:
            return None
        return whole.pays_behind(form, steps, rows, order)

    def _first(
        self,
        datasets: Sequence[Dataset],
        rows: Rows,
        order: LockstepOrder,
        state: Params,
        steps: Steps,
        each: Apart | Several | None = None,
    ) -> First:
        """The first layer, without copies."""
        spec = cast(Linear, self.chain.layers[0])
        w, b = state[spec.weight], None if spec.bias is None else state[spec.bias]
        asked = b is not None, rows.y.device
        grams = self.kept.stacked([self.kept.gram(d, *asked) for d in datasets], rows)
        met = grams, (order.index, order.local)
        return First(spec, w, b, steps.rule, rows, met, self.half, each)

    def _head(
        self, rows: Rows, order: LockstepOrder, factor: Tensor, recipe: Recipe
    ) -> CrossEntropy | AnyLoss:
        """The loss of all steps, by its formula where it is known."""
        y = taken(rows.y, order.index)
        if recipe.loss is cross_entropy and rows.classes and not self.chain.squeezed:
            return CrossEntropy(y, order.scale, factor)
        loss = squeezed(recipe.loss) if self.chain.squeezed else recipe.loss
        return AnyLoss(y, order.scale, factor, loss)

    def _private(
        self,
        model: nn.Module,
        chunk: Chunk,
        task: Task,
        recipe: Recipe,
        rows: Rows,
        order: LockstepOrder,
        steps: Steps,
        head: CrossEntropy | AnyLoss,
    ) -> list[Weights]:
        """The same of steps that are noised, each client's of all its parameters."""
        plan, private = recipe.privacy.per_example, cast(PrivateSteps, chunk.private)
        projected = bool(plan and plan.projected) and rows.finite
        form, first = self.form(task.state), None
        if form and projected:
            form = form.behind
        if form and isinstance(head, CrossEntropy) and whole.pays_privately(form, steps, rows):
            (rule, *_), datasets = steps, chunk.datasets
            if projected:
                first = self._projected(datasets, rows, order, task.state, rule, private)
            own = whole.Whole(form, task.state, rule, self.memory, len(datasets))
            own.visit_privately(rows, order, head, chunk.context.steps, (rule.lr, private), first)
            return [own, first.done()] if first else [own]
        coins = Coins(chunk.seeds, order)
        flat, layers = self._noised(
            model, chunk.datasets, rows, coins, task.state, steps, private, projected
        )
        for step, k in order.each():
            a = order.index[:k, step]
            for layer in layers:
                a = layer.forward(a)
            noised(flat, layers, head(a, k, step), private)
        return flat.held([m for m in layers if not isinstance(m, (Act, Drop, Given))])

    def takes(self, recipe: Recipe) -> bool:
        """Whether it can take another pass of a visit, by such a recipe, from any weights at all."""
        return strategy(recipe) is None

    def draws(self, recipe: Recipe) -> bool:
        """Whether anything may draw at random: the front, dropout, or a loss of one's own."""
        dropped = any(isinstance(s, Dropout) for s in self.chain.layers)
        return self.chain.front is not None or dropped or recipe.loss is not cross_entropy

    def chunk(self, examples: int, recipe: Recipe) -> int:
        """How many clients with so many examples stay in cache together."""
        private = recipe.privacy.per_example
        rows = batch_order(examples, recipe, 0).numel()
        specs = [s for s in self.chain.layers if isinstance(s, Linear)]
        held = 0 if self.chain.front else examples * (specs[0].shape[1] + examples + rows)
        for n, spec in enumerate(specs):
            out, into = spec.shape
            first = n == 0 and self.chain.front is None and spec is self.chain.layers[0]
            if private or not pays(rows, spec.shape, examples if first else None):
                held += out * into
            else:
                held += rows * out + (examples * out if first else rows * (into + out + 2 * rows))
        if private and self.chain.front:
            # each example's gradient is written out
            held += math.ceil(private.sample_rate * examples) * self.chain.front.numbers
        return int(max(1, min(MOST_CLIENTS, CHUNK_BYTES // (4 * held))))

    def _noised(
        self,
        model: nn.Module,
        datasets: Sequence[Dataset],
        rows: Rows,
        coins: Coins,
        state: Params,
        steps: Steps,
        private: PrivateSteps,
        projected: bool,
    ) -> tuple[Flat, list[Layer]]:
        """Parameters that are noised in every step, and all layers."""
        layers: list[Layer] = []
        if projected:
            layers = [self._projected(datasets, rows, coins.order, state, steps.rule, private)]
        names = self.chain.front.names if self.chain.front else ()
        dense, memory = self.chain.layers[len(layers) :], (self.memory, len(datasets))
        flat = Flat(dense, names, state, steps.rule, steps.shift, memory)
        if self.chain.front:
            module = self._built(model, apart=True)
            layers = [Examples(module, flat.leaves(names), rows.images, coins)]
        ops = rows.ops if len(flat.leaf.start) >= OWN_PRODUCTS else Ops()
        return flat, [*layers, *flat.layers(None if layers else rows, coins, ops)]

    def _projected(
        self,
        datasets: Sequence[Dataset],
        rows: Rows,
        order: LockstepOrder,
        state: Params,
        rule: Rule,
        private: PrivateSteps,
    ) -> Projected:
        spec = cast(Linear, self.chain.layers[0])
        asked = spec.bias is not None, rows.y.device
        bases = [self.kept.basis(d, *asked) for d in datasets]
        known = Known(
            self.kept.stacked([self.kept.gram(d, *asked) for d in datasets], rows),
            bases,
            self.kept.stacked([r.T for _, r in bases], rows),
        )
        w, b = state[spec.weight], state[spec.bias] if spec.bias else None
        places = order.index, order.local
        return Projected(spec, w, b, rule, rows, places, known, private)

    def _front(
        self,
        model: nn.Module,
        rows: Rows,
        coins: Coins,
        state: Params,
        steps: Steps,
    ) -> list[Layer]:
        if self.chain.front is None:
            return []
        K = len(coins.order.index)
        kept = Steps(steps.rule, *({n: front.kept(v) for n, v in s.items()} for s in steps[1:]))
        leaves = {
            n: kept.leaf(n, front.stored(state[n]).contiguous(), K) for n in self.chain.front.names
        }
        return [front.Features(self._built(model), leaves, rows.images, coins, self.half)]

    def _built(self, model: nn.Module, apart: bool = False) -> fx.GraphModule:
        if self.module is None:
            self.module = front.build(model, cast(front.Front, self.chain.front), apart)
        return self.module

    def _dense(
        self,
        datasets: Sequence[Dataset],
        rows: Rows,
        coins: Coins,
        state: Params,
        steps: Steps,
        models: Models | None = None,
    ) -> list[Layer]:
        """``models``: which clients start from, where not all start from ``state``."""
        order = coins.order
        K, T = order.index.shape
        given = self.chain.front is None and not isinstance(self.chain.layers[0], Linear)
        layers: list[Layer] = [Given(rows.flat)] if given else []
        for spec in self.chain.layers:
            if not isinstance(spec, Linear):
                layers.append(Act(spec) if isinstance(spec, Activation) else Drop(spec, coins))
                continue
            first = not layers and self.chain.front is None
            w, b = state[spec.weight], None if spec.bias is None else state[spec.bias]
            apart = Apart(spec, steps, K) if steps.own and not steps.full else None
            several = models.layer(spec, self.half) if models else None
            if steps.full or not pays(T, spec.shape, rows.most if first else None):
                each = (
                    models.rows([spec.weight, *([spec.bias] if spec.bias else [])])
                    if models
                    else {}
                )
                if spec.bias and each:
                    each[spec.bias] = each[spec.bias][:, None]
                own_bias = None if b is None else steps.leaf(spec.bias or "", b[None], K, each)
                weight = steps.leaf(spec.weight, w, K, each)
                layers.append(Own(spec, weight, own_bias, order, rows if first else None))
            elif first:
                layers.append(self._first(datasets, rows, order, state, steps, apart or several))
            else:
                size, by = (K, T), (self.half, rows.ops, apart or several)
                layers.append(Hidden(spec, w, b, steps.rule, size, *by))
        return layers


def lockstep(
    layers: list[Layer], rows: Rows, order: LockstepOrder, head: CrossEntropy | AnyLoss
) -> list[Weights]:
    """All clients' local steps side by side, layer by layer, and what is left of the layers."""
    walked, last = closed(layers, head, rows.ops)
    for step, k in order.each():  # forward, backward, step
        a = order.index[:k, step]
        for layer in walked:
            a = layer.forward(a)
        grads = passed_down(walked, last(a, k, step))
        for layer, g in zip(walked, grads, strict=True):
            layer.step(g)
    return cast(list[Weights], [m for m in layers if not isinstance(m, (Act, Drop, Given))])


def joined(layers: list[Layer]) -> list[Layer]:
    """The layers without ReLUs between two linear ones, which do it in passing.

    The one before makes its outputs positive, the one behind looks at them for what it passes down.
    """
    done: list[Layer] = []
    for before, layer, after in zip(layers, layers[1:], layers[2:], strict=False):
        relu = isinstance(layer, Act) and layer.spec.name == "ReLU"
        if relu and isinstance(before, (First, Hidden, Own)) and isinstance(after, (Hidden, Own)):
            before.end, after.mask = "relu", "mask"
            done.append(layer)
    return [m for m in layers if m not in done]


@dataclass(frozen=True)
class Visit:
    """What K clients have learned, without K copies of the weights unless somebody asks for them."""

    layers: Sequence[Weights]
    loss: Tensor
    """Mean training loss over the visit's steps, [K]."""
    exact: bool
    """Never sum in bfloat16."""
    like: Tensor
    """Of the weights' type and device."""
    start: Params
    """The shared weights, in the model's order: how layers were trained must not show in theirs."""

    def rows(self) -> tuple[Stack, Stack]:
        """Trainable weights, [K, ...]; no model with buffers is read."""
        stacks = {k: v for layer in self.layers for k, v in layer.stack().items()}
        return self._ordered(stacks), {}

    def changes(self) -> Stack:
        """How far each client's weights are from the shared ones, [K, ...]."""
        found = Stack()
        for layer in self.layers:
            if isinstance(layer, (First, Hidden)) and layer.own:  # which never had the weights
                found |= layer.changes
            else:
                found |= {k: v - self.start[k] for k, v in layer.stack().items()}
        return self._ordered(found)

    def settled(self) -> None:
        """There are no buffers."""

    def mean_buffers(self, weight: Tensor) -> Stack:
        """There are none."""
        return {}

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each client's change, [K], float64; not finite where the change is not."""
        if len(self.layers) == 1:
            return self.layers[0].sq_norms(upper).double()
        return torch.stack([layer.sq_norms(upper).double() for layer in self.layers]).sum(0)

    def weighted_sum(self, weight: Tensor) -> Params:
        """Sum over clients of weight times change; a client of weight 0 may hold anything."""
        w = weight.to(self.like)
        parts = (m.weighted_sum(w, self.exact) for m in self.layers)
        return self._ordered({k: v for part in parts for k, v in part.items()})

    def _ordered(self, tree: Params) -> Params:
        return {k: tree[k] for k in self.start if k in tree}
