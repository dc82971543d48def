"""A run folder from Python: what ``fedtorch runs``, ``compare``, ``eval`` and TensorBoard read."""

import time
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtorch.data import prepared
from fedtorch.data.base import Data
from fedtorch.options import COUNT, check, fit
from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.judged import Judged
from fedtorch.rounds.observers import Observer
from fedtorch.run import checkpoint, files
from fedtorch.run import folder as folders
from fedtorch.run.callbacks import BestModel
from fedtorch.run.folder import Folder
from fedtorch.run.resume import alone, goes_on, keep_ledger, of_clients
from fedtorch.run.shown import Shown


@dataclass(eq=False)
class Record(Observer):
    """Keeps a run in a folder: config, ``metrics.jsonl``, TensorBoard, checkpoints, ledger, model, summary.

    ``fedtorch runs``, ``compare`` and ``eval`` read it, ``fedtorch.load(folder, model)`` gives the model,
    and ``fedtorch.resume(server, folder)`` goes on from its newest checkpoint.
    """

    folder: str | Path
    tracking: Any = "tensorboard"
    """Where it is recorded beside metrics.jsonl: tensorboard, mlflow, wandb, none, or an object of one."""
    checkpoint_every: int = 1
    """Rounds between two checkpoints; the last round is saved in any case."""
    data: Data | None = None
    """The loaded data: their name and preparation are kept, and with them the classes' names."""
    late: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no folder."""
        self.path = Path(fit("folder of Record", self.folder, str | Path)).expanduser()
        fit("data of Record", self.data, Data | None)
        check(self, "Record", checkpoint_every=COUNT)
        self.held = ExitStack()
        self.saved: int | None = None
        self.ended = False

    def begin(self, server: Any, rounds: int, figures: Metrics) -> str | None:
        """Make the folder, or go on in it; raises ConfigError where it is another run's."""
        from fedtorch.run import cli, objects  # the reader of options comes with them
        from fedtorch.run.described import described
        from fedtorch.run.messages import strict
        from fedtorch.tracking import Record as Writer
        from fedtorch.tracking import Tracking

        alone(server, self, self.path)
        self.server, self.ended, self.last = server, False, dict(figures)
        self.clients = of_clients(server)
        self.began = time.perf_counter()
        tracking = self.tracking
        if isinstance(tracking, str):
            tracking = objects.choose("tracking", tracking)
        fit("tracking of Record", tracking, Tracking | None)
        table = described(server, rounds, self.data)
        goes = bool(checkpoint.everything(self.path / "checkpoints"))
        self.kept = self._resumed(table) if goes else self._new(table)
        start = server.round_number
        self.writer = Writer(
            tracking,
            self.path,
            start if goes else 0,
            print,
            server.private is not None,
            self.kept.seal,
        )
        if strict(server):
            self.writer.strictly(server.mark)
        judged = tuple(f"test/{k[5:]}" for k in figures if k.startswith("test_"))
        flat = cli.flat(table) | {"lr": server.recipe.learning_rate}
        self.writer.config(flat, judged)
        if not goes:
            self.writer.text("config", "\n".join(f"    {k} = {v!r}" for k, v in flat.items()))
            if judged:
                self.writer.round({k: v for k, v in figures.items() if k != "validation_by_client"})
        self.shown = Shown.of(server, self.path, rounds, self.data)
        self.shown.write()
        self._save()
        return None

    def _new(self, table: dict[str, Any]) -> Folder:
        files.create(self.path)
        keep_ledger(self.server, self.path)
        kept = folders.start(self.path, table, self.held)
        if self.data is not None:
            prepared.Prepared.of(self.data).save(self.path)
        kept.begin(self.server.state_dict() | self.clients)
        self.saved = self.server.round_number
        return kept

    def _resumed(self, table: dict[str, Any]) -> Folder:
        from fedtorch.run.described import same_run

        goes_on(self.server, self.path)
        kept, _ = folders.resume(self.path, self.held)
        same_run(tomllib.loads(kept.config), table, self.path)
        self.saved = self.server.round_number
        return kept

    def round(self, figures: Metrics) -> Metrics:
        """Write the round down, and save it where that is due."""
        self.last |= figures
        own: Metrics = dict(self.writer.round(figures))
        if int(figures["round"]) % self.checkpoint_every == 0:
            self._save()
        return own

    def finish(self, server: Any) -> None:
        """The last checkpoint, the model, and what came of it."""
        from fedtorch.run.console import Report
        from fedtorch.run.messages import record_privacy, write_results

        self._save()
        files.write_model(self.path, server.model)
        report, private = Report(server.round_number, server.round_number), server.private
        judge = next((o for o in server.observers if isinstance(o, Judged)), None)
        if judge is not None and judge.step is None and server.recipe.step is None:
            kind = "classification" if self.data is None else self.data.kind
            report.attempt("report.json", self.shown.write, server.model, judge.test, kind)
        if private:
            report.attempt("privacy report", record_privacy, self.writer, server)
        shown = [o for o in server.observers if isinstance(o, BestModel) and o.restore]
        kept = shown[-1].round_number if shown else 0
        judged = next((m for m in self.writer.history if m["round"] == kept), self.last)
        summary = {k: v for k, v in judged.items() if k.startswith("test_")} | {
            "rounds": server.round_number,
            "ended": server.stopped.partition(": ")[2],
            "seconds": round(time.perf_counter() - self.began, 3),
            "epsilon": private.spent() if private else None,
            "delta": private.delta if private else None,
            "clients": len(server.ids),
            "seed": server.seed,
            **({"model_of_round": kept} if kept else {}),
        }
        write_results(report, self.path, summary, server)
        self.ended = True

    def close(self) -> None:
        """Close the files and let the folder go."""
        if hasattr(self, "writer"):
            self.writer.__exit__(None if self.ended else RuntimeError)
        self.held.close()

    def _save(self) -> None:
        def write() -> None:
            self.kept.save(self.server.state_dict() | self.clients, self.writer.seal())

        def tell(why: str) -> None:
            print(f"warning: checkpoint not written ({why}); the run goes on without it")

        self.saved = checkpoint.saved(self.saved, self.server.round_number, write, tell)

    def __repr__(self) -> str:
        """Where, and how far it is."""
        so_far = "" if self.saved is None else f": round {self.saved}"
        return f"Record({str(self.path)!r}{so_far})"
