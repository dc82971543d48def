"""Clipped and noised gradients for one local step: the heart of DP-SGD.

Three ways to the same sum of clipped per-example gradients: ``stacked`` (torch.func, K clients at once),
Opacus ``hooks`` (per-example gradients of one client) and ``ghost`` (the same, but linear layers and
embeddings give norms and sum without them). A fourth, ``alone``, is what the others are held to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedtorch.privacy.ghost import Ghosts
from fedtorch.privacy.noise.keystream import Scratch
from fedtorch.privacy.noise.streams import Stream
from fedtorch.training.dropout import Drawing, Replaying
from fedtorch.training.step import Step, Stepping
from fedtorch.tree import exact_sq_norms, filled, leaves, rows, size, split, tmap
from fedtorch.types import Params, Stack

ROOM = 1 << 28
"""Numbers that the gradients ``ghost`` has to write out may have at once."""


@dataclass(frozen=True)
class PrivateSteps:
    """What a solver needs for private local steps of K clients.

    A solver sums each client's per-example gradients, each scaled by ``factors``, and hands the sum to
    ``finish``. An empty batch is a step like any other: its sum is zero.
    """

    clip: float
    """Clipping norm of one example's gradient."""
    noise: float
    """Noise multiplier: the noise on the sum has standard deviation noise x clip."""
    divisor: float
    """Public batch size."""
    streams: Sequence[Stream]
    """Noise, one stream for each client of the stack."""
    mode: str = "auto"
    max_batch: int = 512
    scratch: Scratch = field(default_factory=Scratch)
    drawing: Drawing = field(default_factory=lambda: Drawing(()))
    """Masks of dropout, where the clients train together."""

    def factors(self, sq_norms: Tensor) -> Tensor:
        """Squared norms -> min(1, clip / norm); an example that is not finite counts as nothing.

        The norms must be float64's: where squares vanish in float32 a gradient would pass unclipped.
        """
        scale = (self.clip * sq_norms.double().rsqrt()).clamp(max=1)
        return torch.where(sq_norms.isfinite(), scale, 0).to(sq_norms.dtype)

    def noisy(self, row: Tensor, k: int, times: float = 1.0) -> None:
        """Add client k's noise, ``times`` as large, to its sum of gradients, [numbers], in place."""
        self.streams[k].add(row, times * self.noise * self.clip, self.scratch)

    def finish(self, sums: Stack) -> Stack:
        """(sum + N(0, (noise clip)^2)) / divisor, [K, ...]; sensitivity of the sum: clip (add/remove).

        All parameters of a client are one draw: many small ones would each cost a call.
        """
        flat = torch.cat([v.reshape(len(v), -1) for v in sums.values()], 1)
        for k, row in enumerate(flat):
            self.noisy(row, k)
        flat.div_(self.divisor)
        return split(flat, {k: v.shape[1:] for k, v in sums.items()})


def rounded(factors: Tensor, like: Tensor) -> Tensor:
    """Factors in a gradient's type; one that loses digits there would scale to no norm at all: 0."""
    there = factors.to(like)
    return torch.where(there < torch.finfo(like.dtype).tiny, 0, there)


