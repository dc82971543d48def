"""Train a model over many clients: ``python train.py --help``.

The whole run is in ``run`` below: data, clients, model, server, and one loop over rounds.
"""

import fedtorch  # noqa: F401  (first: Ctrl-C while torch is read is one line there)

# isort: split
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from fedtorch import disk, seeds
from fedtorch.checks import secure
from fedtorch.checks.outputs import classes_fit
from fedtorch.client import Client
from fedtorch.data import Data, Digits, Partition, partition, prepared
from fedtorch.data.tokens import PREFIX
from fedtorch.engines import Engine, Local, pages
from fedtorch.options import COUNT, NOT_NEGATIVE, SHARE, as_typed, check
from fedtorch.privacy import STATISTICS_NOISE, Privacy
from fedtorch.privacy.run import BudgetSpent
from fedtorch.rounds.observers import Observer
from fedtorch.rounds.progress import amount
from fedtorch.rounds.synchronous import Rounds, Synchronous
from fedtorch.rounds.threat import Threat
from fedtorch.run import (
    audited,
    cli,
    help,
    huggingface,
    loop,
    objects,
    search,
    setup,
    steps,
    sweep,
    zoo,
)
from fedtorch.run import folder as folders
from fedtorch.run.console import Remarks, StopSignal, page, partition_table
from fedtorch.run.interrupts import begun
from fedtorch.run.messages import (
    conclude,
    introduce,
    starting_score,
    strict,
    write_results,
)
from fedtorch.run.options import RunOptions
from fedtorch.run.shown import Shown
from fedtorch.server import Server
from fedtorch.tracking import TensorBoard, Tracking
from fedtorch.tracking.tensorboard.pictures import Pictures
from fedtorch.training.evaluate import Judge
from fedtorch.training.losses import Loss
from fedtorch.types import ClaimRefuted, ClientError, ConfigError, NothingLearned


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Every option of a run. ``--config run.toml`` sets them, flags override."""

    dataset: Any = Digits()
    """Data: digits, idx (or mnist), folder (of pictures), text, labelled-text, csv, npz, hf, custom; with
    --dataset.path FOLDER or FILE."""
    partition: Partition | None = None
    """How examples become clients: iid, dirichlet, shards, quantity, natural; none given: by owner
    where the data names owners, else Dirichlet over labels, else iid."""
    clients: int | None = None
    """Number of clients; none: 10, or every owner with a natural partition."""
    validation: float = 0.0
    """Share of each client's examples held out of training to validate the global model on."""
    evaluate: Literal["shared", "personal"] = "shared"
    """What is judged: the shared model on test data; personal: each client's own model too, on a fifth of
    its own examples (or the share that validation says)."""
    finetune_steps: int = 0
    """In the end each client takes so many local steps from the model on its own examples, and is judged
    once more on its validation share: what a personal model has to be better than."""
    metrics: list[str] = field(default_factory=lambda: ["auto"])
    """accuracy, binary_accuracy, mae, r2, perplexity; auroc, average_precision, f1, f1_macro, f1_micro,
    balanced_accuracy, mean_iou, top5 (extra metrics); or package.module:function."""
    audit: audited.Audit | None = None
    """Test the privacy claim in the run itself, by canaries: epsilon at least, and whether noise, rate and
    clip are as claimed. A refuted claim is exit status 1."""
    pace: Rounds = Synchronous()
    """When the server steps: synchronous (after the whole cohort), over-selected (after the first of it),
    buffered (FedBuff) or asynchronous (FedAsync), on a simulated clock."""
    threat: Threat | None = None
    """Who lies, in a simulation: sign-flip, gauss, label-flip, alie, ipm, min-max, min-sum, mimic,
    backdoor."""
    engine: Engine = Local()
    """Where clients train: local, processes or ray (--engine.workers N); --engine.device cuda.
    flower: fedtorch serve."""
    threads: int = 1
    """Threads inside one operation; more than 1 often slows small models."""
    tracking: Tracking | None = TensorBoard()
    """Where the run is recorded beside metrics.jsonl: tensorboard, mlflow, wandb, none."""
    eval_every: int = 1
    """Rounds between two evaluations on the test set."""
    checkpoint_every: int | Literal["auto"] = "auto"
    """Rounds between two checkpoints; auto: each round, of a large model (8 MB) every 30 seconds, written
    beside the training; under a privacy plan each round, and the next one waits for it."""
    run_dir: str | None = None
    """Folder of the run; none: runs/<dataset>-<model>-<strategy>-<time>."""

    def __post_init__(self) -> None:
        """Refuse what no run can do."""
        super().__post_init__()
        counts = ("eval_every", "checkpoint_every", "threads", "clients")
        ranges = {"validation": SHARE, "finetune_steps": NOT_NEGATIVE}
        check(self, "", **ranges, **dict.fromkeys(counts, COUNT))
        if self.evaluate == "personal" and not self.validation:
            object.__setattr__(self, "validation", 0.2)
        if self.finetune_steps and not self.validation:
            raise ConfigError(
                "finetune_steps judges each client on its validation share, and there is none: add "
                "--evaluate personal, or --validation 0.2"
            )
        if self.finetune_steps and self.stop_after:
            raise ConfigError(
                "finetune_steps starts in the last round, which stop_after knows only when it is over: "
                "leave out one"
            )
        words, usual = (getattr(d, "vocabulary", None) for d in (self.dataset, type(self.dataset)))
        secure.single(self.aggregator, self.validation, getattr(self.tracking, "client_runs", 0))
        if self.model.startswith(PREFIX) and words is not None and words == usual:
            # none is named: the model's own tokens
            object.__setattr__(self, "dataset", replace(self.dataset, vocabulary=self.model))
        if self.resume and not self.run_dir:
            raise ConfigError("--resume needs --run-dir, the folder of the run to continue")
        plan = self.privacy
        if plan and plan.noise_multiplier and plan.rounds and plan.rounds < self.rounds:
            raise ConfigError(
                f"privacy.rounds {plan.rounds} is less than rounds {self.rounds}, and with a noise "
                "multiplier nothing stops the run at the epsilon planned: leave privacy.rounds out, or "
                "give privacy.epsilon"
            )
        if plan and plan.strict and not isinstance(self.tracking, TensorBoard | None):
            raise ConfigError(
                f"tracking {type(self.tracking).__name__} sends times and figures of its own, which "
                "privacy.strict keeps back: use tensorboard or none"
            )
        if plan and getattr(self.dataset, "standardize", False) is True:
            raise ConfigError(
                "dataset.standardize voids the privacy claim: every example moves the mean and deviation "
                "all are scaled by, and nobody noises them; give public numbers, --dataset.bounds "
                "age=20:90, or with rough bounds --dataset.standardize private"
            )

    @property
    def plan(self) -> Privacy:
        """The privacy plan, which pays for statistics of columns where the data are scaled by them."""
        plan = super().plan
        asked = getattr(self.dataset, "standardize", False) == "private"
        noise = plan.statistics_noise or (STATISTICS_NOISE if asked and plan.claims else None)
        return replace(plan, statistics_noise=noise) if noise != plan.statistics_noise else plan


