"""A solver for models the fast path can read: K clients in lock-step through ``layers``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedtorch.batches import plan
from fedtorch.fast.layers import Dual, Known, Layer, Leaf, Own, Rule, Seen, Weights
from fedtorch.fast.read import Activation, Chain, Linear
from fedtorch.losses import cross_entropy, reduce
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.solvers import Recipe
from fedtorch.strategies import FedProx, Scaffold
from fedtorch.types import Context, Params, Stack, Task

CACHE = 8 << 20
"""Bytes of weights, inputs and gradients that a chunk may touch: where it takes a third of the last
cache, rounds were fastest."""


@dataclass(frozen=True)
class Schedule:
    """Which rows of all the chunk's examples each client takes, step by step."""

    index: Tensor
    """[K, T]: T = steps x batch; where a client has no example, any of its own."""
    scale: Tensor
    """[K, T, 1]: 1 / size of the batch, and 0 where there is no example."""
    live: list[int]
    """Clients still training at each step; they come first, as those with most steps do."""
    batch: int


def schedule(plans: Sequence[Tensor], sizes: Sequence[int]) -> Schedule:
    """Put the clients' plans side by side. The plans must come in order of falling length."""
    steps = [len(p) for p in plans]
    if steps != sorted(steps, reverse=True):
        raise ValueError("clients must come in order of falling number of steps")
    S, B = steps[0], max(p.shape[1] for p in plans)
    index = torch.stack([F.pad(p, (0, B - p.shape[1], 0, S - len(p)), value=-1) for p in plans])
    real = index >= 0
    scale = real / real.sum(2, keepdim=True).clamp(min=1)
    first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    flat = (index.clamp(min=0) + first[:, None, None]).flatten(1)
    live = [sum(t < s for s in steps) for t in range(S)]
    return Schedule(flat, scale.flatten(1)[..., None], live, B)


class Fast:
    """The solver of one model: what was read, and what may be kept between rounds."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def __call__(
        self,
        model: nn.Module,
        datasets: Sequence[Dataset],
        plans: Sequence[Tensor],
        task: Task,
        recipe: Recipe,
        ctx: Context,
        private: PrivateSteps | None = None,
    ) -> "Visit":
        """Train K clients; the same contract as ``solvers.general``."""
        with torch.no_grad():
            tables = [cast(TensorDataset, d).tensors for d in datasets]
            x = torch.cat([t[0].flatten(1) for t in tables])
            y = torch.cat([t[1] for t in tables])
            order = schedule(plans, [len(t[0]) for t in tables])
            rule, shift = of(recipe, ctx, task.lr)
            layers = self._layers(x, order, task.state, rule, shift, private is not None)
            losses = steps(layers, order, y, recipe, rule, private)
        return Visit(
            [cast(Weights, m) for m in layers if not isinstance(m, Act)], losses / ctx.steps
        )

    def chunk(self, examples: int, recipe: Recipe, noised: bool) -> int:
        """How many clients with so many examples stay in cache together; 64 at most."""
        rows = plan(examples, recipe, 0).numel()
        specs = [s for s in self.chain.layers if isinstance(s, Linear)]
        held = rows * specs[0].shape[1] + rows * rows  # the data and its Gram matrix
        for n, spec in enumerate(specs):
            out, into = spec.shape
            dual = not noised and dual_pays(rows, spec.shape, n == 0)
            held += rows * (2 * out + (into if n else 0)) if dual else out * into
        return int(max(1, min(64, CACHE // (4 * held))))

    def _layers(
        self,
        x: Tensor,
        order: Schedule,
        state: Params,
        rule: Rule,
        shift: Params,
        noised: bool,
    ) -> list[Layer]:
        K, T = order.index.shape
        layers: list[Layer] = []
        for spec in self.chain.layers:
            if isinstance(spec, Activation):
                layers.append(Act(spec))
                continue
            first = not layers
            w, b = state[spec.weight], None if spec.bias is None else state[spec.bias]
            # noise in every step makes the weights of each client a full matrix of its own
            implicit = not (shift or rule.momentum or noised)
            if implicit and dual_pays(T, spec.shape, first):
                one = b is not None
                known = Known(x, order.index, grams(x, order.index, one)) if first else None
                layers.append(Dual(spec, w, b, known or Seen(K, T, w, one), rule))
                continue
            bias = None if b is None else Leaf(b[None], K, rule, shift.get(spec.bias or ""))
            weight = Leaf(w, K, rule, shift.get(spec.weight))
            layers.append(Own(spec, weight, bias, x if first else None))
        return layers


@dataclass(frozen=True)
class Visit:
    """What K clients have learned, without K copies of the weights unless somebody asks for them."""

    layers: Sequence[Weights]
    loss: Tensor
    """Mean training loss over the visit's steps, [K]."""

    @property
    def params(self) -> Stack:
        """Trainable weights, [K, ...]."""
        return {k: v for layer in self.layers for k, v in layer.stack().items()}

    @property
    def buffers(self) -> Stack:
        """No model with buffers is read."""
        return {}

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each client's change, [K], float64; not finite where the change is not."""
        return torch.stack([layer.sq_norms(upper).double() for layer in self.layers]).sum(0)

    def weighted_sum(self, weight: Tensor) -> Params:
        """Sum over clients of weight times change; a client of weight 0 may hold anything."""
        w = weight.float()
        return {k: v for layer in self.layers for k, v in layer.weighted_sum(w).items()}


