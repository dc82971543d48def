"""What stands around the rounds of a run, whoever holds the data: its folder, record, signals and end."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fedtorch.checks import secure
from fedtorch.client import Client
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.observers import Observer, over
from fedtorch.run import by_client, files, huggingface, objects
from fedtorch.run import folder as folders
from fedtorch.run.callbacks import BestModel
from fedtorch.run.console import Report, StopSignal, table_of
from fedtorch.run.finetune import finetuned
from fedtorch.run.folder import Folder
from fedtorch.run.messages import record_privacy, strict
from fedtorch.run.options import RunOptions
from fedtorch.run.resume import go_on, of_clients, same_clients, state
from fedtorch.run.saving import SECONDS, Every, Saver
from fedtorch.server import Server
from fedtorch.tracking import Record, Tracking
from fedtorch.training.evaluate import Judge, evaluate, evaluate_clients
from fedtorch.training.losses import Loss, accuracy

MOST_SHOWN, MOST_TOLD = 10, 200
"""Clients in the table of scores in a tracker's text; ``metrics.jsonl`` has all."""


@dataclass(eq=False)
class Loop(Observer):
    """A run's screen, record and signals while it trains; ``around`` makes one."""

    options: RunOptions
    server: Server
    kept: Folder
    report: Report
    record: Record
    stop: StopSignal
    began: float = field(default_factory=time.perf_counter)
    last: bool = False
    """Whether no round will follow."""
    callbacks: Sequence[Observer] = ()
    """Who may stop it early, and who keeps the best model."""
    saver: Saver | None = None
    """Who writes checkpoints."""

    def round(self, figures: Metrics) -> None:
        """Read once a round: what is asked for later is heeded a round later, and nothing is half saved."""
        self.last = self.over()

    def over(self) -> bool:
        """All rounds are trained, somebody asked to stop, or the privacy budget has no room for more."""
        asked = self.stop.asked > 0 or bool(self.server.stopped)
        return asked or over(self.server, self.options.rounds)

    def why(self) -> str:
        """Why no round follows, in words."""
        done, rounds = self.server.round_number, self.options.rounds
        kept = self.chosen()
        if self.stop.asked:
            return f"{signal.Signals(self.stop.asked).name} asked it to stop{kept}"
        if self.server.stopped:
            return self.server.stopped.partition(": ")[2] + kept
        if done > rounds:
            return f"it had come to round {done} before, and {rounds} were asked for{kept}"
        if done == rounds:
            whole = f"all {rounds} rounds are trained" if rounds > 1 else "its one round is trained"
            return whole + kept
        return f"the privacy budget has no room for round {done + 1} of {rounds}{kept}"

    def chosen(self) -> str:
        """Of which round the model is, where the best is kept."""
        best = next((c for c in self.callbacks if isinstance(c, BestModel)), None)
        return (
            f"; the model is that of round {best.round_number}" if best and best.best.round else ""
        )

    def due(self, every: int) -> bool:
        """Whether something comes that is done ``every`` so many rounds, and in the last."""
        return self.last or self.server.round_number % every == 0

    def attend(
        self, scores: Sequence[Observer], callbacks: Sequence[Observer], others: Sequence[Observer]
    ) -> None:
        """Let all look at each round: who may stop it come before those who tell and save."""
        self.callbacks = callbacks
        ending = [*callbacks, Ending(self)] if callbacks else []
        self.server.observers += [self, *scores, *ending, *others]
        self.server.remembered.hand(callbacks)
        self.last = self.over()

    def end(self, scores: "ScoreKeeper", command: str = "train") -> None:
        """Write the model, the best where it is kept, then tell trackers what privacy cost.

        ``command`` goes on with such a run.
        """
        for callback in self.callbacks:
            callback.finish(self.server)
        if self.options.keep == "best":
            scores.again()
        # all that comes later can fail
        files.write_model(self.kept.path, self.server.model, command)
        made = self.kept.path, self.server.model, self.server.recipe.strategy
        self.report.attempt("model of Hugging Face", huggingface.keep, *made)
        if self.server.private:
            self.report.attempt("privacy report", record_privacy, self.record, self.server)

    def summary(self, scores: Mapping[str, float], why: str = "") -> dict[str, Any]:
        """What ``summary.json`` says of every run; ``why`` it ended, where others know that better."""
        private = self.server.private
        return {f"test_{k}": v for k, v in scores.items()} | {
            "rounds": self.server.round_number,
            "ended": why or self.why(),
            "seconds": round(time.perf_counter() - self.began, 3),
            "epsilon": private.spent() if private else None,
            "delta": private.delta if private else None,
        }


