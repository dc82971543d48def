"""Visits of a run that a site answers: as many as its plan said, whoever joins again or starts again."""

import json
import logging

import pytest
import torch

from fedtorch import FedPer, Scaffold
from fedtorch.channel.topk import TopK
from fedtorch.disk import whole
from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message
from fedtorch.privacy import LocalDP, SampleLevel
from fedtorch.run import checkpoint
from fedtorch.sites.offer import Plan
from fedtorch.sites.state import AGAIN, FORMAT, Answered, VisitMemory
from fedtorch.types import ConfigError
from test_sites_site import PRIVATE, Played, data, full, offer, play  # noqa: F401

FEW = SampleLevel(noise_multiplier=9.0, rounds=3, steps=2, batch_size=8.0)
MORE = SampleLevel(noise_multiplier=9.0, rounds=5, steps=2, batch_size=8.0)


def ask(visits, first=0, **plan):
    """A server with tasks for so many visits, each of the round before."""
    server = Played(offer(**plan))
    server.tasks = [server.task(0, visit=f"{first + k:032x}") for k in range(visits)]
    return server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """How long a site waits between calls is what test_sites_site looks at."""
    monkeypatch.setattr("fedtorch.sites.site._pause", lambda times: None)


def answers(server):
    """Of each report, whether it brought an update."""
    return [bool(r.facts["ids"]) for r in server.reports]


@pytest.mark.parametrize("limit", [{}, {"max_epsilon": 50.0}], ids=["no budget", "budget"])
def test_no_visit_beyond_a_private_plan_is_answered_after_restarts_and_rejoins(
    data,  # noqa: F811
    tmp_path,
    caplog,
    limit,
):
    first = ask(2, privacy=FEW)
    first.tasks.insert(1, Message("rejoin"))
    assert play(first, data, tmp_path, **limit)[0] == 0 and answers(first) == [True, True]
    then = ask(3, 2, privacy=FEW)  # another process
    then.tasks[2:2] = [
        then.tasks[1],
        Message("rejoin"),
    ]  # the visit that it looks for a new plan at
    code, made = play(then, data, tmp_path, **limit)
    assert code == 0 and answers(then) == [True, False, False]
    assert len(made.budget.ledgers["example"]) == 3
    assert "more than the 3 visits that its privacy is for" in caplog.text


def test_a_run_that_is_resumed_for_longer_finds_its_sites_where_they_agree(data, tmp_path):  # noqa: F811
    for limit, done in (({}, 3), ({"max_epsilon": 50.0}, 5)):
        state = tmp_path / str(done)
        server = ask(7, privacy=FEW)
        tasks, server.tasks = server.tasks, server.tasks[:4]
        real = server.call

        def call(method, *args, real=real, server=server, tasks=tasks):
            if method == "join" and len(server.reports) == 3 and len(server.tasks) == 0:
                server.plan, server.tasks = offer(privacy=MORE), tasks[3:]
            return real(method, *args)

        server.call = call
        if limit:
            assert play(server, data, state, **limit)[0] == 0
        else:
            with pytest.raises(ConfigError, match=r"joined for 3 .* asks for 5.*max_epsilon"):
                play(server, data, state)
        assert sum(answers(server)) == done


def test_another_privacy_plan_under_the_name_of_a_run_is_refused(data, tmp_path):  # noqa: F811
    assert play(ask(1, privacy=PRIVATE), data, tmp_path)[0] == 0
    for other in (SampleLevel(noise_multiplier=1.0, rounds=20, steps=2, batch_size=8.0), None):
        with pytest.raises(ConfigError, match="another privacy plan"):
            play(ask(1, privacy=other), data, tmp_path)


def test_a_plan_without_privacy_is_held_to_its_rounds_and_what_crashes_repeat(
    data,  # noqa: F811
    tmp_path,
    caplog,
):
    server = Played(offer(rounds=2))
    server.tasks = [server.task(k) for k in (0, 1, 2, 2)]
    with caplog.at_level(logging.ERROR):
        assert play(server, data, tmp_path / "a")[0] == 1
    assert answers(server) == [True, True] and "beyond the plan's 2" in caplog.text
    server = ask(9, rounds=1)
    kept = tmp_path / "b"
    kept.mkdir()
    (kept / "runs.json").write_text(
        json.dumps({"r": {"visits": 2 + AGAIN - 1, "rounds": 1, "privacy": None}})
    )
    assert play(server, data, kept)[0] == 1 and answers(server) == [True]


def test_the_owners_limit_counts_over_restarts(data, tmp_path):  # noqa: F811
    for first, done in ((0, 2), (2, 1), (4, 0)):
        server = ask(2, first)
        assert play(server, data, tmp_path, max_rounds=3)[0] == (0 if done == 2 else 1)
        assert len(server.reports) == done


@pytest.mark.parametrize("other", [{"model": "mlp"}, {"run": "other"}], ids=["model", "run"])
def test_memory_of_another_run_is_never_trained_from(data, tmp_path, caplog, other):  # noqa: F811
    # nor where it would fit: what another run left was perhaps never noised
    assert play(ask(1, strategy=Scaffold()), data, tmp_path)[0] == 0
    server = Played(offer(strategy=Scaffold(), **other))
    server.tasks = [server.task(1, after=f"{0:032x}")]
    assert play(server, data, tmp_path)[0] == 1
    assert server.reports == [] and "a visit of another run" in caplog.text


