"""What comes before the dense part of a model: convolutions, pooling, norms, embeddings, branches.

Convolutions do not gain from clients side by side on a CPU: each client's own are one call of the
library either way, and many clients' activations fall out of cache. So the front is run client after
client with autograd, on copies of its parameters, and what is gained is everything around it: channels
last, pooling before the activation, no optimizer, and a dense part that all clients share.
"""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from fedtorch.fast.dropout import Coins, Masked, dropout
from fedtorch.fast.layer_table import CALLS, MODULES
from fedtorch.fast.layers import Leaf, Leaves
from fedtorch.training.dropout import Dropout
from fedtorch.training.module import training
from fedtorch.types import Params, Stack


@dataclass(frozen=True)
class Front:
    """Where the front ends and what it owns; only names, so that workers can be sent it."""

    end: str
    """The node of the traced graph whose result the dense part takes."""
    names: tuple[str, ...]
    """Its parameters, as the model names them."""
    numbers: int = 0
    """How many numbers they are."""
    drops: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Nodes that drop something, and how their input lies in memory on the general path."""


def cut(graph: fx.Graph, end: fx.Node, root: nn.Module, example: Tensor) -> Front | str:
    """The part of ``graph`` up to ``end`` as a front, or one clause saying what is not known."""
    names: list[str] = []
    drops: list[tuple[str, tuple[int, ...]]] = []
    part = upto(graph, end)
    for node in part.nodes:
        target = str(node.target)[2:]
        if drop := dropout(node, root):
            order = layout(drop, node, part, root, example)
            if isinstance(order, str):
                return order
            drops += [(node.name, order)] if drop.p else []
        elif node.op == "call_module":
            m = root.get_submodule(str(node.target))
            renorms = getattr(m, "max_norm", None) is not None  # its copy, and not what is trained
            if type(m) not in MODULES or renorms:
                return f"layer {target or 'model'} ({m._get_name()}) has no fast form"
            names += [f"{target}.{n}" if target else n for n, _ in m.named_parameters()]
        elif node.op == "get_attr":
            return f"parameter {target} is used outside of a layer"
        elif node.op in ("call_function", "call_method") and node.target not in CALLS:
            called = getattr(node.target, "__name__", node.target)
            return f"{called} has no fast form"
    out = fx.Interpreter(fx.GraphModule(root, part)).run(example)
    if out.dim() != 2 or len(out) != len(example):
        return f"its dense layers see {list(out.shape[1:])} for an example, not one row"
    if not names:
        return "examples are changed before the first layer"
    numbers = sum(root.get_parameter(f"0.{n}").numel() for n in names)
    return Front(end.name, tuple(names), numbers, tuple(drops))


def layout(
    drop: Dropout, node: fx.Node, part: fx.Graph, root: nn.Module, example: Tensor
) -> tuple[int, ...] | str:
    """Axes of what dropout in a front takes, as they lie in memory; or why it has no fast form."""
    before = node.all_input_nodes[0]
    if drop.inplace and len(before.users) > 1:
        return f"{node.name} changes in place what others read"
    x = fx.Interpreter(fx.GraphModule(root, upto(part, before))).run(example)
    if drop.axes not in (0, x.dim()):
        return f"{node.name} drops channels of inputs with {x.dim()} axes"
    return tuple(x.dim_order())


def upto(graph: fx.Graph, end: fx.Node) -> fx.Graph:
    """A copy of the graph that returns what ``end`` gives."""
    needed = {end}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(copies[end])
    return part


def build(model: nn.Module, front: Front, apart: bool = False) -> fx.GraphModule:
    """The front of a model as a module that shares the model's parameters, pooling first.

    ``apart``: nothing is changed in place, so that what a layer gave can be asked about afterwards.
    """
    root, graph = traced(model)
    (end,) = (n for n in graph.nodes if n.name == front.end)
    part = upto(graph, end)
    if apart:
        out_of_place(part, root)
    dropout_by_generator(part, root, dict(front.drops))
    for node in list(part.nodes):
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # channels last, what was one block of memory may not be one
        if pools(node, root) and activates(node.args[0], root) and len(node.args[0].users) == 1:
            # a maximum does not care whether it is taken before or after ReLU, which then has less to do
            act = node.args[0]
            node.args = (act.args[0], *node.args[1:])
            node.replace_all_uses_with(act)
            act.args = (node, *act.args[1:])
            node.append(act)
    return fx.GraphModule(root, part)


def out_of_place(part: fx.Graph, root: nn.Module) -> None:
    """Let nothing in ``part`` write over its input; where others read that, the trial will tell."""
    for node in part.nodes:
        if node.op == "call_module":
            layer = root.get_submodule(str(node.target))
            if getattr(layer, "inplace", False):
                own = copy.copy(layer)
                setattr(own, "inplace", False)  # noqa: B010 (a module's attributes have no types)
                root.add_module(node.name, own)
                node.target = node.name
        elif node.target is operator.iadd:
            node.target = operator.add
        elif node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}


def traced(model: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """What ``forward`` does in training mode, and the module its nodes refer to."""
    root = nn.Sequential(model)  # so that a model of one layer is read like any other
    training(model)  # here and not in the trace: a model may have its own idea of it
    with TRACING:
        return root, Alone().trace(root)


TRACING = Lock()


class Alone(fx.Tracer):
    """Tracing takes over the calls of all modules there are: those of other threads go on as they were."""

    def __init__(self) -> None:
        """Of the thread that asks."""
        super().__init__()
        self.thread = get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace what is called here."""
        if get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Trace what is looked at here."""
        if get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def dropout_by_generator(
    part: fx.Graph, root: nn.Module, orders: dict[str, tuple[int, ...]]
) -> None:
    """Let dropout in ``part`` draw from a generator that is given to it; off, it is nothing at all."""
    generator: fx.Node | None = None
    for node in list(part.nodes):
        if node.op == "placeholder" and orders:
            with part.inserting_after(node):
                generator = part.placeholder("generator")
        if drop := dropout(node, root):
            new = node.all_input_nodes[0]
            if drop.p:
                root.add_module(node.name, Masked(drop, orders[node.name]))
                with part.inserting_before(node):
                    new = part.call_module(node.name, (new, generator))
            node.replace_all_uses_with(new)
            part.erase_node(node)


def pools(node: fx.Node, root: nn.Module) -> bool:
    """Whether it is max pooling."""
    if node.op == "call_module":
        m = root.get_submodule(str(node.target))
        return type(m) is nn.MaxPool2d and not m.return_indices
    return node.target is F.max_pool2d and not node.kwargs.get("return_indices")


def activates(node: object, root: nn.Module) -> bool:
    """Whether it is ReLU."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))) is nn.ReLU
    return node.target in (F.relu, torch.relu, "relu")