FREE_ON_RESUME = {
    "rounds",
    "resume",
    "run_dir",
    "checkpoint_every",
    "eval_every",
    "threads",
    "tracking",
    "engine",
}
"""Options a resumed run may change; any other would make it a different run. Engines draw the same."""


def train(config: Config) -> dict[str, Any]:
    """One run from data to trained model; returns the summary. Its folder is locked to the end."""
    with ExitStack() as held, Remarks():
        try:
            return run(config, held)
        except ClientError as e:
            if config.privacy and config.privacy.strict:  # its words may quote somebody's data
                who = ": ".join(str(e).split(": ")[:2])
                raise ClientError(f"{who} (privacy.strict keeps back the rest)") from None
            raise


class Assembled(NamedTuple):
    """What a run begins with."""

    data: Data
    ids: list[str]
    parts: list[torch.Tensor]
    """Places of each client's examples among the training data."""
    clients: Sequence[Client]
    server: Server
    metrics: Mapping[str, Loss]
    judge: Judge | None
    callbacks: Sequence[Observer]
    notes: Sequence[str]


def assembled(config: Config) -> Assembled:
    """From data to server; raises ConfigError for what no run can be, and writes nothing."""
    # who has which data
    data = config.dataset.load(config.seed)
    ids, parts = partition(data, config.partition, config.clients, config.seed)
    kept_steps = prepared.paid(Path(config.run_dir or "."), data) if config.resume else None
    data = setup.settled(data, ids, parts, config.plan, kept_steps)
    private = config.privacy is not None
    clients = setup.clients(data, ids, parts, config.validation, config.seed, private)

    # what is trained, by whom, and how
    loss, _ = setup.loss_and_metrics(data.kind, config.loss, config.metrics)
    server = Server(
        make_model(config, data),
        clients,
        config.recipe(loss),
        participation=config.participation,
        pace=config.pace,
        schedule=config.schedule,
        engine=config.engine,
        seed=config.seed,
        threat=config.threat,
    )
    asked = config.eval_step, data.kind, config.metrics, server.model, data.test
    metrics, judge = steps.judging(server.recipe, *asked)
    setup.check(server, data, clients, metrics, judge)
    callbacks = config.callbacks()
    callbacks += [config.audit] if config.audit else []
    watched = [f"test_{name}" for name in metrics or ("loss",)]
    watched += [f"validation_{name}" for name in metrics] if config.validation else []
    notes = loop.begin(callbacks, server, config.rounds, watched)
    return Assembled(data, ids, parts, clients, server, metrics, judge, callbacks, notes)