def begin(
    callbacks: Sequence[Observer], server: Server, rounds: int, figures: Sequence[str]
) -> list[str]:
    """Refuse callbacks whose figure will not be there, or may not decide; what is to be said of others."""
    there: Metrics = dict.fromkeys(figures, 0.0) | {"round": 0}
    notes = [callback.begin(server, rounds, there) for callback in callbacks]
    return [*dict.fromkeys(note for note in notes if note)]


@contextmanager
def around(
    options: RunOptions, server: Server, kept: Folder, tracking: Tracking | None, began: float
) -> Iterator[Loop]:
    """From before the first round until after the last; ``began`` is when the command started."""
    start, private = server.round_number, server.private is not None
    with (
        Report(options.rounds, start, times=not strict(server)) as report,
        Record(tracking, kept.path, start, report.say, private, kept.seal) as record,
        StopSignal(report) as stop,
    ):
        if strict(server):
            record.strictly(server.mark)
        loop = Loop(options, server, kept, report, record, stop, began)
        loop.last = loop.over()
        try:
            yield loop
        finally:  # whatever ended it: nobody else may have the folder before
            if loop.saver is not None:
                report.attempt("checkpoint", loop.saver.wait)


@dataclass(eq=False)
class Ending(Observer):
    """Behind who may stop a run early: those who come later do what is due in the last round."""

    loop: Loop

    def round(self, figures: Metrics) -> None:
        """See whether one of them has had enough."""
        self.loop.last = self.loop.last or bool(self.loop.server.stopped)


@dataclass(eq=False)
class ScoreKeeper(Observer):
    """How good the model is: on test data, where there are any, and on clients' validation data."""

    loop: Loop
    test: Dataset | None
    metrics: Mapping[str, Loss]
    clients: Sequence[Client] = ()
    every: int = 1
    """Rounds between two evaluations."""
    finetune: int = 0
    """Local steps that each client takes from the last model before it is judged once more."""
    step: Judge | None = None
    """What a batch is judged by, where that is not the metrics of (x, y)."""
    last: dict[str, float] = field(default_factory=dict)
    """On the test data."""
    by_client: dict[str, dict[str, float]] = field(default_factory=dict)
    """On each client's validation data, with the weights that it keeps."""
    beside: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """The same in the end, of models to compare with."""
    told: set[str] = field(default_factory=set)
    """What was said of clients without a figure: once is enough."""

    def __post_init__(self) -> None:
        """How good it is before training."""
        self.look()

    def look(self) -> None:
        """Test it as it is now."""
        server = self.loop.server
        if self.test is not None:
            self.last = evaluate(server.model, self.test, self.metrics, step=self.step)
            if server.threat and (rows := server.threat.triggered(self.test)) is not None:
                judged = {"attack_success": accuracy}
                self.last |= evaluate(server.model, rows, judged)

    def round(self, figures: Metrics) -> Metrics:
        """Scores of a round in which they are due."""
        if not self.loop.due(self.every):
            return {}
        start, server = time.perf_counter(), self.loop.server
        kept = self.again()
        own = server.mark(by_client.figures(self.by_client) | self._beside(kept))
        if self.loop.last and own and self.by_client:
            family = "nonprivate" if server.private else "validation"
            table = by_client.markdown(self.table())
            self.loop.record.text(f"{family}/by_client", table, server.round_number)
        own |= server.mark({"seconds_evaluate": time.perf_counter() - start})
        return {f"test_{k}": v for k, v in self.last.items()} | own

    def again(self) -> Mapping[str, Any] | None:
        """Judge the model as it is now, on test data and by clients; what each of them keeps."""
        server = self.loop.server
        self.look()
        kept = server.own() if server.recipe.strategy.keeps and self.clients else None
        self.by_client = evaluate_clients(
            server.model, self.clients, self.metrics, kept, self.step, self._tell
        )
        return kept

    def _beside(self, kept: Mapping[str, Any] | None) -> Metrics:
        """In the end: the shared model where clients keep their own, and the shared one fine-tuned."""
        if not (self.loop.last and self.by_client):
            return {}
        server, judged = self.loop.server, (self.metrics, self.step)
        if kept is not None:
            found = evaluate_clients(
                server.model, self.clients, judged[0], None, judged[1], self._tell
            )
            self.beside["shared"] = found
        if self.finetune:
            own = finetuned(server, self.clients, self.finetune)
            self.beside["finetuned"] = evaluate_clients(
                server.model, self.clients, judged[0], own, judged[1], self._tell
            )
        return {
            k.replace("validation", name, 1): v
            for name, scores in self.beside.items()
            for k, v in by_client.figures(scores).items()
        }

    def _tell(self, why: str) -> None:
        """Who has no figure, and why; strict privacy tells neither."""
        if why not in self.told and not strict(self.loop.server):
            self.loop.report.say(f"note: {why}")
        self.told.add(why)

    def table(self) -> list[dict[str, Any]]:
        """Mean, worst and each client's scores, none of which strict privacy tells."""
        if not self.by_client or strict(self.loop.server):
            return []
        whole = {i: dict(s) for i, s in self.by_client.items()}
        known = dict(self.metrics)
        for what, scores in self.beside.items():
            for i, found in scores.items():
                whole[i] |= {f"{what} {k}": v for k, v in found.items()}
            known |= {f"{what} {k}": m for k, m in self.metrics.items()}
        return by_client.rows(whole, known, MOST_TOLD)

    def side_by_side(self) -> Any:
        """Clients' own models beside the shared one and the fine-tuned, where there is more than one."""
        rows = self.table() if self.beside else []
        return table_of(rows[: len(by_client.HEADS) + MOST_SHOWN]) if rows else None

    def ends(self) -> str:
        """The best and the worst clients by name, in a sentence, where that is allowed."""
        server = self.loop.server
        if strict(server):
            return "clients: privacy.strict names none"
        if self.by_client:
            mark = "(not private) " if server.private else ""
            return f"{mark}clients: {by_client.ends(self.by_client, self.metrics)}"
        if secure.hides(server.recipe.aggregator):
            return "clients: the aggregator hides each"
        strategy = server.recipe.strategy
        if strategy.keeps or strategy.personal:
            return "clients: --evaluate personal would judge each one's own model, not the shared one alone"
        return "clients: --validation 0.2 would name the best and the worst"


