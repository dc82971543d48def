"""Activations between dense layers: how models write them, what they do, and what their gradients are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten = torch.ops.aten

SELU = 1.6732632423543772, 1.0507009873554805, 1.0
"""Klambauer et al. 2017 (arXiv:1706.02515)."""


@dataclass(frozen=True)
class Activation:
    """A function of each number, or each row, alone; only its name, so that workers can be sent it."""

    name: str
    options: tuple[Any, ...] = ()

    def forward(self, z: Tensor) -> Tensor:
        """The function."""
        return KNOWN[self.name].forward(z, *self.options)

    def backward(self, d: Tensor, z: Tensor, a: Tensor) -> Tensor:
        """Gradient of its result ``a`` -> gradient of ``z``."""
        return KNOWN[self.name].backward(d, z, a, *self.options)


@dataclass(frozen=True)
class Known:
    """One of them, under the name of its layer."""

    forward: Callable[..., Tensor]
    """Input, options -> result."""
    backward: Callable[..., Tensor]
    """Gradient, input, result, options -> gradient of the input."""
    calls: tuple[object, ...]
    """Functions and methods by which it is called."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else it is told, as its layer names it too, and what that is where nothing is said."""


KNOWN = {
    "ReLU": Known(
        torch.relu,
        lambda d, z, a: aten.threshold_backward(d, a, 0),
        (F.relu, torch.relu, "relu"),
    ),
    "Tanh": Known(
        torch.tanh,
        lambda d, z, a: aten.tanh_backward(d, a),
        (F.tanh, torch.tanh, "tanh"),
    ),
    "Sigmoid": Known(
        torch.sigmoid,
        lambda d, z, a: aten.sigmoid_backward(d, a),
        (F.sigmoid, torch.sigmoid, "sigmoid"),
    ),
    "SiLU": Known(aten.silu, lambda d, z, a: aten.silu_backward(d, z), (F.silu,)),
    "Mish": Known(aten.mish, lambda d, z, a: aten.mish_backward(d, z), (F.mish,)),
    "Hardswish": Known(
        aten.hardswish, lambda d, z, a: aten.hardswish_backward(d, z), (F.hardswish,)
    ),
    "SELU": Known(
        lambda z: aten.elu(z, *SELU),
        lambda d, z, a: aten.elu_backward(d, *SELU, False, z),
        (F.selu, torch.selu),
    ),
    "ReLU6": Known(
        lambda z: aten.hardtanh(z, 0.0, 6.0),
        lambda d, z, a: aten.hardtanh_backward(d, z, 0.0, 6.0),
        (F.relu6,),
    ),
    "GELU": Known(
        lambda z, kind: aten.gelu(z, approximate=kind),
        lambda d, z, a, kind: aten.gelu_backward(d, z, approximate=kind),
        (F.gelu,),
        {"approximate": "none"},
    ),
    "LeakyReLU": Known(
        lambda z, slope: aten.leaky_relu(z, slope),
        lambda d, z, a, slope: aten.leaky_relu_backward(d, z, slope, False),
        (F.leaky_relu,),
        {"negative_slope": 0.01},
    ),
    "ELU": Known(
        lambda z, alpha: aten.elu(z, alpha),
        lambda d, z, a, alpha: aten.elu_backward(d, alpha, 1.0, 1.0, False, z),
        (F.elu,),
        {"alpha": 1.0},
    ),
    "Softplus": Known(
        lambda z, beta, threshold: aten.softplus(z, beta, threshold),
        lambda d, z, a, beta, threshold: aten.softplus_backward(d, z, beta, threshold),
        (F.softplus,),
        {"beta": 1.0, "threshold": 20.0},
    ),
    "Softmax": Known(
        lambda z, dim: z.softmax(-1),
        lambda d, z, a, dim: aten._softmax_backward_data(d, a, -1, a.dtype),
        (F.softmax, torch.softmax, "softmax"),
        {"dim": None},
    ),
    "LogSoftmax": Known(
        lambda z, dim: z.log_softmax(-1),
        lambda d, z, a, dim: aten._log_softmax_backward_data(d, a, -1, a.dtype),
        (F.log_softmax, torch.log_softmax, "log_softmax"),
        {"dim": None},
    ),
}

CALLS = {call: name for name, known in KNOWN.items() for call in known.calls}


def activation(node: fx.Node, root: nn.Module) -> Activation | None:
    """The activation at a node of the dense part, whose inputs are rows; None for anything else."""
    if node.op == "call_module":
        m = root.get_submodule(str(node.target))
        name = type(m).__name__
        if name not in KNOWN or type(m) is not getattr(nn, name):
            return None
        given = {k: getattr(m, k) for k in KNOWN[name].options}
    elif node.op in ("call_function", "call_method") and node.target in CALLS:
        name = CALLS[node.target]
        options = KNOWN[name].options
        # writing over an input that nobody else reads changes nothing
        said = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "_stacklevel")}
        said |= dict(zip(options, node.args[1:], strict=False))
        given = {**options, **{k: v for k, v in said.items() if v is not None}}
        if len(given) > len(options) or len(node.args) > 1 + len(options):
            return None
    else:
        return None
    if given.get("dim", 1) not in (1, -1) or any(isinstance(v, fx.Node) for v in given.values()):
        return None
    return Activation(name, tuple(given.values()))
