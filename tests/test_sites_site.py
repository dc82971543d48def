"""A site by itself: what it does whatever a server asks, and what it leaves behind when it is stopped."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtorch import FedAvg, Scaffold, seeds
from fedtorch.data import Csv, Npz
from fedtorch.data.base import facts_of
from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.secure.aggregator import Secure
from fedtorch.sites import keys
from fedtorch.sites import offer as plans
from fedtorch.sites import site as module
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.rpc import Unreachable
from fedtorch.sites.site import Site
from fedtorch.sites.state import KEPT, VisitMemory
from fedtorch.training.module import snapshot
from fedtorch.types import ClientError, ConfigError, Task

PRIVATE = SampleLevel(noise_multiplier=9.0, rounds=20, steps=2, batch_size=8.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 6)).astype("f4"), np.arange(24) % 3
    np.savez(folder / "rows.npz", x=x, y=y)
    rows = [
        ",".join("abcdef") + ",t",
        *(",".join(map(str, [*r, k])) for r, k in zip(x, y, strict=True)),
    ]
    (folder / "rows.csv").write_text("\n".join(rows))
    return folder


def offer(**changes) -> plans.Plan:
    facts = facts_of((6,), 3, "classification")
    return plans.Plan(**{"run": "r", "model": "logistic", "facts": facts} | changes)


class Played:
    """A server that a test plays: tasks to hand out, one after another, and the reports that came."""

    def __init__(self, plan: plans.Plan, tasks=()):
        self.plan, self.tasks, self.reports, self.calls = plan, list(tasks), [], []

    def task(self, round=0, visit=None, after="", **changes) -> Message:
        with seeds.seeded(1):
            model, recipe = self.plan.build()
        state = snapshot(model)
        params = {k: state[k] for k, _ in model.named_parameters()}
        numbers = {"clip": 1.0, "noise": 9.0} if recipe.privacy else {}
        task = Task(state, recipe.strategy.init(params), round, 0, 0.1, numbers)
        message = messages.task_message(task, visit=visit or f"{round:032x}", after=after)
        return Message("task", message.facts | changes, message.groups)

    def call(self, method, data, seconds):
        self.calls.append(method)
        if method == "report":
            self.reports.append(wire.decode(data))
            return b""
        if method == "join":
            return wire.encode(Message("plan", {"plan": plans.describe(self.plan)}))
        return wire.encode(self.tasks.pop(0) if self.tasks else Message("end"))

    def close(self):
        pass


def play(server, data, state, **options):
    """A site's whole life with this server; its exit code."""
    given = {"name": "north", "insecure": True, "dataset": Npz(str(data / "rows.npz"))}
    made = Site(SiteConfig(**given | {"state": str(state)} | options))
    made.line.close()
    made.line = server
    try:
        return made.run(), made
    finally:
        made.close()


def test_with_a_budget_no_loss_and_no_count_leave(data, tmp_path):
    for most, figures in ((None, 5), (50.0, 1)):
        server = Played(offer(privacy=PRIVATE))
        server.tasks = [server.task()]
        code, _ = play(server, data, tmp_path / str(most), max_epsilon=most)
        (report,) = server.reports
        assert code == 0 and report.facts["ids"] == ["north"]
        assert len(report.groups["metrics"]) == figures
        assert report.groups[""]["weight"].tolist() == [1.0]


def test_a_site_refuses_what_voids_the_claim_before_its_data_is_touched(data, tmp_path):
    csv = Csv(str(data / "rows.csv"), kind="classification", standardize=True)
    for plan, options, why in (
        (offer(privacy=PRIVATE, strategy=FedAvg(weighting="examples")), {}, "weighting"),
        (offer(privacy=PRIVATE), {"dataset": csv}, "standardize"),
        (offer(), {"max_epsilon": 9.0}, "no noise"),
        (offer(epochs=7), {"max_epochs": 6}, "max_epochs"),
    ):
        server = Played(plan)
        with pytest.raises(ConfigError, match=why):
            play(server, data, tmp_path, **options)
        assert server.calls == ["join"]


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"privacy": {"clip": 1.0, "noise": 8.0}}, "noise"),
        ({"privacy": {"clip": 1.0, "noise": 1e-9}}, "noise"),
        ({"privacy": {"clip": 1e-30, "noise": 9.0}}, "clip"),
        ({"privacy": {"clip": 1e6, "noise": 9.0}}, "clip"),
        ({"privacy": {"noise": 9.0}}, "clip"),
        ({"privacy": {}}, "clip"),
        ({"privacy": {"clip": 10**400, "noise": 9.0}}, "finite"),
        ({"lr": 10**400}, "finite"),
        ({"lr": 0.0}, "learning rate is 0"),
        ({"round": 2**70}, "round"),
        ({"round": -5}, "round"),
        ({"round": 10_000}, "max_rounds"),
        ({"seed": 2**200}, "seed"),
        ({"visit": "x" * 32}, "names no visit"),
        ({"after": "../x"}, "visit was the last"),
    ],
    ids=str,
)
def test_a_task_that_is_not_the_plans_ends_in_one_sentence(data, tmp_path, caplog, changes, why):
    server = Played(offer(privacy=PRIVATE))
    server.tasks = [server.task(**changes)]
    with caplog.at_level(logging.ERROR):
        code, made = play(server, data, tmp_path)  # with a budget or without
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert code == 1 and "not to be trusted" in line and why in line and len(line) < 400
    assert server.reports == [] and made.budget.spent() == 0