@dataclass(eq=False)
class Checkpoints(Observer):
    """Saves the run, and on disk before that what the record holds."""

    loop: Loop
    every: Every = 1
    """Rounds between two checkpoints; auto: see ``saving``."""

    def __post_init__(self) -> None:
        """No checkpoint is being written yet; none is when the loop is left."""
        loop = self.loop
        folder, charged = loop.kept.path / "checkpoints", loop.server.private is not None
        self.saver = loop.saver = Saver(folder, self.every, charged)
        self.spared, self.clients = False, of_clients(loop.server)

    def round(self, figures: Metrics) -> None:
        """One that cannot be written is said, and the run goes on."""
        if self.loop.last or self.saver.due(self.loop.server.round_number):
            self.loop.report.attempt("checkpoint", self.save)
        elif self.saver.sparing and not self.spared:
            self.spared = True
            self.loop.report.say(
                f"note: a checkpoint is {self.saver.size / 1e6:.0f} MB: one every {SECONDS:g} seconds and "
                "in the end, written beside the training (--checkpoint-every 1: each round)"
            )

    def save(self) -> None:
        """A checkpoint of the round that is over."""
        kept, record = self.loop.kept, self.loop.record
        seal = record.sealed()

        def write(state: dict[str, Any]) -> Path:
            record.sync()
            return kept.save(state, seal)

        self.saver.save(self.loop.server.state_dict() | self.clients, write, self.loop.last)


def open_folder(
    options: RunOptions,
    folder: Path,
    server: Server,
    held: ExitStack,
    keep: Callable[[Path], object],
    check: Callable[[Path], object] = lambda path: None,
) -> Folder:
    """A new run folder, or the old one with the server brought to its last checkpoint; locked.

    ``keep`` writes what else a new run must remember, ``check`` looks at it where a run goes on.
    """
    if options.resume:
        kept, saved = folders.resume(folder, held)
        check(folder)
        with folders.reading(folder):
            same_clients(server, saved, folder)
            go_on(server, saved, folder)
        return kept
    table = {k: v for k, v in objects.describe(options).items() if k not in ("resume", "run_dir")}
    kept = folders.start(folder, table, held)
    if server.private:  # what keep() writes may be a release of its own
        server.private.keep(Ledger(folder / files.LEDGER, server.private.plan.unit))
    keep(folder)
    kept.begin(state(server))
    return kept