def tried(config: Config) -> None:
    """Raises ConfigError where the run would be refused: before others of a sweep are paid for."""
    # whose workers need not start for it, and whose audit begins afresh
    audit = config.audit and replace(config.audit)
    engine = config.engine if isinstance(config.engine, Local) else Local()
    with seeds.kept():
        assembled(replace(config, audit=audit, engine=engine)).server.close()


def run(config: Config, held: ExitStack) -> dict[str, Any]:
    """The run; ``held`` keeps the lock on its folder."""
    began = time.perf_counter()
    torch.set_num_threads(config.threads)
    pages.keep()
    if config.tracking:
        config.tracking.ready()

    # who has which data, what is trained, by whom, and how
    data, ids, parts, clients, server, metrics, judge, callbacks, notes = assembled(config)

    # where the run is kept: a new folder, or one to go on in
    kept = loop.open_folder(
        config,
        new_folder(config),
        server,
        held,
        keep=prepared.Prepared.of(data).save,
        check=lambda folder: prepared.resumed(folder, data),
    )

    with closing(server), loop.around(config, server, kept, config.tracking, began) as here:
        # before the first round: what is trained, by whom, and how good it is untrained
        record, report = here.record, here.report
        scores = loop.ScoreKeeper(
            *(here, data.test, metrics, clients, config.eval_every, config.finetune_steps),
            step=judge,
        )
        pictures = Pictures(
            record, server, data, config.rounds, lambda: here.last, lambda: scores.by_client
        )
        opening = f"{data.name}: {amount(len(parts), 'client')}, {config.model}, "
        opening += amount(config.rounds, "round")
        report.say(prepared.said(data, strict(server)))
        if config.privacy and (note := prepared.undeclared(data, config.dataset)):
            report.say(f"note: {note}")
        for note in notes:
            report.say(f"note: {note}")
        introduce(report, opening, server, partition_table(ids, parts, data.labels))
        options = cli.flat(objects.describe(config)) | {"lr": server.recipe.learning_rate}
        pictures.start(options, metrics, ids, parts)
        shown = Shown.of(server, kept.path, config.rounds, data)
        report.attempt("report.json", shown.write)
        starting_score(record, report, scores.last, server)

        # who looks at each round, in this order: the end is seen first, and saving comes last
        saving = loop.Checkpoints(here, config.checkpoint_every)
        here.attend([scores], callbacks, [record, pictures, report, saving])

        # the rounds
        while not here.last:
            server.round()
        here.end(scores)
        judged = server.model, data.test, data.kind if server.recipe.step is None else ""
        report.attempt("report.json", shown.write, *judged)

    # what came of it
    accuracy = next((v for k, v in scores.last.items() if "accuracy" in k), None)
    summary = here.summary(scores.last) | {
        "test_accuracy": accuracy,
        "test_loss": scores.last.get("loss"),
        "clients": len(clients),
        "seed": config.seed,
    }
    write_results(report, kept.path, summary, server)
    if table := scores.side_by_side():
        report.say(table)
    report.attempt(
        "the report",
        conclude,
        report,
        kept.path,
        summary,
        server,
        here.why(),
        here.stop.asked > 0,
        scores.ends(),
    )
    ended(config, server, here.stop)
    if config.audit:
        config.audit.refute()
    return summary