def test_a_task_with_groups_of_its_own_is_refused(data, tmp_path, caplog):
    server = Played(offer(strategy=Scaffold()))
    honest = server.task()
    for change in (
        {"extras/x": {"y": torch.zeros(3)}},
        {"extras/c": {"y": torch.zeros(3)}},
        {"extras/c": {}},
        {"state": {"x": torch.zeros(3)}},
    ):
        server.tasks = [Message("task", honest.facts, honest.groups | change)]
        code, _ = play(server, data, tmp_path)
        assert code == 1 and server.reports == []
    assert caplog.text.count("not to be trusted") == 4


@pytest.mark.parametrize(
    "privacy, said",
    [
        (None, "no privacy"),
        (
            SampleLevel(noise_multiplier=1e-6, rounds=3, steps=2, batch_size=8.0),
            r"epsilon (inf|\d.*e\+)",
        ),
        (PRIVATE, r"epsilon 0\.\d+ at delta 1e-05 for each example, by noise added here"),
        (
            ClientLevel(noise_multiplier=9.0, rounds=3),
            "for each client, by noise that the server says",
        ),
    ],
    ids=str,
)
def test_what_a_run_costs_is_said_as_it_is_joined(data, tmp_path, caplog, privacy, said):
    with caplog.at_level(logging.INFO):
        assert play(Played(offer(privacy=privacy)), data, tmp_path)[0] == 0
    (line,) = [r.getMessage() for r in caplog.records if "joined run r" in r.getMessage()]
    assert re.search(said, line) and "0 of at most" in line


def test_rounds_without_end_reach_the_owners_limit(data, tmp_path, caplog):
    server = Played(offer())
    server.tasks = [server.task(round=0, visit=f"{k:032x}") for k in range(9)]
    code, _ = play(server, data, tmp_path, max_rounds=3)
    assert code == 1 and len(server.reports) == 3 and "max_rounds of 3" in caplog.text


