import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedtorch.__main__ import main
from fedtorch.rounds.history import History
from fedtorch.run import by_client
from fedtorch.training.losses import cross_entropy
from fedtorch.training.metrics import by_name

SCORES = {"a": {"loss": 0.5, "auroc": math.nan}, "b": {"loss": 1.5, "auroc": 0.75}}
METRICS = {"loss": cross_entropy, **by_name(["auroc"])}


def test_a_client_without_a_figure_spoils_no_mean():
    found = by_client.figures(SCORES)
    assert found.pop("validation_by_client") == {
        "a": {"loss": 0.5, "auroc": None},
        "b": SCORES["b"],
    }
    for name, values in {"loss": (1.0, 0.5, 1.5), "auroc": (0.75,) * 3}.items():
        names = [f"validation_{name}{end}" for end in ("", "_min", "_max")]
        assert tuple(found.pop(k) for k in names) == values
    assert found == {} and by_client.figures({}) == {}
    nobody = by_client.figures({"a": {"auroc": math.nan}})
    assert math.isnan(nobody["validation_auroc_max"])


def test_a_table_has_the_mean_the_deviation_the_worst_and_each_client():
    mean, spread, worst, a, b = by_client.rows(SCORES, METRICS, 2)
    assert (mean["loss"], mean["auroc"], worst["loss"], worst["auroc"]) == (
        "1.0000", "0.7500", "1.5000", "0.7500"
    )  # fmt: skip
    assert spread == {"client": "(deviation)", "loss": "0.5000", "auroc": "0.0000"}
    assert (a["auroc"], b["auroc"]) == ("-", "0.7500")
    *_, more = by_client.rows(SCORES, METRICS | {"auroc": lambda o, y: o}, 1)
    assert more == {"client": "... 1 more"}
    unknown = by_client.rows(SCORES, {"loss": lambda o, y: o, "auroc": METRICS["auroc"]}, 1)[2]
    assert unknown["loss"] == "0.5000 to 1.5000"
    lines = by_client.markdown([{"client": "a|b", "loss": "1"}, {"client": "c"}]).splitlines()
    assert lines == ["| client | loss |", "| --- | --- |", "| a\\|b | 1 |", "| c |  |"]


def test_the_best_and_the_worst_are_named_by_the_first_metric_that_is_no_loss():
    scores = {str(k): {"loss": k / 10, "auroc": k / 10} for k in range(1, 9)}
    here = "on their own validation data"
    assert by_client.ends(scores, METRICS) == (
        f"auroc {here}: best 8 (0.800), 7 (0.700), 6 (0.600); worst 1 (0.100), 2 (0.200), 3 (0.300)"
    )
    losses = {i: {"loss": s["loss"]} for i, s in scores.items()}
    assert by_client.ends(losses, METRICS).startswith(f"loss {here}: best 1 (0.100), 2 (0.200)")
    assert by_client.ends(scores, {}).startswith(f"auroc {here}: highest 8 (0.800)")
    # who has no figure is not named, and nobody twice
    assert by_client.ends(SCORES, METRICS) == f"auroc {here}: only b (0.750)"
    three = {i: scores[i] for i in "123"}
    assert by_client.ends(three, METRICS) == f"auroc {here}: best 3 (0.300); worst 1 (0.100)"
    assert by_client.ends({"a": {"auroc": math.nan}}, METRICS) == f"auroc {here}: none"


@pytest.mark.parametrize("private", [False, True])
def test_a_run_judges_clients_with_the_weights_they_keep(tmp_path, monkeypatch, capsys, private):
    monkeypatch.chdir(tmp_path)
    plan = "sample --privacy.epsilon 50" if private else "none --tracking.client-runs 1"
    words = f"""--privacy {plan} --rounds 2 --clients 4 --partition shards --validation 0.2
        --model.hidden 32 --strategy fedper --strategy.personal 3.*
        --metrics accuracy,perplexity --run-dir r""".split()
    assert main(["train", *words]) == 0
    out = capsys.readouterr().out
    mark = "(not private) " if private else ""
    (named,) = (line for line in out.splitlines() if "on their own validation data" in line)
    assert named.startswith(f"{mark}clients: accuracy on their own validation data: best ")
    last = History.load("r")[-1]
    mark = "nonprivate_" if private else ""
    each = last[f"{mark}validation_by_client"]
    assert main(["eval", "r", "--json"]) == 0  # by each client's own weights, from the checkpoint
    again = json.loads(capsys.readouterr().out)[f"{mark}validation_by_client"]
    for client, scores in each.items():
        assert scores == pytest.approx(again[client], rel=1e-6)
    if private:
        shown = EventAccumulator("r").Reload()
        for name in ("validation_accuracy", "validation_accuracy_min", "shared_accuracy_max"):
            curve = [s.value for s in shown.Scalars(f"nonprivate/{name}")]
            assert curve[-1] == pytest.approx(last[f"nonprivate_{name}"], rel=1e-6)
        families = {tag.partition("/")[0] for tag in shown.Tags()["scalars"]}
        assert families.isdisjoint({"validation", "shared"}), "not without the mark"
    else:
        # the shared model's last layer is as nobody trained it
        assert last["validation_accuracy"] > last["test_accuracy"]
        (events,) = Path("r").glob("events*")
        assert b"validation/by_client" in events.read_bytes()
        (own,) = Path("r/clients").glob("*/events*")
        assert b"validation_perplexity" in own.read_bytes()
        assert main(["eval", "r"]) == 0
        out = capsys.readouterr().out
        table = out[out.index("clients on their own validation data") :].splitlines()
        assert [row.split()[0] for row in table[2:8]] == [
            "(mean)",
            "(deviation)",
            "(worst)",
            "0",
            "1",
            "2",
        ]
