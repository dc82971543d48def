"""The recipe: how every client trains, and how their work is combined."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedtorch.aggregation.mean import Aggregator, Mean
from fedtorch.channel.base import Stage
from fedtorch.options import TrainingOptions, brief, fit
from fedtorch.privacy import Nothing, Privacy
from fedtorch.strategies import FedAvg, Strategy
from fedtorch.training.losses import Loss, cross_entropy, no_loss
from fedtorch.training.optimizer import ClientOptimizer, Maker
from fedtorch.training.own_update import OwnUpdate
from fedtorch.training.step import Step, Supervised, asked
from fedtorch.tree import mapped
from fedtorch.types import ConfigError

if TYPE_CHECKING:
    from fedtorch.secure.aggregator import Secure


@dataclass(frozen=True)
class Recipe(TrainingOptions):
    """How every client trains in a visit, and how their work is combined."""

    __repr__ = brief

    strategy: Strategy = FedAvg()
    _: KW_ONLY
    loss: Loss = no_loss
    """``loss(output, target)``, of batches (x, y); left out it is cross entropy, or there is a step."""
    step: Step | None = None
    """``step(model, batch)`` -> losses [B], or one number: in place of a loss, for batches of any kind."""
    local: OwnUpdate | None = None
    """``fn(model, batches, lr)`` that trains the model in place, and returns the visit's loss or None: in
    place of loss, optimizer and local steps."""
    optimizer: ClientOptimizer | str | type[Optimizer] | Maker = field(
        default_factory=ClientOptimizer
    )
    """A name or class of torch.optim, or ``fn(model, lr)``; fresh in every visit (ClientOptimizer)."""
    scheduler: Callable[[Optimizer, int], LRScheduler] | type[LRScheduler] | None = None
    """``fn(optimizer, steps)``: a scheduler of torch, stepped after each of a visit's so many local steps;
    in place of lr_warmup and lr_decay."""
    privacy: Privacy = Nothing()
    """SampleLevel, ClientLevel, DistributedDP or LocalDP; Nothing() or None: nothing is noised."""
    aggregator: Aggregator = Mean()
    """How what clients send becomes one: Mean, Median or a rule of your own."""
    channel: tuple[Stage, ...] = ()
    """What is done to an update after the privacy plan and before it is sent: (TopK(share=0.1),). A further
    stage encodes the numbers of the code before it."""

    def __post_init__(self) -> None:
        """Refuse what cannot train, by name."""
        object.__setattr__(self, "privacy", self.privacy or Nothing())
        self.client_optimizer.check()
        super().__post_init__()
        if self.loss is not no_loss and self.step is not None:
            raise ConfigError(
                "a recipe has a loss or a step, which returns the losses itself: leave out one"
            )
        if self.local is not None:
            self._only_local()
        elif self.loss is no_loss and self.step is None:
            object.__setattr__(self, "loss", cross_entropy)
        for stage in self.channel:
            fit("each stage of channel", stage, Stage)

    def _only_local(self) -> None:
        plain = TrainingOptions()
        names = ("clip_norm", "accumulate", "lr_warmup", "lr_decay", "lr_floor")
        given = [k for k in names if getattr(self, k) != getattr(plain, k)]
        given += [k for k in ("step", "scheduler") if getattr(self, k) is not None]
        given += ["loss"] * (self.loss is not no_loss)
        given += ["optimizer"] * (self.client_optimizer != ClientOptimizer())
        if given:
            raise ConfigError(
                f"local takes a visit's steps itself, so {', '.join(given)} would do nothing: leave out "
                "one or the other"
            )

    @property
    def client_optimizer(self) -> ClientOptimizer:
        """What steps the clients' weights."""
        return ClientOptimizer.of(self.optimizer)

    @property
    def asked(self) -> Step:
        """What is asked for the losses of a batch: the step, or that of the loss."""
        return Supervised(self.loss) if self.step is None else self.step

    @property
    def judge(self) -> Loss:
        """The loss, to judge a model by; raises ConfigError where it is not known."""
        if self.step is None and self.local is None:
            return self.loss
        raise ConfigError(
            "what to judge by is not known where clients train by a step of their own: give metrics, or "
            "step=fn, which returns output and target, or figures by name"
        )

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Of each example of a batch, [B], or one number for the whole of it.

        The batch stays as it is: a model may write on it, a step take parts out or ask for its gradient.
        """
        batch = mapped(lambda t: t.detach().clone(), batch)
        return asked(self.asked, model, batch)

    def tried(self, model: nn.Module, batch: Any) -> Tensor:
        """The same where nothing is trained; a step may take gradients of its own all the same."""
        with torch.set_grad_enabled(self.step is not None):
            return self.losses(model, batch).detach()

    @property
    def learning_rate(self) -> float:
        """The learning rate, or the default that fits the kind of step."""
        return self.privacy.default_lr if self.lr is None else self.lr

    @property
    def weighting(self) -> str:
        """How clients are weighed: auto is by examples, and alike under privacy and rules of rows."""
        chosen = self.strategy.weighting
        if chosen != "auto":
            return chosen
        alike = self.hides and not (self.secure and self.secure.weight_cap)
        return "uniform" if alike or not self.aggregator.linear else self.privacy.weighting

    @property
    def secure(self) -> "Secure | None":
        """The aggregator, where masks hide each client's update from the server."""
        if not self.hides:
            return None
        from fedtorch.secure.aggregator import Secure  # sums under masks are few runs'

        return self.aggregator if isinstance(self.aggregator, Secure) else None

    @property
    def hides(self) -> bool:
        """Whether the aggregator shows the server no client's own update."""
        return getattr(self.aggregator, "hides", False)

    @property
    def needs_rows(self) -> bool:
        """Whether each client's own upload is needed, and not only the mean of what they learned."""
        sums = self.strategy.only_delta and self.privacy.scales and self.aggregator.linear
        adds = all(stage.linear and not stage.feedback for stage in self.channel)
        if self.secure.apart if self.secure else self.hides:
            return True
        # whoever remembers what was sent must see it once a plan or a channel has changed it; and a plan
        # clips all that a client sends together
        beside = self.strategy.confirms or self.strategy.follows
        sees = beside and bool(self.privacy.claims or self.channel)
        # what a channel has decoded client-level privacy clips once more, client by client
        return not (sums and adds) or sees or bool(self.channel and self.privacy.central)

    def weights(self, examples: Tensor) -> Tensor:
        """Aggregation weights of clients with so many examples, [K]."""
        if self.weighting != "examples":
            return torch.ones_like(examples)
        cap = None if self.secure is None else self.secure.weight_cap
        return examples if cap is None else examples.clamp(max=cap)