def test_a_server_that_never_waits_does_not_keep_a_site_busy(data, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server = Played(offer())
    server.tasks = [Message("wait")] * 5 + [Message("rejoin")] * 5
    assert play(server, data, tmp_path)[0] == 0
    assert len(waits) == 10 and doubling(waits)


def test_a_report_is_tried_again_after_longer_and_longer(data, tmp_path, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)

    class Cut(Played):
        def call(self, method, data, seconds):
            if method == "report" and len(waits) < 8:
                raise Unreachable("the line is down")
            return super().call(method, data, seconds)

    server = Cut(offer())
    server.tasks = [server.task(4)]
    assert play(server, data, tmp_path / "a folder" / "that is new")[0] == 0
    assert len(server.reports) == 1 and len(waits) == 8 and doubling(waits)
    assert caplog.text.count("round 5: cannot report, trying again") == 8


def doubling(waits: list[float]) -> bool:
    """From half a second up to half a minute, or down to half of each."""
    most = [min(0.5 * 2**k, 30.0) for k in range(len(waits))]
    return all(m / 2 <= w <= m for w, m in zip(waits, most, strict=True))


@pytest.mark.parametrize(
    "why, said",
    [
        ("error", "met an error"),
        ("stopped", "somebody stopped it"),
        ("made\nup" * 99, r"'made\nup"),
        (["x"] * 99, "'x'"),
        (7, "7"),
    ],
)
def test_a_run_that_ended_early_is_said_and_no_success(data, tmp_path, caplog, why, said):
    server = Played(offer())
    server.tasks = [server.task(), Message("end", {"why": why})]
    code, _ = play(server, data, tmp_path)
    assert code == 1 and len(server.reports) == 1
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert "ended the run early" in line and said in line and len(line) < 200


def test_an_error_of_the_visit_is_reported_without_its_text_and_the_site_goes_on(
    data, tmp_path, monkeypatch, caplog
):
    server = Played(offer())
    server.tasks = [server.task(0), server.task(1), server.task(2)]
    errors = iter([ClientError("row 3 is secret"), MemoryError()])
    real = module.Local.open

    def opened(self, *args):
        session = real(self, *args)
        collect = session.collect

        def failing():
            error = next(errors, None)
            if error:
                session._asked.clear()
                raise error
            return collect()

        session.collect = failing
        return session

    monkeypatch.setattr(module.Local, "open", opened)
    code, _ = play(server, data, tmp_path)
    assert code == 0
    failures = [r.facts["failures"] for r in server.reports]
    assert failures == [[["north", "error", "its model or data raised an error"]]] * 2 + [[]]
    assert "row 3 is secret" in caplog.text and "MemoryError" in caplog.text


def test_a_state_folder_that_lost_visits_is_said_and_with_a_budget_refused(data, tmp_path, caplog):
    first = Played(offer(privacy=PRIVATE))
    first.tasks = [first.task(0), first.task(1, after=f"{0:032x}")]
    assert play(first, data, tmp_path / "old", max_epsilon=50.0)[0] == 0
    then = Played(offer(privacy=PRIVATE))
    then.tasks = [then.task(2, after=f"{1:032x}")]
    with pytest.raises(ConfigError, match=r"does not know.*lost-state"):
        play(then, data, tmp_path / "new", max_epsilon=50.0)
    assert then.reports == []
    for options in ({}, {"max_epsilon": 50.0, "lost_state": True}):
        then.tasks = [then.task(2, after=f"{1:032x}")]
        assert play(then, data, tmp_path / "new", **options)[0] == 0
    assert len(re.findall("round 3: .*this site starts afresh", caplog.text)) == 2
    then.tasks = [then.task(2, after=f"{1:032x}")]
    assert play(then, data, tmp_path / "old", max_epsilon=50.0)[0] == 0


def test_the_visit_that_counts_is_kept_however_many_late_ones_follow(tmp_path):
    memory = VisitMemory(tmp_path)
    memory.keep("a", {"c": {"w": torch.ones(1)}})
    for k in range(3 * KEPT):
        memory.keep(f"late {k}", {}, "a")
    for again in (memory, VisitMemory(tmp_path)):
        assert torch.equal(again.after("a")["c"]["w"], torch.ones(1))
        assert len(again.visits) <= KEPT + 1
    memory.keep("b", {}, "a")
    for k in range(KEPT):
        memory.keep(f"later {k}", {}, "b")
    assert memory.after("a") is None and memory.after("b") == {} == memory.after("")


def test_the_visit_that_a_checkpoint_knows_is_kept_while_none_is_written(data, tmp_path):
    server, first = Played(offer()), f"{0:032x}"
    names = [f"{k:032x}" for k in range(KEPT + 3)]
    server.tasks = [server.task(0)] + [
        server.task(k, after=names[k - 1], saved=first) for k in range(1, len(names))
    ]
    code, made = play(server, data, tmp_path)
    kept = {v.split()[1] for v in made.memory.visits}
    assert code == 0 and kept == {first, *names[-KEPT:]}
    server.tasks = [server.task(1, after=names[0], saved="x")]
    assert play(server, data, tmp_path)[0] == 1


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_ends_a_site_in_one_sentence_before_it_reports(data, tmp_path, monkeypatch):
    server = Played(offer(privacy=PRIVATE))
    server.tasks = [server.task()]
    monkeypatch.setattr("fedtorch.sites.state.torch.save", full)
    with pytest.raises(
        ConfigError, match=r"memory.pt cannot be written \(No space left on device\)"
    ):
        play(server, data, tmp_path, max_epsilon=50.0)
    assert server.reports == []  # the server gives the visit again
    monkeypatch.undo()
    server.tasks = [server.task()]
    code, made = play(server, data, tmp_path, max_epsilon=50.0)
    assert code == 0 and len(made.budget.ledgers["example"]) == 2  # charged again, as promised


def test_curves_that_cannot_be_written_are_said_once_and_the_work_goes_on(
    data, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("fedtorch.sites.curves.SummaryWriter", full)
    server = Played(offer())
    server.tasks = [server.task(k) for k in range(3)]
    assert play(server, data, tmp_path)[0] == 0
    assert len(server.reports) == 3 and caplog.text.count("curves cannot be written") == 1


def test_two_processes_do_not_share_a_state_folder(data, tmp_path):
    config = SiteConfig(
        name="north", insecure=True, dataset=Npz(str(data / "rows.npz")), state=str(tmp_path)
    )
    first = Site(config)
    with pytest.raises(ConfigError, match=r"in use by another process.*--state"):
        Site(config)
    first.close()
    Site(config).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state folder"):
        Site(SiteConfig(**{**vars(config), "state": str(tmp_path / "file")}))


def test_a_state_folder_that_takes_no_new_name_is_refused_before_anything_is_joined(
    data, tmp_path, monkeypatch
):
    config = SiteConfig(
        name="north", insecure=True, dataset=Npz(str(data / "rows.npz")), state=str(tmp_path)
    )
    Site(config).close()
    real, written = Path.write_text, []

    def closed(path: Path, text: str, **how: Any) -> int:
        if path.parent != tmp_path:
            return real(path, text, **how)
        written.append(path.name)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", closed)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        Site(config)
    assert written == [".writable"]


@pytest.mark.parametrize("limit", [{}, {"max_epsilon": 5.0}], ids=["no budget", "budget"])
def test_a_run_of_fewer_classes_than_the_data_is_refused_before_a_row_can_show_it(
    data, tmp_path, limit
):
    two = facts_of((6,), 2, "classification")
    for changes in ({"facts": two}, {"model_args": {"num_outputs": 2}}):
        server = Played(offer(privacy=PRIVATE, **changes))
        with pytest.raises(ConfigError, match="but the data has 3 classes"):
            play(server, data, tmp_path, **limit)
        assert server.calls == ["join"]


def test_a_site_that_requires_masks_joins_no_run_without(data, tmp_path):
    server = Played(offer())
    with pytest.raises(
        ConfigError, match="aggregates by Mean, and this site's require_secure asks"
    ):
        play(server, data, tmp_path, require_secure=True)
    assert server.calls == ["join"]
    with pytest.raises(ConfigError, match="sign what they send: give --credentials"):
        play(Played(offer(aggregator=Secure())), data, tmp_path)
    # masks with a few others alone hold against no server that lies
    with pytest.raises(ConfigError, match="neighbours is for simulations"):
        play(Played(offer(aggregator=Secure(neighbours=2))), data, tmp_path)


def test_a_run_that_was_secure_stays_so_and_its_tasks_name_who_is_in_it(data, tmp_path, caplog):
    keys.make(tmp_path / "keys", ["localhost"], ["north"], 2)
    own = {"insecure": False, "credentials": str(tmp_path / "keys/north")}
    server = Played(offer(aggregator=Secure()))
    server.tasks = [server.task()]
    code, made = play(server, data, tmp_path / "state", **own)
    assert code == 1 and "the task names no roster" in caplog.text and server.reports == []
    made.answered.enter(offer(aggregator=Secure()))
    for other in (offer(), offer(aggregator=Secure(threshold=2))):
        with pytest.raises(ConfigError, match="new terms are for a new run"):
            play(Played(other), data, tmp_path / "state", **own)
    (tmp_path / "state/openings.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"openings.jsonl, which keeps whose sums"):
        play(Played(offer(aggregator=Secure())), data, tmp_path / "state", **own)
    again = Played(offer(aggregator=Secure()))
    assert play(again, data, tmp_path / "state", lost_state=True, **own)[0] == 0


def test_a_site_whose_columns_are_in_another_order_is_refused(data, tmp_path):
    csv = Csv(str(data / "rows.csv"), kind="classification")
    ours = list(csv.load(0).preparation.columns)
    play(Played(offer(columns=ours)), data, tmp_path / "same", dataset=csv)
    with pytest.raises(ConfigError, match="columns are in another order"):
        play(Played(offer(columns=ours[::-1])), data, tmp_path / "other", dataset=csv)


def test_a_round_done_again_is_charged_once_more_and_no_visit_beyond_the_plan(data, tmp_path):
    # the server was killed with its second round done and not saved, and asks for it again
    plan = replace(PRIVATE, rounds=3)
    server = Played(offer(privacy=plan))
    names = [c * 32 for c in "0123"]
    rounds = [0, 1, 1, 2]
    after = ["", names[0], names[0], names[2]]
    server.tasks = [server.task(*given) for given in zip(rounds, names, after, strict=True)]
    server.tasks.append(
        server.tasks[-1]
    )  # a site looks at the plan anew, and is given the visit again
    code, made = play(server, data, tmp_path, max_epsilon=50.0)
    assert code == 0 and [bool(r.facts["ids"]) for r in server.reports] == [True, True, True, False]
    (ledger,) = made.budget.ledgers.values()
    assert len(ledger) == made.answered.visits(server.plan.run) == 3