class Act:
    """An activation between two layers."""

    def __init__(self, spec: Activation) -> None:
        self.spec = spec

    def forward(self, a: Tensor) -> Tensor:
        """Of each number."""
        self.z = a
        self.a = self.spec.forward(a)
        return self.a

    def backward(self, d: Tensor) -> Tensor:
        """Chain rule."""
        return self.spec.backward(d, self.z, self.a)

    def step(self, d: Tensor) -> None:
        """Nothing to move."""


def steps(
    layers: list[Layer],
    order: Schedule,
    y: Tensor,
    recipe: Recipe,
    rule: Rule,
    private: PrivateSteps | None,
) -> Tensor:
    """All local steps of all clients; returns the sum of each client's losses over its steps."""
    head = CrossEntropy(y, order) if recipe.loss is cross_entropy else AnyLoss(y, order, recipe)
    scale = order.scale if rule.momentum else order.scale * rule.lr
    if private is not None:
        scale = (order.scale > 0).to(order.scale)  # each example's own gradient
    for t, k in enumerate(order.live):
        rows = slice(t * order.batch, (t + 1) * order.batch)
        a = order.index[:k, rows]
        for layer in layers:
            a = layer.forward(a)
        d = head(a, k, rows).mul_(scale[:k, rows])
        grads = []
        for layer in reversed(layers[1:]):
            grads.append(d)
            d = layer.backward(d)
        grads.append(d)
        if private is not None:
            noised(layers, grads[::-1], private)
            continue
        for layer, d in zip(layers, reversed(grads), strict=True):
            layer.step(d)
    return head.total()


def noised(layers: list[Layer], grads: list[Tensor], private: PrivateSteps) -> None:
    """A step of DP-SGD: clip each example by its norm over all layers, sum, add noise, move.

    The norm of an outer product is the product of the norms, so no example's gradient is ever built. An
    example that is not finite counts as nothing.
    """
    own = [(m, d) for m, d in zip(layers, grads, strict=True) if isinstance(m, Own)]
    factors = private.factors(torch.stack([m.example_sq_norms(d) for m, d in own]).sum(0))
    used = factors > 0
    sums: Stack = {}
    for m, d in own:
        d = d if used.all() else torch.where(used[..., None], d, 0)
        sums |= m.sums(d * factors[..., None], used)
    done = private.finish(sums)
    for m, _ in own:
        m.move(done)


class CrossEntropy:
    """Gradient of the loss of each example: softmax minus one-hot."""

    def __init__(self, y: Tensor, order: Schedule) -> None:
        self.y, self.scale = y[order.index], order.scale
        self.losses = torch.zeros(order.index.shape)

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Logits [k, B, C] -> gradient, and the losses are kept."""
        y = self.y[:k, rows, None]
        logp = z.log_softmax(-1)
        self.losses[:k, rows] = logp.gather(2, y)[..., 0]
        return logp.exp_().scatter_add_(2, y, logp.new_full((1, 1, 1), -1).expand(y.shape))

    def total(self) -> Tensor:
        """Sum over steps of the mean loss of each batch, [K]."""
        return -(self.losses * self.scale[..., 0]).double().sum(1)


class AnyLoss:
    """A loss for each example, differentiated by autograd on the outputs alone."""

    def __init__(self, y: Tensor, order: Schedule, recipe: Recipe) -> None:
        self.y, self.scale, self.loss = y[order.index], order.scale, recipe.loss
        self.losses = torch.zeros(order.index.shape)

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Outputs [k, B, ...] -> gradient, and the losses are kept."""
        out = z.flatten(0, 1).detach().requires_grad_()
        with torch.enable_grad():
            each = reduce(self.loss(out, self.y[:k, rows].flatten(0, 1)))
            (d,) = torch.autograd.grad(each.sum(), out)
        self.losses[:k, rows] = each.detach().view(z.shape[:2]).to(self.losses.dtype)
        return d.view(z.shape)

    def total(self) -> Tensor:
        """Sum over steps of the mean loss of each batch, [K]."""
        return (self.losses * self.scale[..., 0]).double().sum(1)


def of(recipe: Recipe, ctx: Context, lr: float) -> tuple[Rule, Params]:
    """Optimizer and strategy as one linear rule, and SCAFFOLD's shift."""
    strategy, args = recipe.strategy, recipe.optimizer.args
    pull, shift = 0.0, {}
    if isinstance(strategy, FedProx):
        pull = strategy.mu
    elif isinstance(strategy, Scaffold):
        shift = {k: ctx.extras["c"][k] - ck for k, ck in ctx.memory["c"].items()}
    return Rule(lr, args.get("momentum", 0.0), args.get("weight_decay", 0.0), pull), shift


def dual_pays(rows: int, shape: tuple[int, int], first: bool) -> bool:
    """Whether the dual form is cheaper, in nanoseconds per row at rates measured on one core."""
    out, inputs = shape
    if first:
        return 4 * inputs * out / 95 + rows * out / 40 < 4 * inputs * out / 50
    return 6 * inputs * out / 95 + 2 * rows * (inputs + out) / 40 < 6 * inputs * out / 50


def grams(x: Tensor, index: Tensor, bias: bool) -> Tensor:
    """Products of each client's rows with each other, [K, T, T]."""
    rows = x[index]
    return rows.bmm(rows.mT).add_(float(bias))
