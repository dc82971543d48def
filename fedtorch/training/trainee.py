"""One module on which client after client trains, set up once for all of them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.recipe import Recipe
from fedtorch.training.batches import batches, in_parts
from fedtorch.training.correction import Corrector
from fedtorch.training.local_steps import stepper
from fedtorch.training.module import forget, to, training
from fedtorch.training.outline import Outline
from fedtorch.training.own_update import VisitBatches, own_update
from fedtorch.training.step import backward
from fedtorch.tree import expand
from fedtorch.types import Context, Params, Task

if TYPE_CHECKING:
    from fedtorch.privacy.layer_gradients import LayerGradients
    from fedtorch.privacy.one_client import Gradients


class Trainee:
    """A module and the global weights every visit starts from: any model, loss and torch optimizer.

    Names, parameters and start are looked up once; a visit then costs little beside its steps.
    """

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe) -> None:
        training(model)
        self.model, self.recipe, self.lr = model, recipe, task.lr
        self._asked = recipe.asked
        self.params = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.params.values())).device
        self._parameters: list[Tensor] = [*model.parameters()]
        self._start = [task.state[k] for k, _ in model.named_parameters()]
        self._buffers = {k: task.state[k] for k, _ in model.named_buffers()}
        self._outline = Outline(model, own=True)

    def visit(
        self, data: Dataset, steps: Tensor, ctx: Context, private: PrivateSteps | None = None
    ) -> Tensor:
        """Train one client from the global weights; returns its mean loss, on the CPU.

        What it learned is in the module. With ``private`` each step takes its gradient clipped by
        example and noised.
        """
        self.put_back()
        self._load()
        if not self.model.training:  # train() walks through all submodules
            training(self.model)
        if self.recipe.local is not None:
            visit = VisitBatches(data, steps, self.device)
            return own_update(self.recipe.local, self.model, visit, self.lr)
        self._asked = self.recipe.strategy.objective(self.recipe.asked, ctx)
        correct = Corrector(self.recipe.strategy, ctx)
        corrects = bool(correct)
        weights = expand(self.weights()) if corrects else {}
        step = stepper(self.recipe, self.model, self.params, self.lr, len(steps))
        trained, clip_norm = [*self.params.values()], self.recipe.clip_norm
        losses = []
        with self._noised(private) as gradients:
            learn: Callable[[Any], Tensor] = self._learn
            if gradients is not None:
                learn = partial(self._privately, gradients)
            taken = batches(data, steps, apart=private is not None and private.mode == "alone")
            if self.recipe.accumulate > 1:
                learn, taken = self._by_parts, in_parts(data, steps, self.recipe.batch_size or 1)
            for batch in taken:
                forget(self.params)
                loss = learn(batch)
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(trained, clip_norm)
                if corrects:
                    correct(self.params, weights)
                step()
                losses.append(loss)
        forget(self.params)  # a gradient left behind would be seen by the next client
        return torch.stack(losses).cpu().double().mean()

    def _noised(self, private: PrivateSteps | None) -> "AbstractContextManager[Gradients | None]":
        """What clips and noises the gradients of a private visit."""
        if private is None:
            return nullcontext()
        if private.mode == "layers":
            return self._layers.listening(private)
        from fedtorch.privacy.one_client import private_gradients  # few visits are private

        return private_gradients(self.model, self.recipe.losses, private)

    @cached_property
    def _layers(self) -> "LayerGradients":
        from fedtorch.privacy.layer_gradients import LayerGradients

        return LayerGradients(self.model, self.recipe.losses)

    def _learn(self, batch: Any, share: float = 1.0) -> Tensor:
        """Add the gradient of a batch that is a ``share`` of a step's; returns that of its loss."""
        return backward(self._asked, self.model, to(batch, self.device), share)

    def _by_parts(self, parts: Iterable[tuple[Any, float]]) -> Tensor:
        return torch.stack([self._learn(batch, share) for batch, share in parts]).sum()

    def _privately(self, gradients: "Gradients", batch: Any) -> Tensor:
        return gradients.backward(to(batch, self.device))

    def weights(self) -> Params:
        """The trainable weights, the module's own: whoever wants to keep them copies them."""
        return {k: p.detach() for k, p in self.params.items()}

    def floats(self) -> Params:
        """The float buffers, the module's own; one that a forward made larger is left as it was."""
        if not self._buffers:  # the walk through all submodules is spared where there are none
            return {}
        old, now = self._buffers, dict(self.model.named_buffers())
        floats = {k: now.get(k, v) for k, v in old.items() if v.is_floating_point()}
        return {k: b if b.shape == old[k].shape else old[k] for k, b in floats.items()}

    def put_back(self) -> None:
        """Nothing goes from client to client that the model keeps beside weights and buffers."""
        self._outline.restore()

    def _load(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._start)
            # looked up anew: a forward may put another tensor in a buffer's place
            if self._buffers:
                for k, b in self.model.named_buffers():
                    b.copy_(self._buffers[k])