class Features(Leaves):
    """The front of K clients: their own copies of its parameters, run one after another."""

    def __init__(
        self, module: fx.GraphModule, leaves: dict[str, Leaf], x: Tensor, coins: Coins, half: bool
    ) -> None:
        """``x`` [N, ...]: the examples, channels last."""
        super().__init__(leaves)
        self.module, self.half = module, half
        self.x, self.coins = x, coins
        self.t, self.draws = 0, needs_generator(module)

    def forward(self, a: Tensor) -> Tensor:
        """Rows of the data [k, B] -> features [k, B, F], zero where there is no example."""
        k, B = a.shape
        self.counts = self.coins.order.counts[self.t][:k]
        self.t += 1
        self.runs: list[tuple[dict[str, Tensor], Tensor]] = []
        for j, n in enumerate(self.counts):
            own = {name: self._copy(leaf.value[j]) for name, leaf in self.leaves.items()}
            with torch.enable_grad():
                x = self.x[a[j, :n]]
                x = x.bfloat16() if self.half and x.is_floating_point() else x
                given = (x, self.coins.generators[j]) if self.draws else (x,)
                weights = {f"0.{k}": v for k, v in own.items()}
                features = functional_call(self.module, weights, given)
            self.runs.append((own, features))
        out = padded([features for _, features in self.runs], self.counts, B)
        return out.float() if self.half else out

    def step(self, d: Tensor) -> None:
        """Autograd from the features on, then the step, client after client."""
        rule = next(iter(self.leaves.values())).rule
        scale = 1.0 if rule.momentum else 1 / rule.lr  # without momentum d is times lr already
        for j, ((own, features), n) in enumerate(zip(self.runs, self.counts, strict=True)):
            grads = backward(features, d[j, :n].to(features.dtype), [*own.values()])
            for leaf, g in zip(self.leaves.values(), grads, strict=True):
                leaf.move(stored(g)[None].to(leaf.value.dtype), slice(j, j + 1), scale)
        self.runs = []

    def stack(self) -> Stack:
        """The copies."""
        return {n: shaped(v) for n, v in super().stack().items()}

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Of each."""
        found = super().weighted_sum(weight, exact)
        return {n: shaped(v[None])[0].contiguous() for n, v in found.items()}

    def _copy(self, value: Tensor) -> Tensor:
        # a copy: the step of one client would count as a change of all that share the memory
        own = shaped(value[None])[0]
        return (own.bfloat16() if self.half else own.clone()).requires_grad_()


def needs_generator(module: fx.GraphModule) -> bool:
    """Whether it wants a generator for what it drops."""
    return any(isinstance(m, Masked) for m in module.children())


def padded(features: Sequence[Tensor], counts: Sequence[int], batch: int) -> Tensor:
    """The first ``counts[k]`` rows of each client's features as [K, batch, F], zero behind them."""
    out = []
    for f, n in zip(features, counts, strict=True):
        f = f.detach()
        out.append(f if n == batch else F.pad(f[:n], (0, 0, 0, batch - n)))
    return torch.stack(out)


def backward(features: Tensor, d: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``leaves`` from that of the features.

    Of the sum of features times ``d``: autograd that is given ``d`` itself imports sympy first.
    """
    with torch.enable_grad():
        return torch.autograd.grad((features * d).sum(), leaves)


def kept(stack: Tensor) -> Tensor:
    """What is each client's own, [K, ...], as the weights are kept."""
    return stack if stack.dim() != 5 else stack.permute(0, 1, 3, 4, 2).contiguous()


def stored(weight: Tensor) -> Tensor:
    """A 2-D convolution's weight [out, in, h, w] as it is kept: [out, h, w, in]; others as they are."""
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


def shaped(stack: Tensor) -> Tensor:
    """The way back, with a client axis: [K, out, h, w, in] -> [K, out, in, h, w], channels last."""
    return stack.permute(0, 1, 4, 2, 3) if stack.dim() == 5 else stack
