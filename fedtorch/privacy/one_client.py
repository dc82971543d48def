"""Private gradients of one client, whose batches pass through the model itself.

``layers`` takes a model whose layers all have formulas here (``privacy/layer_gradients.py``). Opacus
``hooks`` write out the gradient of each example; ``ghost`` is the same, but linear layers and embeddings
give norms and sum without it. ``alone`` takes example after example; all are held to it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedtorch.privacy.ghost import Ghosts
from fedtorch.privacy.gradients import PrivateSteps, counting, in_parts, rounded
from fedtorch.privacy.layer_gradients import LayerGradients
from fedtorch.training.dropout import Replaying
from fedtorch.training.step import Step
from fedtorch.tree import exact_sq_norms, rows, size
from fedtorch.types import Params


class Gradients(Protocol):
    """One client's private gradients."""

    def backward(self, batch: Any) -> Tensor:
        """Leave the private gradient of a batch in ``p.grad``; returns the mean loss (0 when empty)."""


@contextmanager
def private_gradients(model: nn.Module, losses: Step, steps: PrivateSteps) -> Iterator[Gradients]:
    """For one visit, by a recipe's ``losses``; afterwards the model is as it was, with its plain keys."""
    if steps.mode == "alone":
        yield Alone(model, losses, steps)
        return
    if steps.mode == "layers":
        with LayerGradients(model, losses).listening(steps) as known:
            yield known
        return
    from opacus.grad_sample import GradSampleHooks

    try:
        hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)
    except Exception:  # of a layer that it does not know, after it has begun with others
        for handle in vars(model).pop("autograd_grad_sample_hooks", ()):
            handle.remove()
        raise
    ghosts = Ghosts(model if steps.mode == "ghost" else nn.Sequential())
    moved = _listen(model, hooks, ghosts.layers)
    gradients = OpacusGradients(model, hooks, ghosts, losses, steps)
    moved += [m.register_forward_pre_hook(gradients.alike) for m in model.modules() if _looks_up(m)]
    try:
        yield gradients
    finally:
        ghosts.close()
        for handle in moved:
            handle.remove()
        hooks.cleanup()
        for p in model.parameters():
            for left in ("summed_grad", "grad_sample", "_forward_counter"):
                if hasattr(p, left):
                    delattr(p, left)


@dataclass
class Alone:
    """Example after example, with nothing but autograd: as slow as it is plain."""

    model: nn.Module
    losses: Step
    steps: PrivateSteps

    def backward(self, batch: Any) -> Tensor:
        """The gradient in ``p.grad``, and the mean loss."""
        params = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        total, losses = {k: torch.zeros_like(p) for k, p in params.items()}, []
        masks = Replaying(size(batch))
        for part in torch.arange(size(batch)).view(-1, 1):
            self.model.zero_grad()
            with masks.of(int(part)):
                value = self.losses(self.model, rows(batch, part))
            value.sum().backward()
            # a weight an example does not reach (an expert not chosen) has no gradient
            grads = {k: p.grad for k, p in params.items() if p.grad is not None}
            sq = exact_sq_norms(*(g[None] for g in grads.values()))
            if factor := float(rounded(self.steps.factors(sq), value)):  # 0 x NaN is NaN
                for k, g in grads.items():
                    total[k] += factor * g
            losses.append(value.detach())
        done = self.steps.finish({k: v[None] for k, v in total.items()})
        for k, p in params.items():
            p.grad = done[k][0]
        return torch.cat(losses).mean() if losses else torch.zeros(())


