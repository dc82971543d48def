"""Reading a model: what the fast path understands, and in plain words what it does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedtorch.types import Params

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """A linear layer by the names of its parameters."""

    weight: str
    bias: str | None
    shape: tuple[int, int]
    """(outputs, inputs)."""
    image: tuple[int, int, int] | None = None
    """Channels, rows and columns of what was flattened into its input, if it was an image."""

    def named(self, weight: Tensor, bias: Tensor | None) -> Params:
        """Parameters (or a stack of them) under the model's own names."""
        return {self.weight: weight} | ({} if bias is None or not self.bias else {self.bias: bias})


@dataclass(frozen=True)
class Activation:
    """A function of each number alone; only its name, so that workers can be sent it."""

    name: str
    approximate: str = "none"

    def forward(self, z: Tensor) -> Tensor:
        """The function."""
        if self.name == "GELU":
            return cast(Tensor, aten.gelu(z, approximate=self.approximate))
        return FORWARD[self.name](z)

    def backward(self, d: Tensor, z: Tensor, a: Tensor) -> Tensor:
        """Gradient of its result ``a`` -> gradient of ``z``."""
        if self.name == "GELU":
            return cast(Tensor, aten.gelu_backward(d, z, approximate=self.approximate))
        return BACKWARD[self.name](d, z, a)


FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "SiLU": aten.silu,
}

BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ReLU": lambda d, z, a: aten.threshold_backward(d, a, 0),
    "Tanh": lambda d, z, a: aten.tanh_backward(d, a),
    "Sigmoid": lambda d, z, a: aten.sigmoid_backward(d, a),
    "SiLU": lambda d, z, a: aten.silu_backward(d, z),
}


@dataclass(frozen=True)
class Chain:
    """A model as one layer after another, from flat examples to outputs."""

    layers: tuple[Linear | Activation, ...]
    names: tuple[str, ...]
    """Every trainable parameter."""


def activation(m: nn.Module) -> Activation | None:
    """The activations there are; None for any other module."""
    if type(m) is nn.GELU:
        return Activation("GELU", m.approximate)
    name = type(m).__name__
    return Activation(name) if name in FORWARD and type(m) is getattr(nn, name) else None


def read(model: nn.Module, example: Tensor) -> Chain | str:
    """The model as a chain, or one clause saying what stands in the way."""
    steps = modules(model)
    if isinstance(steps, str):
        return steps
    layers: list[Linear | Activation] = []
    found: list[str] = []
    shape = tuple(example.shape[1:])
    for name, m in steps:
        if type(m) is nn.Identity:
            continue
        if type(m) is nn.Flatten and m.start_dim == 1 and m.end_dim == -1:
            shape = (int(torch.Size(shape).numel()),)
        elif type(m) is nn.Linear and len(shape) == 1:
            names = [f"{name}.{n}" if name else n for n, _ in m.named_parameters()]
            layers.append(
                Linear(
                    names[0], None if m.bias is None else names[1], (m.out_features, m.in_features)
                )
            )
            found += names
            shape = (m.out_features,)
        elif act := activation(m):
            layers.append(act)
        else:
            return f"layer {name or 'model'} ({m._get_name()}) has no fast form"
    return whole(model, layers, found)


def whole(model: nn.Module, layers: Sequence[Any], found: Sequence[str]) -> Chain | str:
    """Check that the chain is the whole model: every parameter once, none frozen, no statistics."""
    own = dict(model.named_parameters())
    if sorted(found) != sorted(own):
        return "a parameter is shared between layers or used outside of them"
    if frozen := [n for n, p in own.items() if not p.requires_grad]:
        return f"parameter {frozen[0]} is frozen"
    if not layers or not isinstance(layers[0], Linear):
        return "the first layer is not linear"
    return Chain(tuple(layers), tuple(found))


def modules(model: nn.Module) -> list[tuple[str, nn.Module]] | str:
    """The modules in the order in which they run, each once, with their dotted names."""
    out = []
    for name, m in model.named_modules(remove_duplicate=False):
        if hooks(m):
            return f"layer {name or 'model'} ({m._get_name()}) has hooks"
        if type(m) is nn.Sequential:
            continue
        if any(True for _ in m.children()):
            return f"{m._get_name()} has a forward of its own"
        out.append((name, m))
    return out


def hooks(m: nn.Module) -> bool:
    """Whether something else runs when this module does."""
    return any(
        getattr(m, k, None)
        for k in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
            "parametrizations",
        )
    )
