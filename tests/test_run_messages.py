"""What a run says before the first round, and after the last."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedtorch import Client, Median, Recipe, Server, TopK
from fedtorch.rounds.attacks import SignFlip
from fedtorch.rounds.buffered import Buffered
from fedtorch.run import report
from fedtorch.run.messages import conclude, introduce


def said(recipe, **options):
    x, y = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    server = Server(nn.Linear(3, 2), [Client(str(k), (x, y)) for k in range(3)], recipe, **options)
    lines = []
    introduce(SimpleNamespace(say=lines.append), "a run", server, "who has what")
    return lines


def test_what_is_not_usual_is_said():
    assert not any(line.startswith(("aggregator", "channel", "pace")) for line in said(Recipe()))
    assert "channel topk (feedback True, share 0.2)" in said(Recipe(channel=(TopK(share=0.2),)))
    assert "aggregator median (f 0)" in said(Recipe(aggregator=Median()))
    lying = said(Recipe(aggregator=Median()), threat=SignFlip())
    assert any(
        re.fullmatch(r"threat sign-flip \(liars 1, scale 1\): client \d lies", s) for s in lying
    )
    late = said(Recipe(), pace=Buffered(size=2, concurrency=3))
    assert any(
        line.startswith("pace buffered (size 2, concurrency 3, staleness 0.5, clock simulated (")
        for line in late
    )


@pytest.mark.parametrize("epsilon, word", [(1.0, "2.7-fold"), (8.0, "2,981-fold"), (15.0, "-fold")])
def test_a_budget_is_said_as_odds(epsilon, word):
    said = report.plainly(epsilon, "the model", "one example", 1e-5)
    assert word in said and "protects nobody" not in said


@pytest.mark.parametrize("epsilon", [15.1, 200.0, 1e6, math.inf])
def test_a_budget_that_protects_nobody_is_said_in_words_and_no_factor(epsilon):
    said = report.plainly(epsilon, "the model", "one example", 1e-5)
    assert said.startswith(f"epsilon {epsilon:.4g} protects nobody") and "fold" not in said
    plan = SimpleNamespace(
        describe=lambda: {"unit": "one example"},
        unit="example",
        person=None,
        strict=True,
        search=None,
    )
    run = SimpleNamespace(plan=plan, spent=lambda: epsilon, delta=1e-5)
    assert "for one example, which protects nobody; privacy.json" in report.cost(run)


@pytest.mark.parametrize("drawn, accuracy", [(False, 0.25), (True, 0.0)])
def test_the_end_is_five_lines(tmp_path, drawn, accuracy):
    (tmp_path / "config.toml").write_text("rounds = 9\n")
    if drawn:
        (tmp_path / "events.out.tfevents.1").touch()
    lines: list[str] = []
    server = SimpleNamespace(private=None, moved=lambda: True)
    summary = {"rounds": 4, "seconds": 2.0, "test_loss": 0.5, "test_accuracy": accuracy}
    screen = SimpleNamespace(say=lines.append)
    conclude(screen, tmp_path, summary, server, "SIGINT asked to", True, "clients: a and b")
    watch = f"   watch: tensorboard --logdir {tmp_path.parent}" if drawn else ""
    assert lines == [
        f"stopped, saved: 4 rounds in 2.0 s  test accuracy {accuracy:.4f}  test loss 0.5000",
        "privacy: none",
        f"ended because SIGINT asked to; continue: fedtorch train --run-dir {tmp_path} --resume",
        "clients: a and b",
        f"run folder: {tmp_path} (model.safetensors; fedtorch report draws it){watch}",
    ]