@dataclass
class OpacusGradients:
    """Through Opacus, but for layers whose examples' gradients need not be written out."""

    model: nn.Module
    hooks: Any
    ghosts: Ghosts
    losses: Step
    steps: PrivateSteps
    many: int = 0
    """Examples of the forward that is running."""

    def alike(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """One row looked up for all examples, as positions are in transformers, becomes one for each."""
        index = inputs[0] if inputs else None
        if isinstance(index, Tensor) and index.dim() > 1 and len(index) == 1:
            return index.expand(self.many, *index.shape[1:]), *inputs[1:]
        return None

    def backward(self, batch: Any) -> Tensor:
        """The gradient in ``p.grad``, and the mean loss."""
        params: Params = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        apart = {id(p) for m in self.ghosts.layers for p in m.parameters(recurse=False)}
        written = {k: p for k, p in params.items() if id(p) not in apart}
        numbers = sum(p.numel() for p in written.values()) if apart else 0
        add = partial(self._part, params=params, written=written)
        return in_parts(params, self.steps, batch, numbers, add)

    def _part(self, batch: Any, total: Params, params: Params, written: Params) -> Tensor:
        self.ghosts.forget()
        self.many = size(batch)
        # Opacus keeps the size of the first batch of a layer called twice
        for module in self.model.modules():
            vars(module).pop("max_batch_len", None)
        values = self.losses(self.model, batch)
        values.sum().backward()
        grads: Params = {k: getattr(p, "grad_sample") for k, p in written.items()}  # noqa: B009
        own = [exact_sq_norms(*grads.values())] if grads else []
        sq = torch.stack([*own, *self.ghosts.sq_norms()]).sum(0)
        weight = rounded(self.steps.factors(sq), values)
        for k, g in grads.items():
            total[k] += torch.tensordot(weight, counting(weight > 0, g, sq), 1)
        names = {id(p): k for k, p in params.items()}
        for seen in self.ghosts.seen:
            seen.add(weight, lambda p: total.get(names.get(id(p), "")))
        self.hooks.set_grad_sample_to_none()
        self.model.zero_grad()
        return values.detach()


def _looks_up(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) and layer.weight.requires_grad


def _listen(model: nn.Module, opacus: Any, others: Sequence[nn.Module]) -> list[Any]:
    """Move Opacus's backward hooks from modules to the tensors they put out; returns their handles.

    Of ``others`` it hears nothing.

    They read the gradient of the output alone. torch calls a module's backward hook when the gradient of
    its input is there, and warns where no input needs one; that warning could only be silenced for all
    threads of the process at once, and sites in threads undid each other's silence.
    """
    handles = []
    for name, module in model.named_modules():
        for key, hook in [*module._backward_hooks.items()]:
            if getattr(getattr(hook, "func", None), "__self__", None) is opacus:
                del module._backward_hooks[key]
                if module not in others:
                    # before those of others, which may change what comes of it
                    own = module.register_forward_hook(_on_output(hook, name), prepend=True)
                    handles.append(own)
        for key, hook in [*module._forward_hooks.items()]:
            if module in others and getattr(hook, "__self__", None) is opacus:
                del module._forward_hooks[key]
    return handles


def _counted(layer: Any, inputs: Any) -> Tensor | None:
    """Rows of an embedding's output that reach its weight: all but the padding's; None: all."""
    if not isinstance(layer, nn.Embedding) or layer.padding_idx is None:
        return None
    kept: Tensor = inputs[0] != layer.padding_idx
    return kept[..., None]


def _on_output(hook: Callable[..., Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def listen(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise NotImplementedError(
                f"layer {name or 'model'} ({type(module).__name__}) gives a {type(output).__name__}, and "
                "Opacus takes layers that give one tensor"
            )
        kept = _counted(module, args)

        def back(grad: Tensor) -> None:
            # Opacus unfolds the inputs of convolutions as if they lay channels first whatever their strides
            # say: of images channels last it takes other pixels, and clips by another gradient's norm
            if seen := getattr(module, "activations", None):
                module.activations = [[a.contiguous() for a in inputs] for inputs in seen]
            hook(module, None, (grad if kept is None else grad * kept,))

        if output.requires_grad:
            output.register_hook(back)

    return listen
