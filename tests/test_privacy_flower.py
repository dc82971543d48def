"""The mod for Flower: what leaves a node is noised and charged, and all else stays."""

import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedtorch.privacy import Budget, LocalDP
from fedtorch.types import ConfigError

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.config import flatten_dict
from flwr.serverapp.strategy import FedAvg

from fedtorch.privacy.flower import SILENT, UNFIT, budget_of, private_release

OPTIONS = {"epsilon": 8.0, "rounds": 3, "clip": 0.5}
PLAN = LocalDP(**OPTIONS)
SENT = {"w": np.full((2, 2), 3.0, np.float32), "seen": np.array(7)}


def record(arrays) -> ArrayRecord:
    return ArrayRecord({k: Array(v) for k, v in arrays.items()})


class Node:
    """A node with the mod, and an app that answers with what it is told to."""

    def __init__(self, folder, site="north", **options) -> None:
        chosen = {"site": site, "folder": str(folder / site)} | OPTIONS | options
        self.config = {f"privacy.{k}": v for k, v in chosen.items()}
        self.ran = False

    def answer(self, reply, sent=SENT, kind="train", round=0, run=None) -> Message:
        app = ClientApp(mods=[private_release])

        @app.train()
        @app.evaluate()
        @app.query("rows")
        def run_it(msg, context):
            self.ran = True
            made = reply(msg) if callable(reply) else reply
            return made if isinstance(made, Message) else Message(made, reply_to=msg)

        ask = RecordDict({"arrays": record(sent), "c": ConfigRecord({"server-round": round})})
        about = Metadata(1, "ask", 0, 5, "", "", time.time(), 60.0, kind)
        message = Message(content=ask, metadata=about)
        return app(message, Context(1, 5, self.config, RecordDict(), run or {}))

    def weights(self, trained, **more) -> dict:
        out = self.answer(RecordDict({"mine": record(trained)}), **more)
        return {k: v.numpy() for k, v in out.content["arrays"].items()}