def ended(config: Config, server: Server, stop: StopSignal) -> None:
    """Raise what the run's exit code tells: it was stopped, learned nothing, or the budget was spent."""
    if stop.asked:
        raise SystemExit(128 + stop.asked)
    if server.round_number and not server.moved():
        raise NothingLearned(
            f"no weight has moved in {server.round_number} rounds: the model is as it was at the start; "
            "see above why clients were left out, lower lr or scale the inputs"
        )
    if config.privacy and config.privacy.budget == "error" and not server.within_budget():
        raise BudgetSpent(
            f"the privacy budget is spent after {server.round_number} of {config.rounds} rounds"
        )


def make_model(config: Config, data: Data | prepared.Prepared) -> nn.Module:
    """Build the model with initial weights that depend on the seed alone."""
    with seeds.seeded(seeds.derive(config.seed, "model")):
        if config.model.startswith(PREFIX):
            model = huggingface.build(config.model, data.facts, config.lora)
        else:
            model = zoo.build(config.model, data.facts, config.model_args)
    # another loss, or a step, may take outputs of any shape
    built_in = config.loss in ("auto", "cross_entropy") and not config.step
    if isinstance(data, Data) and data.kind == "classification" and built_in:
        classes_fit(model, data.train, data.labels, data.outputs, data.preparation.target)
    return model


def new_folder(config: Config) -> Path:
    """The one that is named, or one named after the run and the time."""
    if config.run_dir:
        return Path(config.run_dir)
    kind = type(config.dataset).__name__
    name = f"{kind}-{Path(config.model.partition(':')[0]).stem}-{type(config.strategy).__name__}"
    return folders.fresh(name.lower())


def read_config(argv: Sequence[str]) -> Config:
    """Flags over the --config file; with --resume, over the run's own config."""
    flags = cli.from_flags(argv, {f.name: f.type for f in fields(Config)})
    if str(flags.get("resume", "false")).lower() == "true" and "run_dir" in flags:
        config = folders.config(Path(str(flags["run_dir"])).expanduser())
        folders.began_by("train", config)
        return cast(Config, cli.resumed_config(Config, argv, config, FREE_ON_RESUME))
    return cast(Config, cli.parse(Config, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 trained, 2 it cannot be done, 1 anything else.

    It failed, learned nothing, the budget is spent, or an audit has refuted the claim.
    """
    argv = sys.argv[1:] if argv is None else argv
    begun()
    try:
        if (asked := cli.help_asked(argv)) is not None:
            text = help.help_text(Config, "fedtorch train", help.RUN_TOPICS, asked)
            page(text if asked else f"{text}\n{sweep.HELP}")
            return 0
        argv = cli.renamed(argv, Config)
        argv, mean = search.asked(argv)
        rest, points = sweep.settings(argv)
        if mean is not None:
            search.run_search(rest, points, mean, read_config, tried, train)
        elif points:
            sweep.run_sweep(rest, points, read_config, tried, train)
        else:
            train(read_config(argv))
    except ConfigError as e:
        print(f"fedtorch: {as_typed(str(e), argv)}", file=sys.stderr)
        return 2
    except (ClientError, BudgetSpent, ClaimRefuted, NothingLearned) as e:
        print(f"fedtorch: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        print("fedtorch: stopped, nobody reads what it says any more", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"fedtorch: {disk.reason(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first round, when there is nothing to save yet
        print("fedtorch: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    gc.freeze()  # torch's objects stay: not searching them for garbage spares half a second
    sys.exit(main())
