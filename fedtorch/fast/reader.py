"""Reading a model: what the fast path understands, and in plain words what it does not.

torch.fx writes down what ``forward`` does, so that it does not matter whether the model is a Sequential
or has a forward of its own.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fedtorch.fast.dropout import dropout
from fedtorch.fast.front import Front, cut, traced, upto
from fedtorch.fast.layer_table import Activation, activation
from fedtorch.training.dropout import Dropout
from fedtorch.types import Params


@dataclass(frozen=True)
class Linear:
    """A linear layer by the names of its parameters."""

    weight: str
    bias: str | None
    shape: tuple[int, int]
    """(outputs, inputs)."""

    def named(self, weight: Tensor, bias: Tensor | None) -> Params:
        """Parameters (or a stack of them) under the model's own names."""
        return {self.weight: weight} | ({} if bias is None or not self.bias else {self.bias: bias})


DensePart = Linear | Activation | Dropout
"""Of the dense part."""


@dataclass(frozen=True)
class Chain:
    """A model as a front of any known layers, then linear layers and what is between them."""

    layers: tuple[DensePart, ...]
    """The dense part, from flat features to outputs."""
    front: Front | None = None
    """What comes before it; none: the examples themselves, flattened."""
    squeezed: bool = False
    """Whether the model puts out one number for each example, [B] and not [B, 1]."""

    @property
    def drops_inputs(self) -> bool:
        """Whether what the dense part takes is dropped first."""
        return isinstance(self.layers[0], Dropout)

    @property
    def drops(self) -> bool:
        """Whether anything is dropped at random."""
        dense = any(isinstance(layer, Dropout) for layer in self.layers)
        return dense or bool(self.front and self.front.drops)


SHAPES = {torch.flatten, operator.getitem, getattr, "flatten", "view", "reshape", "size"}
"""Calls that change nothing but the shape."""


SQUEEZES: dict[object, tuple[tuple[object, ...], ...]] = {
    **{f: ((1,), (-1,)) for f in (torch.squeeze, "squeeze")},
    **{f: ((), (0,)) for f in (torch.flatten, "flatten")},
    **{f: ((-1,),) for f in (torch.reshape, "view", "reshape")},
    operator.getitem: (((slice(None), 0),),),
}
"""Calls, and what they are told, that turn [B, 1] into [B] whatever B is."""


def read(model: nn.Module, example: Tensor) -> Chain | str:
    """The model as a chain, or one clause saying what stands in the way."""
    for name, m in model.named_modules():
        if hooks(m):
            return f"layer {name or 'model'} ({m._get_name()}) has hooks"
    try:
        root, graph = traced(model)
    except Exception as e:  # whatever a model's own code may raise when it is shown a symbol
        return f"torch.fx cannot read its forward ({type(e).__name__})"
    end, squeezed = outputs(graph)
    layers, node = dense(end, root)
    if not layers or (squeezed and width(layers) != 1):
        return "it does not end in a linear layer"
    dropped, start = dropped_inputs(node, root)
    if flattens(graph, start, root, example):
        layers, front = dropped + layers, None
    else:
        front = cut(graph, node, root, example)
    if isinstance(front, str):
        return front
    drops = sum(isinstance(layer, Dropout) for layer in layers) + len(front.drops if front else ())
    if drops < sum(bool(d and d.p) for d in (dropout(n, root) for n in graph.nodes)):
        return "what a dropout layer gives is not used"  # but it draws, and what is drawn later differs
    found = [n for layer in layers if isinstance(layer, Linear) for n in (layer.weight, layer.bias)]
    found += front.names if front else ()
    return whole(model, [n for n in found if n]) or Chain(tuple(layers), front, squeezed)


def whole(model: nn.Module, found: Sequence[str]) -> str | None:
    """Check that this is the whole model: every parameter once, none frozen, no statistics."""
    own = dict(model.named_parameters())
    if sorted(found) != sorted(own):
        return "a parameter is shared between layers or used outside of them"
    if frozen := [n for n, p in own.items() if not p.requires_grad]:
        return f"parameter {frozen[0]} is frozen"
    if statistics := [n for n, _ in model.named_buffers()]:
        return f"it has statistics ({statistics[0]})"
    return None


def outputs(graph: fx.Graph) -> tuple[object, bool]:
    """What the dense part puts out, and whether an axis of one output is taken away from it then."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    end = output.args[0]
    if not isinstance(end, fx.Node) or end.op not in ("call_function", "call_method"):
        return end, False
    told = (*end.args[1:], *end.kwargs.values())
    if end.target in SQUEEZES and told in SQUEEZES[end.target]:
        return end.args[0], True
    return end, False


def width(layers: Sequence[DensePart]) -> int:
    """Outputs of the last linear layer."""
    return [layer.shape[0] for layer in layers if isinstance(layer, Linear)][-1]


def dense(end: object, root: nn.Module) -> tuple[list[DensePart], fx.Node]:
    """Linear layers and what is between them up to ``end``, and the node that feeds them."""
    layers: list[DensePart] = []
    at: Any = end
    linear = 0
    while isinstance(at, fx.Node) and len(at.users) == 1:
        layer = simple(at, root)
        if layer is None:
            break
        if not isinstance(layer, str):
            layers.append(layer)
        at = at.args[0]
        if isinstance(layer, Linear):
            linear, end = len(layers), at
    # activations before the first linear layer belong to what comes before it
    return layers[:linear][::-1], cast(fx.Node, end)


def simple(node: fx.Node, root: nn.Module) -> DensePart | str | None:
    """A node of the dense part; "nothing" where it does nothing, None where it is something else."""
    if drop := dropout(node, root):
        return "nothing" if not drop.p else None if drop.axes else drop
    if node.op == "call_module":
        m = root.get_submodule(str(node.target))
        prefix = str(node.target)[2:]
        name = f"{prefix}." if prefix else ""
        if type(m) is nn.Identity:
            return "nothing"
        if type(m) is nn.Linear:
            bias = None if m.bias is None else f"{name}bias"
            return Linear(f"{name}weight", bias, (m.out_features, m.in_features))
    return activation(node, root)


def dropped_inputs(end: fx.Node, root: nn.Module) -> tuple[list[DensePart], fx.Node]:
    """Dropout right before the dense part, and the node that feeds it."""
    layers: list[DensePart] = []
    while (drop := dropout(end, root)) and not drop.axes and len(end.users) == 1:
        layers += [drop] if drop.p else []
        end = end.all_input_nodes[0]
    return layers[::-1], end


def flattens(graph: fx.Graph, end: fx.Node, root: nn.Module, example: Tensor) -> bool:
    """Whether all that happens up to ``end`` is that examples are flattened."""
    for node in graph.nodes:
        if node.op == "call_module":
            if type(root.get_submodule(str(node.target))) not in (nn.Flatten, nn.Identity):
                return False
        elif node.op != "placeholder" and node.target not in SHAPES:
            return False
        if node is end:
            break
    out = fx.Interpreter(fx.GraphModule(root, upto(graph, end))).run(example)
    return bool(out.shape == example.flatten(1).shape)


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