@pytest.fixture
def node(tmp_path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr("fedtorch.privacy.local.gaussian", lambda _, shape: torch.zeros(shape))


def spent(folder, site="north") -> float:
    return Budget(folder / site, PLAN, site=site).spent


def test_weights_come_back_clipped_about_what_was_sent_and_counts_as_they_were(node, silent):
    trained = {"seen": np.array(99), "w": SENT["w"] + np.array([[3, 0], [0, -4]], np.float32)}
    out = node.weights(trained)
    assert [*out] == ["w", "seen"] and out["seen"] == 7 and out["w"].dtype == np.float32
    assert out["w"] == pytest.approx(np.array([[3.3, 3], [3, 2.6]]))


def test_an_app_that_takes_the_message_apart_is_measured_by_what_was_sent(node, silent):
    def reply(msg):
        msg.content["arrays"].to_torch_state_dict(keep_input=False)
        return RecordDict({"arrays": record(SENT)})

    out = node.answer(reply).content["arrays"]["w"].numpy()
    assert (out == SENT["w"]).all()


def test_what_leaves_is_noised_by_the_claimed_law(node):
    sent = {"w": np.zeros(20_000, np.float32)}
    out = node.weights(sent, sent=sent)["w"].astype(float)
    scale = 2 * PLAN.clip * PLAN.calibrated(3)
    assert stats.kstest(out / scale, stats.norm.cdf).pvalue > 1e-4


def test_nothing_goes_along_with_the_weights_and_flowers_fedavg_takes_them(tmp_path):
    told = {
        "arrays": record(SENT),
        "metrics": MetricRecord({"train_loss": 0.3, "num-examples": 40}),
        "config": ConfigRecord({"trace": "row 17"}),
    }
    replies = [Node(tmp_path, site).answer(RecordDict(told)) for site in ("north", "south")]
    for out in replies:
        assert out.content.metric_records == {"metrics": MetricRecord({"num-examples": 1})}
        assert set(out.content) == {"arrays", "metrics"}
    arrays, metrics = FedAvg().aggregate_train(1, replies)
    assert set(arrays) == set(SENT) and metrics == MetricRecord()


@pytest.mark.parametrize(
    "reply",
    [
        RecordDict({"metrics": MetricRecord({"loss": 0.25})}),
        RecordDict({"a": record(SENT), "b": record(SENT)}),
        RecordDict({"a": record({"more": SENT["w"]})}),
        RecordDict({"a": record({"w": SENT["w"][0]})}),
        RecordDict({"a": record({"seen": np.array(8)})}),
        RecordDict({"a": record({"w": np.array([["row 17"] * 2] * 2)})}),
        RecordDict({"a": ArrayRecord({"w": Array("float32", (2, 2), "pickle", b"row 17")})}),
        RecordDict({"a": ArrayRecord({"w": Array("float32", (2,), "numpy.ndarray", b"row")})}),
        lambda msg: Message(Error(0, "row 17"), reply_to=msg),
        lambda msg: {}["row 17"],
        lambda msg: None,
    ],
    ids=[
        *("metrics", "two records", "name", "shape", "no floats", "text", "pickled", "cut"),
        *("error", "exception", "nothing"),
    ],
)
def test_what_no_noise_covers_stays_and_costs_nothing(tmp_path, node, reply):
    out = node.answer(reply)
    assert out.has_error() and not out.has_content() and out.error.reason == SILENT
    assert node.ran and spent(tmp_path) == 0


@pytest.mark.parametrize("kind", ["evaluate", "query.rows"])
def test_other_messages_are_not_answered_and_no_app_runs(tmp_path, node, kind):
    out = node.answer(RecordDict({"a": record(SENT)}), kind=kind)
    assert f"a reply to {kind}" in out.error.reason and not node.ran


def test_a_spent_budget_stops_this_site_by_name_over_restarts(tmp_path, node):
    for round in range(3):
        node.weights(SENT, round=round)
    for again in (node, Node(tmp_path)):
        out = again.answer(RecordDict({"a": record(SENT)}), round=3)
        assert out.error.reason.startswith("round 3: north would have spent epsilon")
    assert Node(tmp_path, "south").answer(RecordDict({"a": record(SENT)})).has_content()


def test_it_is_on_disk_before_it_leaves(tmp_path, node, monkeypatch):
    monkeypatch.setattr(LocalDP, "noised", lambda *_: 1 / 0)
    assert node.answer(RecordDict({"a": record(SENT)})).error.reason == SILENT
    assert spent(tmp_path) > 2


def test_a_job_cannot_bring_the_budget(tmp_path, node):
    brought, node.config = node.config, {"partition-id": 0}
    out = node.answer(RecordDict({"a": record(SENT)}), run=brought)
    assert out.error.reason == UNFIT and not node.ran
    assert not (tmp_path / "north").exists()


@pytest.mark.parametrize(
    "change, why",
    [
        ({"site": ""}, "no privacy.site"),
        ({"folder": "state"}, "absolute path"),
        ({"epsilon": True}, "not of type float"),
        ({"rounds": 2.5}, "not of type int"),
        ({"epsylon": 8.0}, "has privacy.epsylon; known are site"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"rounds": 0}, "rounds"),
    ],
    ids=["site", "folder", "bool", "int", "unknown", "negative", "no rounds"],
)
def test_a_config_that_is_no_budget_is_refused_before_training(tmp_path, caplog, change, why):
    node = Node(tmp_path)
    node.config |= {f"privacy.{k}": v for k, v in change.items()}
    out = node.answer(RecordDict({"a": record(SENT)}))
    assert out.error.reason == UNFIT and not node.ran and why in caplog.text
    with pytest.raises(ConfigError, match=why):
        budget_of(node.config)


def test_where_a_ledger_is_that_was_edited_is_told_at_the_node_alone(tmp_path, node, caplog):
    node.weights(SENT)
    path = tmp_path / "north/ledger-client.jsonl"
    path.write_bytes(path.read_bytes().splitlines(True)[0])
    with caplog.at_level("ERROR", "flwr"):
        out = node.answer(RecordDict({"a": record(SENT)}))
    assert out.error.reason == UNFIT and str(tmp_path) in caplog.text


def test_where_a_ledger_is_that_cannot_be_read_is_told_at_the_node_alone(tmp_path, node, caplog):
    path = tmp_path / "north/ledger-client.jsonl"
    path.mkdir(parents=True)
    with caplog.at_level("ERROR", "flwr"):
        out = node.answer(RecordDict({"a": record(SENT)}))
    assert out.error.reason == UNFIT and not node.ran and str(path) in caplog.text


def test_the_file_of_the_page_is_a_budget(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "inside-flower.md").read_text()
    told = tomllib.loads("[privacy]" + page.split("```ini\n[privacy]")[1].split("```")[0])
    told["privacy"]["folder"] = str(tmp_path)
    assert budget_of(flatten_dict(told)).most == 8.0
