"""What a run says before the first round."""

from types import SimpleNamespace

import torch
from torch import nn

from fedtorch import Client, Median, Recipe, Server, TopK
from fedtorch.rounds.buffered import Buffered
from fedtorch.run.messages import introduce


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
    late = said(Recipe(), pace=Buffered(size=2, concurrency=3))
    assert any(
        line.startswith("pace buffered (size 2, concurrency 3, staleness 0.5, clock simulated (")
        for line in late
    )
