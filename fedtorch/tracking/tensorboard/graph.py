"""The model's modules as a graph: one forward pass with hooks, any module, nothing traced."""

from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.training.module import evaluating, forward

Node = tuple[str, str, list[str], str]


def modules(model: nn.Module, x: Any) -> list[Node]:
    """(name, type, inputs, note) of every module without children, in the order they ran.

    An input is the module that made the tensor; where the tensor was made by plain code in between (a
    sum, a reshape), it is the module that ran last. ``model`` is best a copy: its forward pass runs.
    """
    nodes: list[Node] = [("input", "Input", [], _shape(x))]
    made: dict[int, str] = {id(t): "input" for t in _tensors(x)}
    kept: list[Any] = [x]  # an id is only a name while the tensor lives
    times: dict[str, int] = {}

    def ran(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        times[name] = times.get(name, 0) + 1
        kind = type(module).__name__
        label = f"{name}_{kind}" + (f"_{times[name]}" if times[name] > 1 else "")
        inputs = [made.get(id(t), nodes[-1][0]) for t in _tensors(given)] or [nodes[-1][0]]
        size = sum(p.numel() for p in module.parameters())
        note = f"{module.extra_repr()}; {size:,} parameters; output {_shape(output)}"
        nodes.append((label, kind, list(dict.fromkeys(inputs)), note))
        kept.append(output)
        made.update((id(t), label) for t in _tensors(output))

    leaves = {
        n.replace(".", "/") or "model": m for n, m in model.named_modules() if not any(m.children())
    }
    hooks = [
        m.register_forward_hook(lambda m, given, out, n=n: ran(n, m, given, out))
        for n, m in leaves.items()
    ]
    try:
        with evaluating(model), torch.no_grad(), seeds.seeded(0):
            output = forward(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    last = dict.fromkeys(made.get(id(t), nodes[-1][0]) for t in _tensors(output))
    return [*nodes, ("output", "Output", list(last), _shape(output))]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _shape(value: Any) -> str:
    return " ".join("x".join(map(str, t.shape)) for t in _tensors(value))
