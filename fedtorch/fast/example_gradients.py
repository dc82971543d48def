"""A front under DP-SGD: each example's own gradient, in the layers before the dense part.

Autograd brings the gradients of what each layer puts out; an example's gradient of the layer's weights
follows from its own input and its own output's gradient. For convolutions that is no more arithmetic
than the gradient of the whole batch, so nothing is saved by asking for norms alone.
"""

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fedtorch.fast.dropout import Coins
from fedtorch.fast.front import Front, backward, needs_generator, padded
from fedtorch.fast.layers import Leaf, Leaves
from fedtorch.fast.tuning import GRADIENTS_WRITTEN
from fedtorch.privacy.formulas import GRADIENTS, unlike
from fedtorch.types import Params


class Examples(Leaves):
    """The front of K clients under DP-SGD, run one after another."""

    def __init__(
        self, module: fx.GraphModule, leaves: dict[str, Leaf], x: Tensor, coins: Coins
    ) -> None:
        """``x`` [N, ...]: the examples, channels last."""
        super().__init__(leaves)
        self.watch, self.x, self.coins, self.t = Watch(module), x, coins, 0
        self.draws = needs_generator(module)

    def forward(self, a: Tensor) -> Tensor:
        """Rows of the data [k, B] -> features [k, B, F], zero where there is no example."""
        k, B = a.shape
        self.counts = self.coins.order.counts[self.t][:k]
        self.t += 1
        self.runs: list[tuple[list[Seen], Tensor]] = []
        for j, n in enumerate(self.counts):
            own = {name: fitted(leaf.value[j]) for name, leaf in self.leaves.items()}
            # an empty batch is run as one of a single example, whose result nobody looks at: it must
            # not move the client's generator on
            x = self.x[a[j, : max(n, 1)]]
            coins = self.coins.generators[j] if n else torch.Generator()
            with torch.enable_grad():
                features = self.watch.seen_with(own, *((x, coins) if self.draws else (x,)))
            self.runs.append((self.watch.seen, features))
        return padded([features for _, features in self.runs], self.counts, B)

    def gradients(self, j: int, d: Tensor) -> Params:
        """Client j's examples' gradients by name, [n, ...], from those of its features, [B, F]."""
        (seen, features), n = self.runs[j], self.counts[j]
        if not n:
            return {name: leaf.value[:0] for name, leaf in self.leaves.items()}
        outputs = [s.output for s in seen]
        return {
            s.prefix + name: each
            for s, g in zip(seen, backward(features, d[:n], outputs), strict=True)
            for name, each in GRADIENTS[type(s.layer)](s.layer, s.input, g).items()
        }

    def step(self, d: Tensor) -> None:
        """The step is private, and taken with those of all layers."""


class Seen:
    """A layer with parameters, what it took and what it gave."""

    def __init__(self, prefix: str, layer: nn.Module, taken: Tensor, output: Tensor) -> None:
        self.prefix, self.layer, self.input, self.output = prefix, layer, taken, output


class Watch(fx.Interpreter):
    """Runs a front with given weights and notes what its layers see."""

    def seen_with(self, weights: Params, *given: Tensor | torch.Generator) -> Tensor:
        """Features of examples, and of masks drawn for them; what was seen is in ``seen``."""
        self.weights, self.seen = weights, list[Seen]()
        return cast(Tensor, self.run(*given))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer with the given weights if it has any."""
        layer = self.submodules[target]
        prefix = prefixed(target)
        own = {n: self.weights[prefix + n] for n, _ in layer.named_parameters()}
        if not own:
            return layer(*args, **kwargs)
        out = functional_call(layer, own, args, kwargs)
        if not out.requires_grad:
            out.requires_grad_()
        self.seen.append(Seen(prefix, layer, args[0].detach(), out))
        return out


def unknown(model: nn.Module, front: Front, batch: int) -> str | None:
    """Why gradients of single examples have no fast form in this front; None where they have."""
    if batch * front.numbers > GRADIENTS_WRITTEN:
        return f"the gradients of {batch} examples in its first layers would take too much memory"
    for name in front.names:
        layer = model.get_submodule(name.rpartition(".")[0])
        if why := unlike(layer):
            return f"layer {name.rpartition('.')[0]}: {why} under sample-level privacy"
    return None


def prefixed(target: str) -> str:
    """What the model calls the parameters of a node's layer, without their last names."""
    name = target.partition(".")[2]
    return f"{name}." if name else ""


def fitted(value: Tensor) -> Tensor:
    """A weight as the library likes it: those of 2-D convolutions channels last."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