def stacked_gradients(
    stepping: Stepping,
    params: Stack,
    rest: Stack,
    batch: Any,
    mask: Tensor,
    steps: PrivateSteps,
) -> tuple[Stack, Tensor]:
    """K clients' private gradients [K, ...] and per-example losses [K, B] from a batch [K, B, ...].

    Of it the examples in ``mask`` [K, B] count.
    """

    def one(params: Params, rest: Params, example: list[Tensor], k: Tensor, b: Tensor) -> Tensor:
        with steps.drawing.at(k, b):
            return stepping.losses(params, rest, filled(batch, [t[None] for t in example]))[0]

    fixed = {k: v.detach() for k, v in params.items()}
    total, losses = tmap(torch.zeros_like, fixed), []
    pieces = (t.split(steps.max_batch, 1) for t in (mask, *leaves(batch)))
    for real, *tensors in zip(*pieces, strict=True):
        kind = steps.drawing.begin(real)
        per_example = vmap(
            vmap(grad_and_value(one), (None, None, 0, None, 0), randomness=kind),
            (0, 0, 0, 0, None),
            randomness=kind,
        )
        grads, values = per_example(
            fixed, rest, tensors, *(torch.arange(n, device=mask.device) for n in real.shape)
        )
        sq = _joint_sq_norms(g.flatten(0, 1) for g in grads.values()).view(real.shape)
        weight = torch.where(real, rounded(steps.factors(sq), values), 0)
        for k, g in grads.items():
            total[k] += torch.einsum("kb,kb...->k...", weight, _only(weight > 0, g, sq))
        losses.append(values)
    return steps.finish(total), torch.cat(losses, 1)


def _joint_sq_norms(grads: Iterable[Tensor]) -> Tensor:
    # of [n, ...] together, [n]
    return torch.stack([exact_sq_norms(g) for g in grads]).sum(0)


def _only(used: Tensor, grads: Tensor, sq_norms: Tensor) -> Tensor:
    # 0 x NaN is NaN, so what counts as nothing has to be nothing; rare, hence not always done
    if bool(sq_norms.isfinite().all()):
        return grads
    return torch.where(used.reshape(*used.shape, *[1] * (grads.dim() - used.dim())), grads, 0)


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
            sq = _joint_sq_norms(g[None] for g in grads.values())
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
        total = {k: torch.zeros_like(p) for k, p in params.items()}
        apart = {id(p) for m in self.ghosts.layers for p in m.parameters(recurse=False)}
        written = {k: p for k, p in params.items() if id(p) not in apart}
        most = self.steps.max_batch
        if apart and (numbers := sum(p.numel() for p in written.values())):
            most = max(1, min(most, ROOM // numbers))
        losses = [
            self._part(rows(batch, part), params, written, total)
            for part in torch.arange(size(batch)).split(most)
            if len(part)
        ]
        done = self.steps.finish({k: v[None] for k, v in total.items()})
        for k, p in params.items():
            p.grad = done[k][0]
        return torch.cat(losses).mean() if losses else torch.zeros(())

    def _part(self, batch: Any, params: Params, written: Params, total: Params) -> Tensor:
        self.ghosts.forget()
        self.many = size(batch)
        # Opacus keeps the size of the first batch of a layer called twice
        for module in self.model.modules():
            vars(module).pop("max_batch_len", None)
        values = self.losses(self.model, batch)
        values.sum().backward()
        grads: Params = {k: getattr(p, "grad_sample") for k, p in written.items()}  # noqa: B009
        sq = torch.stack([*map(exact_sq_norms, grads.values()), *self.ghosts.sq_norms()]).sum(0)
        weight = rounded(self.steps.factors(sq), values)
        for k, g in grads.items():
            total[k] += torch.tensordot(weight, _only(weight > 0, g, sq), 1)
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
    for module in model.modules():
        for key, hook in [*module._backward_hooks.items()]:
            if getattr(getattr(hook, "func", None), "__self__", None) is opacus:
                del module._backward_hooks[key]
                if module not in others:
                    handles.append(module.register_forward_hook(_on_output(hook)))
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


def _on_output(hook: Callable[..., Any]) -> Callable[[nn.Module, Any, Any], None]:
    def listen(module: Any, args: Any, output: Any) -> None:
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        # Opacus unfolds the inputs of convolutions as if they lay channels first whatever their strides
        # say: of images channels last it takes other pixels, and clips by the norm of another gradient
        if seen := getattr(module, "activations", None):
            module.activations = [[a.contiguous() for a in inputs] for inputs in seen]
        if first.requires_grad:
            kept = _counted(module, args)
            first.register_hook(
                lambda grad: hook(module, None, (grad if kept is None else grad * kept,))
            )

    return listen
