"""The app on the page for people from Flower is a Flower app, and learns what ours learns."""

import contextlib
import importlib
import io
import random
import re
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

PAGE = Path(__file__).parents[1] / "docs" / "from-flower.md"
ROUNDS = 20


class Here(Grid):
    """Flower's wires, in this process: each message goes to the app at once, with its node's context."""

    run = None

    def __init__(self, app, settings, nodes=10) -> None:
        self.app, self.asked = app, []
        self.contexts = [
            Context(1, k, {"partition-id": k, "num-partitions": nodes}, RecordDict(), settings)
            for k in range(nodes)
        ]

    def get_node_ids(self):
        return range(len(self.contexts))

    def send_and_receive(self, messages, *, timeout=None):
        messages = [*messages]
        self.asked.append([m.metadata.message_type for m in messages])
        return [self.app(m, self.contexts[m.metadata.dst_node_id]) for m in messages]

    set_run = create_message = push_messages = pull_messages = None


def test_both_apps_of_the_page_learn_alike(tmp_path, monkeypatch):
    text = PAGE.read_text()
    files = re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(files) == 4
    for name, held in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(held)
    settings = tomllib.loads((tmp_path / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    run = flatten_dict(settings["config"])
    # Flower's app, by its own server and strategy
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    client, server = (importlib.import_module(f"quickstart.{n}_app") for n in ("client", "server"))
    results, start = [], FedAvg.start

    def kept(*given, **options):
        results.append(start(*given, **options))
        return results[0]

    monkeypatch.setattr(FedAvg, "start", kept)
    torch.manual_seed(0), random.seed(0)
    grid = Here(client.app, run)
    server.app(grid, Context(1, 0, {}, RecordDict(), run))
    theirs = [results[0].evaluate_metrics_serverapp[r]["accuracy"] for r in range(ROUNDS + 1)]
    assert grid.asked == [["train"] * 5, ["evaluate"] * 5] * ROUNDS
    # the script beside it
    [ours] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shown = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(shown):
        exec(ours, {"__name__": "page"})
    last = float(shown.getvalue().split()[-1])
    assert theirs[0] < 0.3 and abs(theirs[-1] - last) < 0.12 and last > 0.75, (theirs[-1], last)
