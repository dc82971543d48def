"""What is said of a round, and how much of it a window has room for."""

import pytest

from fedtorch.rounds.progress import Bar, summary, troubles
from fedtorch.run.console import Report

FIGURES = {
    "round": 9,
    "nonprivate_train_loss": 0.5,
    "privacy_epsilon": 7.1,
    "test_loss": 0.3,
    "test_accuracy": 0.9,
    "test_f1": 0.8,
    "nonprivate_clients_per_second": 12.0,
}
NARROW = "test accuracy 0.9000  epsilon 7.1000"
WIDE = (
    f"{NARROW}  test loss 0.3000  test f1 0.8000  (not private) train loss 0.5000  12.0 clients/s"
)


def test_what_matters_most_is_said_first_and_kept_longest():
    assert summary(FIGURES) == summary(FIGURES, len(WIDE)) == WIDE
    assert summary(FIGURES, len(WIDE) - 1) == WIDE.removesuffix("  12.0 clients/s")
    assert summary(FIGURES, len(NARROW) + 1) == NARROW
    assert summary(FIGURES, 3) == "test accuracy 0.9000"
    assert (
        summary({"round": 1, "test_loss": 0.3, "train_loss": 2})
        == "test loss 0.3000  train loss 2.0000"
    )
    assert summary({"round": 1}, 3) == ""
    timed = {"round": 1, "simulated_seconds": 1234.4, "clients_per_second": 3}
    assert summary(timed) == "clock 1,234 s  3.0 clients/s"


def test_a_rule_that_takes_few_names_those_it_took():
    cohort = [str(k) for k in range(9)]
    one = {"round": 2, "cohort": cohort, "left_out": cohort[:8]}
    assert troubles(one) == ["round 2: the aggregator took 8 alone"]
    most = {"round": 2, "cohort": cohort, "left_out": cohort[:2]}
    assert troubles(most) == ["round 2: the aggregator left out 0, 1"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_bar_is_one_line_in_every_window(width, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    with Report(2000, 0) as report:
        report.round(FIGURES)
        table = report.bar.make_tasks_table(report.bar.tasks)
        (line,) = report.console.render_lines(table)
    text = "".join(part.text for part in line)
    assert "…" not in text and "eta" in text and "9/2000" in text
    assert ("epsilon 7.1000" in text) == (width >= 80)
    assert ("clients/s" in text) == (width >= 200)


def test_the_bar_of_a_server_drops_what_has_no_room(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    bar = Bar(30)
    bar.live = True
    bar.round(FIGURES)
    out = capsys.readouterr().out
    assert len(out) == 80 and out.rstrip().endswith("epsilon 7.1000")
