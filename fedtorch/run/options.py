"""Options of a run, whoever holds the data: ``train.py`` and a server of sites both have these."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fedtorch.aggregation.mean import Aggregator, Mean
from fedtorch.channel.base import Stage
from fedtorch.data.tokens import PREFIX
from fedtorch.options import COUNT, TrainingOptions, check
from fedtorch.privacy import DEFAULT, Nothing, Privacy
from fedtorch.recipe import Recipe
from fedtorch.rounds.observers import Observer
from fedtorch.rounds.participation import Everyone, Participation
from fedtorch.rounds.schedules import Constant, Schedule
from fedtorch.run import steps
from fedtorch.run.callbacks import BestModel, EarlyStopping
from fedtorch.run.huggingface import LoRA
from fedtorch.strategies import FedAvg, Strategy
from fedtorch.training.losses import Loss, no_loss
from fedtorch.training.optimizer import ClientOptimizer
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunOptions(TrainingOptions):
    """The model, how it is trained over how many rounds, and whose data it hides."""

    model: str = "small"
    """A file of models/, path/file.py:Name, package.module:Name, or hf:FOLDER or hf:NAME of Hugging Face;
    options as --model.hidden 64."""
    model_args: dict[str, Any] = field(default_factory=dict)
    lora: LoRA | None = None
    """Adapters in place of the whole of a model hf:FOLDER: --lora.rank 8."""
    loss: str = "auto"
    """cross_entropy, bce, mse, or package.module:function (output, target) -> Tensor."""
    step: str = ""
    """package.module:function (model, batch) -> losses [B], or one number: in place of a loss, for batches
    of any kind."""
    eval_step: str = ""
    """package.module:function (model, batch) that judges a batch: it returns (output, target) for the
    metrics, or figures by name."""
    strategy: Strategy = FedAvg()
    """The algorithm: fedavg, fedprox, scaffold, ... (fedtorch strategies lists them) or your own;
    --strategy.server sgd, adam, yogi, adagrad, lamb."""
    aggregator: Aggregator = Mean()
    """How clients' updates become one: mean, median, krum, secure, ... (fedtorch aggregators lists them) or
    your own."""
    channel: tuple[Stage, ...] = ()
    """How an update is made smaller before it is sent: topk, randk, qsgd, sign, powersgd or your own, as
    topk:0.01 too, or several in order, as topk:0.01,qsgd; none: it is sent whole."""
    participation: Participation = Everyone()
    """Who takes part in a round: everyone, uniform, poisson."""
    privacy: Privacy | None = DEFAULT
    """Whose data the model hides: sample (each example), client (each client), distributed (from the server
    too, with aggregator secure), local (each by itself) or none; --privacy.epsilon 8 for the whole run, or
    --privacy.noise-multiplier 1.1."""
    rounds: int = 30
    """Rounds to train in all."""
    optimizer: str = "sgd"
    """Client optimizer, any of torch.optim, or package.module:name of a class or of a function (model, lr)
    -> optimizer; options as --optimizer.momentum 0.9."""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = Constant()
    """Learning rate over rounds: constant, exponential, step, cosine."""
    stop_after: int | None = None
    """End the run when the monitored figure has not got better for so many rounds; none: train all."""
    monitor: str = "test_loss"
    """What stop_after and keep look at: a figure of a round, under a privacy plan one of test data."""
    keep: Literal["last", "best"] = "last"
    """Which model is written in the end: of the last round, or of that with the best monitored figure."""
    seed: int = 0
    """Decides every draw: split, partition, initial weights, cohorts, batches."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint."""

    def __post_init__(self) -> None:
        """Refuse what no run can do."""
        super().__post_init__()
        check(self, "", rounds=COUNT, stop_after=COUNT)
        if self.monitor != "test_loss" and not self.callbacks():
            raise ConfigError(
                "monitor is for --stop-after 5 or --keep best: add one, or leave it out"
            )
        for option in ("step", "eval_step"):
            if name := getattr(self, option):
                steps.check(option, name)
        if self.step and self.loss != "auto":
            raise ConfigError("step returns the losses itself: leave out loss, or step")
        if self.lora and not self.model.startswith(PREFIX):
            raise ConfigError(
                f"lora is for models of Hugging Face, and not for {self.model!r}: leave it out, or give "
                "--model hf:FOLDER"
            )

    def callbacks(self) -> list[Observer]:
        """Who stops early, and who keeps the best model, where that is asked for."""
        stop = [EarlyStopping(self.monitor, self.stop_after)] if self.stop_after else []
        return [*stop, *([BestModel(self.monitor)] if self.keep == "best" else [])]

    @property
    def plan(self) -> Privacy:
        """The privacy plan of so many rounds as this run has."""
        return (self.privacy or Nothing()).planned_for(self.rounds)

    def recipe(self, loss: Loss) -> Recipe:
        """What every client does."""
        return Recipe(
            self.lora.strategy(self.strategy) if self.lora else self.strategy,
            loss=no_loss if self.step else loss,
            step=steps.function_named("step", self.step) if self.step else None,
            optimizer=ClientOptimizer(self.optimizer, self.optimizer_args),
            privacy=self.plan,
            aggregator=self.aggregator,
            channel=self.channel,
            **self.training(),
        )