def test_a_site_that_was_never_finite_goes_on_from_what_its_code_left_out(data, tmp_path):  # noqa: F811
    local = LocalDP(noise_multiplier=9.0, rounds=3)
    mine = FedPer(personal=("*.bias",))
    plan = {"strategy": mine, "privacy": local, "channel": (TopK(share=0.1),), "model": "mlp"}
    server, first = Played(offer(**plan)), f"{0:032x}"
    server.tasks = [server.task(0, visit=first), server.task(1, after=first)]
    for task in server.tasks:
        task.groups["state"] = {k: v * float("nan") for k, v in task.groups["state"].items()}
    assert play(server, data, tmp_path)[0] == 0
    assert answers(server) == [True, True]


def test_ledgers_that_lack_charges_of_visits_that_were_answered_are_refused(data, tmp_path, caplog):  # noqa: F811
    assert play(ask(2, privacy=PRIVATE), data, tmp_path)[0] == 0
    for name in ("ledger-example.jsonl", "ledger-example.json"):
        (tmp_path / name).unlink()
    server = ask(1, 2, privacy=PRIVATE)
    with pytest.raises(ConfigError, match=r"2 private visits .* hold 0 charges.*lost-state"):
        play(server, data, tmp_path)
    assert server.calls == []
    assert play(server, data, tmp_path, lost_state=True)[0] == 0
    (tmp_path / "runs.json").unlink()
    assert play(ask(1, 3, privacy=PRIVATE), data, tmp_path)[0] == 0
    assert "visits are counted anew" in caplog.text


@pytest.mark.parametrize(
    "visits", [3, ["a"], {"v": 3}, {"v": {"c": 3}}, {"v": {"c": {"w": "text"}}}], ids=str
)
def test_a_memory_that_holds_something_else_is_one_sentence(tmp_path, visits):
    checkpoint.write(tmp_path / "memory.pt", FORMAT, {"visits": visits})
    with pytest.raises(ConfigError, match=r"memory.pt is damaged"):
        VisitMemory(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"r": 3}',
        '{"r": {}}',
        "{" * 9,
        '{"r": {"visits": -1, "rounds": 1, "privacy": null}}',
        '{"r": {"visits": 1, "rounds": "x", "privacy": null}}',
        '{"r": {"visits": 1, "rounds": 1}}',
    ],
)
def test_a_damaged_count_is_one_sentence(tmp_path, text):
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(ConfigError, match=r"runs.json, which counts the visits"):
        Answered(tmp_path)


def test_a_count_that_cannot_be_written_ends_the_visit(tmp_path):
    made = Answered(tmp_path / "gone")
    with pytest.raises(ConfigError, match="cannot be written"):
        made.enter(Plan("r"))


HALF = """
from torch import nn
def build(in_features: int, num_outputs: int) -> nn.Module:
    base = nn.Linear(in_features, 16).requires_grad_(False)
    return nn.Sequential(base, nn.Tanh(), nn.Linear(16, num_outputs))
"""


class Bringing(Played):
    """A server whose base is other than what a site builds, as pretrained weights are."""

    def __init__(self, plan):
        super().__init__(plan)
        self.brought = []
        self.base = {"0.weight": torch.full((16, 6), 0.5), "0.bias": torch.zeros(16)}

    def call(self, method, data, seconds):  # noqa: F811
        if method != "fetch" or not self.tasks:
            return super().call(method, data, seconds)
        task = self.tasks.pop(0)
        groups = {"state": {k: v for k, v in task.groups["state"].items() if k not in self.base}}
        lacks = wire.decode(data).facts["has"] != messages.digest(self.base)
        self.brought.append(lacks)
        more = {"rest": self.base} if lacks else {}
        return wire.encode(Message("task", task.facts, groups | more))


def test_a_base_that_was_sent_once_is_kept_over_restarts(data, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/half.py").write_text(HALF)
    plan = offer(model="half")
    server = Bringing(plan)
    for k in range(2):  # the second process of the site has the base on its disk
        server.tasks = [server.task(2 * k), server.task(2 * k + 1, after="")]
        code, site = play(server, data, tmp_path / "state")
        assert code == 0 and torch.equal(site.joined.given["0.weight"], server.base["0.weight"])
    assert server.brought == [True, False, False, False] and len(server.reports) == 4
    assert all(set(r.groups["sent/delta"]) == {"2.weight", "2.bias"} for r in server.reports)
    # of another run, damaged, or on a full disk: it is sent again, and the work goes on
    kept = tmp_path / "state/base.pt"
    for spoil in (lambda: kept.write_bytes(b"PK"), lambda: server.base["0.bias"].fill_(1.0)):
        spoil()
        server.brought, server.tasks = [], [server.task(0)]
        assert play(server, data, tmp_path / "state")[0] == 0 and server.brought == [True]
    monkeypatch.setattr(
        "fedtorch.sites.state.disk.whole",
        lambda path, **_: full() if path.name == "base.pt" else whole(path),
    )
    kept.unlink()
    server.tasks = [server.task(0)]
    assert play(server, data, tmp_path / "state")[0] == 0
    assert "base.pt cannot be written, and is fetched again" in caplog.text
