"""Pictures, histograms and points of a run, made from the server and the test data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.data import Data
from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.history import by_client, took_part
from fedtorch.rounds.judged import metrics_of
from fedtorch.rounds.observers import Observer
from fedtorch.server import Server
from fedtorch.tracking import drawings
from fedtorch.tracking.record import Record
from fedtorch.tracking.tensorboard.graph import modules
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.losses import Loss
from fedtorch.training.metrics import worse
from fedtorch.training.module import to
from fedtorch.training.outline import copied
from fedtorch.training.predict import guesses
from fedtorch.types import Released

SETS = 4
"""Sets of histograms and points in a run; of pictures, which take longer, there is one at the end."""
SKETCH = 32
"""Numbers that stand for a client's update in the projector."""
MOST_POINTS = 2000
"""Points the projector is given; the newest stay."""
MISTAKES = 32
"""Misclassified images shown."""


class Pictures(Observer):
    """Draws what the tracking options ask for, in the rounds that are due."""

    def __init__(
        self,
        record: Record,
        server: Server,
        data: Data,
        rounds: int,
        ended: Callable[[], bool],
        scores: Callable[[], Mapping[str, Mapping[str, float]]],
    ) -> None:
        """``rounds`` is the last one to come; a budget or a signal may have the run ``ended`` earlier.

        ``scores`` gives those of the clients on their own validation data.
        """
        self.record, self.server, self.data, self.rounds = record, server, data, rounds
        self.ended, self.scores = ended, scores
        self.options = record.tracking
        self.under = "nonprivate" if record.private else "data"
        asked = self.options.projector if self.options else False
        self.pairs = server.recipe.step is None
        """Whether batches are known to be (x, y), of which the model takes x."""
        self.strict = server.recipe.privacy.strict
        """Nothing that looks at clients' data is recorded, whatever the options say."""
        self.projector = not self.strict and ((not record.private) if asked is None else asked)
        self.points: list[tuple[Tensor, int, str]] = []
        generator = seeds.generator(server.seed, "client runs")
        count = self.options.client_runs if self.options and not self.strict else 0
        order = torch.randperm(len(server.ids), generator=generator)[:count].tolist()
        self.followed = {server.ids[i] for i in order}
        """Clients that have a run of their own."""

    def start(
        self,
        table: Mapping[str, Any],
        metrics: Mapping[str, Loss],
        ids: list[str],
        parts: list[Tensor],
    ) -> None:
        """Before the first round: the options, who holds what, and the model."""
        self.record.config(table, tuple(f"test/{m}" for m in metrics))
        name = next((m for m in metrics if m != "loss"), "loss")
        self.record.judged = name, worse(metrics[name])
        fresh = self.server.round_number == 0
        if fresh:
            self.record.text("config", "\n".join(f"    {k} = {v!r}" for k, v in table.items()))
        if fresh and self.options and self.options.pictures and not self.strict:
            args = (ids, parts, self.data.labels)
            self.record.picture(f"{self.under}/partition", 0, drawings.partition_map, *args)
        if self.options and self.options.graph and self.pairs:
            some = self.data.test if len_of(self.data.test) else self.data.train
            x, _ = fetch(some, torch.arange(min(2, len_of(some))))
            device = next(self.server.model.parameters()).device
            nodes = modules(copied(self.server.model), to(x, device))
            self.record.pass_on("graph", nodes)

    def round(self, figures: Metrics) -> None:
        """After a round; the last one gets everything."""
        step, last = self.server.round_number, self.ended()
        if self.followed:
            self.record.pass_on("scalars", self._single(figures), step)
        if self.options is not None and (last or self.record.due(step, self.rounds, SETS)):
            if self.options.histograms:
                self._histograms(self.scores(), step)
            self._points(step)
        if last or self.record.due(step, self.rounds, 1):
            self._pictures(step)
        self.record.pass_on("flush")  # before the checkpoint that says this round is done

    def _pictures(self, step: int) -> None:
        if self.options is None or not self.options.pictures:
            return
        if not self.strict:
            self._participation(step)
            self._by_client(step)
        known = self.pairs and self.data.kind == "classification"
        if known and len_of(self.data.test):
            self._test(step)

    def _points(self, step: int) -> None:
        if self.points:
            rows = [["client", "round"], *([i, str(r)] for _, r, i in self.points)]
            points = torch.stack([p for p, _, _ in self.points])
            name = "client_updates"
            name = f"nonprivate_{name}" if self.under == "nonprivate" else name
            self.record.pass_on("points", name, points, rows, step)

    def _single(self, figures: Metrics) -> dict[str, float]:
        visits = self.server.visits
        mark = "nonprivate/" if self.under == "nonprivate" else ""
        scores = figures.get(mark.replace("/", "_") + "validation_by_client", {})
        return {
            f"clients/client-{_safe(i)}/{mark}validation_{name}": value
            for i in self.followed & {*scores}
            for name, value in scores[i].items()
            if value is not None
        } | {
            f"clients/client-{_safe(i)}/{mark}{name}": float(visits.values[figure][k])
            for k, i in enumerate(visits.ids)
            if i in self.followed
            for figure, name in (("train_loss", "loss"), ("update_norm", "update_norm"))
        }

    def _histograms(self, scores: Mapping[str, Mapping[str, float]], step: int) -> None:
        for name, value in self.server.model.named_parameters():
            self.record.pass_on("histogram", f"weights/{name}", value.detach().clone(), step)
        for name, moved in self.server.last_step.items():
            self.record.pass_on("histogram", f"updates/{name}", moved, step)
        names = next(iter(scores.values()), {}) if not self.strict else ()
        for name in names:
            values = torch.tensor([s[name] for s in scores.values()])
            values = values[~values.isnan()]  # of data of one class, say
            tag = "nonprivate" if self.under == "nonprivate" else "validation"
            if len(values):
                self.record.pass_on("histogram", f"{tag}/{name}_by_client", values, step)

    def _participation(self, step: int) -> None:
        trained = [m for m in self.record.history if m["round"]]
        rounds = took_part(trained[-drawings.MOST_SHOWN :])
        args = (self.server.ids, rounds)
        self.record.picture(f"{self.under}/participation", step, drawings.participation_map, *args)

    def _test(self, step: int) -> None:
        found = guesses(self.server.model, self.data.test)
        # a model of several outputs, of which only its own loss knows the classes; a class for each
        # position (text) makes no readable matrix of its vocabulary
        if found is None or found[0].dim() != 1:
            return
        true, predicted, classes = found
        self.record.picture(
            "test/confusion", step, drawings.confusion_matrix, predicted, true, classes
        )
        wrong = (predicted != true).nonzero().flatten()[:MISTAKES]
        if self.strict:
            return  # a picture of a test example is a row of somebody's data
        x = fetch(self.data.test, wrong)[0] if len(wrong) else None
        if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] in (1, 3):
            titles = [f"{predicted[i]}, is {true[i]}" for i in wrong.tolist()]
            heading = f"Test images taken for another class (round {step})"
            args = (x.cpu(), titles, heading)
            self.record.picture("test/mistakes", step, drawings.image_grid, *args)

    def sent(self, released: Released) -> None:
        """Every weight is added to one of 32 sums, its sign drawn: dot products survive on average."""
        if not self.projector:
            return
        step, update = self.server.round_number + 1, released
        rows = len(next(iter(update.sent["delta"].values())))
        if not self.record.due(step, self.rounds, SETS) or rows != len(update.ids):
            return  # a sum over clients, where the engine keeps none of them apart, shows nobody
        flat = torch.cat([v.flatten(1).float().cpu() for v in update.sent["delta"].values()], 1)
        generator = seeds.generator(self.server.seed, "sketch")
        place = torch.randint(SKETCH, (flat.shape[1],), generator=generator)
        sign = torch.randint(0, 2, (flat.shape[1],), generator=generator) * 2.0 - 1
        sums = torch.zeros(len(flat), SKETCH).index_add_(1, place, flat * sign)
        self.points += [(s, step, i) for s, i in zip(sums, update.ids, strict=True)]
        self.points = self.points[-MOST_POINTS:]

    def _by_client(self, step: int) -> None:
        """A map of clients and rounds for each figure of their validation data."""
        told = by_client(self.record.history)
        for name in metrics_of([*told.values()][-1]) if told else ():
            values = {r: {i: s.get(name) for i, s in each.items()} for r, each in told.items()}
            args = (self.server.ids, values, name)
            tag = f"{self.under}/validation_{name}_by_client"
            self.record.picture(tag, step, drawings.client_map, *args)


def _safe(client: str) -> str:
    # a client id names a folder: nothing that a path or a tag would read as more than a name
    from urllib.parse import quote

    return quote(client, safe=" ")[:80]
