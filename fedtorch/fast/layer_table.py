"""Layers that the fast path knows: what a front may be made of, and activations between dense layers.

A front's layers and calls keep nothing, draw nothing and ask nothing of data. A client's own batch goes
through them as it does through the module itself, so all that they change is the place in memory; the trial
would tell where that mattered. Of an activation it is known how models write it, what it does, and what its
gradient is.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten = torch.ops.aten

MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.Embedding, nn.Flatten, nn.Unflatten, nn.Identity, nn.Upsample, nn.PixelShuffle,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.GLU,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.LogSigmoid,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LocalResponseNorm,
    nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d,
)  # fmt: skip
"""Layers that keep nothing and draw nothing: a client's own batch is given to them as it is."""

CALLS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.prelu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.glu,
    F.tanh, torch.tanh, F.sigmoid, torch.sigmoid, F.softplus, F.hardtanh, F.hardswish, F.hardsigmoid,
    F.softmax, torch.softmax, F.log_softmax, torch.log_softmax, F.normalize, F.interpolate, F.pad,
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    torch.flatten, torch.cat, torch.stack, torch.chunk, torch.split, torch.squeeze, torch.unsqueeze,
    torch.permute, torch.transpose, torch.add, torch.sub, torch.mul, torch.div, torch.matmul, torch.bmm,
    torch.mean, torch.sum, torch.max, torch.amax, torch.clamp, torch.abs, torch.exp, torch.sqrt,
    operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    operator.matmul, operator.getitem, getattr,
    "relu", "tanh", "sigmoid", "softmax", "log_softmax", "view", "reshape", "flatten", "unflatten",
    "permute", "transpose", "unsqueeze", "squeeze", "size", "contiguous", "chunk", "split", "mean", "sum",
    "max", "amax", "clamp", "abs", "exp", "sqrt", "pow", "add", "sub", "mul", "div", "matmul", "bmm",
}  # fmt: skip
"""Functions and methods of which the same can be said."""

SELU = 1.6732632423543772, 1.0507009873554805, 1.0
"""Klambauer et al. 2017 (arXiv:1706.02515)."""


@dataclass(frozen=True)
class Activation:
    """A function of each number, or each row, alone; only its name, so that workers can be sent it."""

    name: str
    options: tuple[Any, ...] = ()

    def forward(self, z: Tensor) -> Tensor:
        """The function."""
        return ACTIVATIONS[self.name].forward(z, *self.options)

    def backward(self, d: Tensor, z: Tensor, a: Tensor) -> Tensor:
        """Gradient of its result ``a`` -> gradient of ``z``."""
        return ACTIVATIONS[self.name].backward(d, z, a, *self.options)


@dataclass(frozen=True)
class Kind:
    """One of them, under the name of its layer."""

    forward: Callable[..., Tensor]
    """Input, options -> result."""
    backward: Callable[..., Tensor]
    """Gradient, input, result, options -> gradient of the input."""
    calls: tuple[object, ...]
    """Functions and methods by which it is called."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the call, by the names that the layer gives them too, and their defaults."""


ACTIVATIONS = {
    "ReLU": Kind(
        torch.relu,
        lambda d, z, a: aten.threshold_backward(d, a, 0),
        (F.relu, torch.relu, "relu"),
    ),
    "Tanh": Kind(
        torch.tanh,
        lambda d, z, a: aten.tanh_backward(d, a),
        (F.tanh, torch.tanh, "tanh"),
    ),
    "Sigmoid": Kind(
        torch.sigmoid,
        lambda d, z, a: aten.sigmoid_backward(d, a),
        (F.sigmoid, torch.sigmoid, "sigmoid"),
    ),
    "SiLU": Kind(aten.silu, lambda d, z, a: aten.silu_backward(d, z), (F.silu,)),
    "Mish": Kind(aten.mish, lambda d, z, a: aten.mish_backward(d, z), (F.mish,)),
    "Hardswish": Kind(
        aten.hardswish, lambda d, z, a: aten.hardswish_backward(d, z), (F.hardswish,)
    ),
    "SELU": Kind(
        lambda z: aten.elu(z, *SELU),
        lambda d, z, a: aten.elu_backward(d, *SELU, False, z),
        (F.selu, torch.selu),
    ),
    "ReLU6": Kind(
        lambda z: aten.hardtanh(z, 0.0, 6.0),
        lambda d, z, a: aten.hardtanh_backward(d, z, 0.0, 6.0),
        (F.relu6,),
    ),
    "GELU": Kind(
        lambda z, kind: aten.gelu(z, approximate=kind),
        lambda d, z, a, kind: aten.gelu_backward(d, z, approximate=kind),
        (F.gelu,),
        {"approximate": "none"},
    ),
    "LeakyReLU": Kind(
        lambda z, slope: aten.leaky_relu(z, slope),
        lambda d, z, a, slope: aten.leaky_relu_backward(d, z, slope, False),
        (F.leaky_relu,),
        {"negative_slope": 0.01},
    ),
    "ELU": Kind(
        lambda z, alpha: aten.elu(z, alpha),
        lambda d, z, a, alpha: aten.elu_backward(d, alpha, 1.0, 1.0, False, z),
        (F.elu,),
        {"alpha": 1.0},
    ),
    "Softplus": Kind(
        lambda z, beta, threshold: aten.softplus(z, beta, threshold),
        lambda d, z, a, beta, threshold: aten.softplus_backward(d, z, beta, threshold),
        (F.softplus,),
        {"beta": 1.0, "threshold": 20.0},
    ),
    "Softmax": Kind(
        lambda z, dim: z.softmax(-1),
        lambda d, z, a, dim: aten._softmax_backward_data(d, a, -1, a.dtype),
        (F.softmax, torch.softmax, "softmax"),
        {"dim": None},
    ),
    "LogSoftmax": Kind(
        lambda z, dim: z.log_softmax(-1),
        lambda d, z, a, dim: aten._log_softmax_backward_data(d, a, -1, a.dtype),
        (F.log_softmax, torch.log_softmax, "log_softmax"),
        {"dim": None},
    ),
}

ACTIVATION_CALLS = {call: name for name, known in ACTIVATIONS.items() for call in known.calls}


def activation(node: fx.Node, root: nn.Module) -> Activation | None:
    """The activation at a node of the dense part, whose inputs are rows; None for anything else."""
    if node.op == "call_module":
        m = root.get_submodule(str(node.target))
        name = type(m).__name__
        if name not in ACTIVATIONS or type(m) is not getattr(nn, name):
            return None
        given = {k: getattr(m, k) for k in ACTIVATIONS[name].options}
    elif node.op in ("call_function", "call_method") and node.target in ACTIVATION_CALLS:
        name = ACTIVATION_CALLS[node.target]
        options = ACTIVATIONS[name].options
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
