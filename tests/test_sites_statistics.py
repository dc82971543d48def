"""Statistics of columns over sites: told once, charged there, and those that a simulation scales by."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtorch import Client, Local, Server, seeds
from fedtorch.data import Csv
from fedtorch.data.base import facts_of
from fedtorch.engines import messages, wire
from fedtorch.engines.messages import Outcome
from fedtorch.engines.wire import Message, MessageError
from fedtorch.privacy import ClientLevel, SampleLevel, columns
from fedtorch.privacy.run import BEFORE
from fedtorch.sites import offer as plans
from fedtorch.sites import statistics
from fedtorch.sites.engine import Sites, remotes
from fedtorch.sites.joined import NOBODY
from fedtorch.sites.limits import accept
from fedtorch.sites.options import ServeConfig, SiteConfig
from fedtorch.sites.serve import keep, known, make_plan
from fedtorch.sites.site import Site
from fedtorch.types import ConfigError, Failure, Released

pytestmark = pytest.mark.timeout(120)
NAMES = ["north", "south"]
BOUNDS = ["age=0:120", "dose=0:1000"]
PLAN = SampleLevel(
    noise_multiplier=2.0,
    rounds=2,
    steps=1,
    statistics_noise=0.5,
    insecure_seed=7,
    mode="stacked",
    accountant="rdp",
)


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for name, age in zip(NAMES, (40, 70), strict=True):
        rows = [f"{draw.normal(age, 9):.1f},{draw.normal(300, 60):.1f},{k % 2}" for k in range(60)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["age,dose,ill", *rows]))
    return tmp_path


def offer(privacy=PLAN, **changes) -> plans.Plan:
    facts = facts_of((2,), 1, "binary")
    given = {"standardize": BOUNDS, "kind": "binary", "loss": "bce", "lr": 0.5} | changes
    return plans.Plan(run="test", model="logistic", facts=facts, privacy=privacy, **given)


def table(folder, name, **changes) -> Csv:
    # the other order: each column goes by its name
    given = {"kind": "binary", "standardize": "private", "bounds": BOUNDS[::-1]} | changes
    return Csv(str(folder / f"{name}.csv"), **given)


def site(folder, name="north", port=1, **changes) -> Site:
    given = {"dataset": table(folder, name), "patience": 20.0} | changes
    where = {"server": f"127.0.0.1:{port}", "state": str(folder / f"state-{name}")}
    return Site(SiteConfig(name=name, insecure=True, **where | given))


def simulated(folder, plan):
    """The plan's run in one process: centers, widths and weights."""
    data = [table(folder, n, bounds=BOUNDS).load(0) for n in NAMES]
    bounds = [*plan.ranges.values()]
    rows = [d.asks.rows for d in data]
    center, width, _ = columns.released(plan.privacy, plan.statistics, bounds, rows, NAMES)
    scaled = [d.asks.answer(center.tolist(), width.tolist(), "") for d in data]
    clients = [Client(n, d.train) for n, d in zip(NAMES, scaled, strict=True)]
    with seeds.seeded(1):
        model, recipe = plan.build()
    server = Server(model, clients, recipe, engine=Local(chunk=1), seed=3)
    [*server.rounds(2)]
    return center.tolist(), width.tolist(), server.model.state_dict()


def test_sites_scale_as_a_simulation_does_and_pay_once(folder):
    plan = offer()
    with seeds.seeded(1):
        model, recipe = plan.build()
    engine = Sites(plan=plan, address="127.0.0.1:0", deadline=60.0, minimum=2)
    server = Server(model, remotes(NAMES), recipe, engine=engine, seed=3)
    session = server.session
    made = [site(folder, n, session.port) for n in NAMES]
    threads = [threading.Thread(target=s.run) for s in made]
    for t, s in zip(threads, made, strict=True):
        t.start()
        while s.plan is None and t.is_alive():
            time.sleep(0.01)
    assert session.asking.wait(60)
    settled, _ = session.asking.read()
    session.settle(settled)
    for figures in server.rounds(2):
        assert figures["cohort"] == NAMES
    server.close()
    for t, s in zip(threads, made, strict=True):
        t.join()
        s.close()
    center, width, wanted = simulated(folder, plan)
    assert settled.center == pytest.approx(center) and settled.width == pytest.approx(width)
    assert abs(center[0] - 55) < 15 and abs(center[1] - 300) < 100
    for k, v in server.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6, k
    rounds = [e.round for e in made[0].budget.ledgers["example"].entries]
    assert rounds == [BEFORE, 0, 1]
    assert made[0].budget.spent("rdp") == pytest.approx(plan.privacy.planned(2.0, 2))


class Asks:
    """A server that asks for statistics, again and again."""

    def __init__(self, plan, times=1):
        self.plan, self.left, self.reports = plan, times, []

    def call(self, method, data, seconds):
        if method == "join":
            return wire.encode(Message("plan", {"plan": plans.describe(self.plan)}))
        if method == "report":
            self.reports.append(wire.decode(data))
            return b""
        self.left -= 1
        asked = Message("statistics", {"visit": f"{self.left + 1:032x}"})
        return wire.encode(asked if self.left >= 0 else Message("end"))

    def close(self):
        pass


def play(server, folder, **options):
    made = site(folder, **options)
    made.line.close()
    made.line = server
    try:
        return made.run(), made
    finally:
        made.close()


FRESH = SampleLevel(noise_multiplier=2.0, rounds=2, steps=1, statistics_noise=5.0)


def test_asked_again_by_whoever_a_site_sends_the_same_numbers_and_pays_nothing(folder):
    first, second = Asks(offer(FRESH), times=2), Asks(offer(FRESH))
    for server in (first, second):  # the second is another process of the site
        code, made = play(server, folder)
        assert code == 0
        assert [e.round for e in made.budget.ledgers["example"].entries] == [BEFORE]
    sent = [r.groups["sent/statistics"]["statistics"] for r in first.reports + second.reports]
    assert len(sent) == 3 and all(torch.equal(sent[0], other) for other in sent[1:])
    assert made.told.path.stat().st_mode & 0o777 == 0o600
    # in another run there is other noise, and another charge
    _, made = play(other := Asks(replace(offer(FRESH), run="next")), folder)
    assert not torch.equal(other.reports[0].groups["sent/statistics"]["statistics"], sent[0])
    assert len(made.budget.ledgers["example"]) == 2


def test_a_site_without_room_in_its_budget_tells_nothing(folder):
    server = Asks(offer(FRESH))
    _, made = play(server, folder, max_epsilon=0.01)
    (report,) = server.reports
    assert report.facts["failures"][0][1] == "budget" and "sent/statistics" not in report.groups
    assert made.budget.spent() == 0 and not made.told.path.exists()


def test_a_site_keeps_to_the_numbers_that_a_run_began_with(folder):
    center, width = [50.0, 300.0], [10.0, 50.0]
    for changed in (center, [51.0, 300.0]):
        server = Asks(replace(offer(), center=changed, width=width), times=0)
        if changed == center:
            code, made = play(server, folder)
            x = made.data.train.tensors[0]
            assert code == 0 and x.std(0) == pytest.approx([0.9, 1.2], abs=0.5)
        else:
            with pytest.raises(ConfigError, match="other centers and widths"):
                play(server, folder)
    with pytest.raises(ConfigError, match=r"statistics\.json.* cannot be used"):
        made.told.path.write_text('{"test": {"sent": [NaN]}}')
        statistics.Told(made.folder)


@pytest.mark.parametrize(
    "plan, dataset, why",
    [
        ({}, {"bounds": ["age=0:100", "dose=0:1000"]}, "bounds age=0:120,dose=0:1000"),
        ({}, {"statistics": "sums"}, "private quartiles of all sites"),
        ({"statistics": "sums"}, {}, "dataset.statistics sums"),
        ({}, {"standardize": False}, "give --dataset.standardize private"),
        ({"standardize": [], "privacy": SampleLevel(rounds=1)}, {}, "the run has none"),
    ],
    ids=["bounds", "kind here", "kind there", "no scaling", "no statistics"],
)
def test_a_site_whose_data_are_scaled_in_another_way_says_how_to_agree(folder, plan, dataset, why):
    server = Asks(offer(**plan))
    with pytest.raises(ConfigError, match=why):
        play(server, folder, dataset=table(folder, "north", **dataset))
    assert not server.reports


def report(nonce, sent=None, figures=None, kind="budget"):
    """What a site says when it is asked."""
    outcome = Outcome(NOBODY, [Failure("north", kind, "")], {})
    if sent is not None:
        update = Released.received(("north",), sent, {}, torch.ones(1), figures or {})
        outcome = Outcome(update, [], {})
    facts = {"run": "test", "visit": nonce, "round": BEFORE}
    message = messages.outcome_message(outcome, ["north"], **facts)
    return Message("report", message.facts, message.groups)


def test_the_server_takes_statistics_once_and_nothing_else():
    asking = statistics.Asking(offer(), NAMES)
    good = torch.full((1, asking.length), 3.0, dtype=torch.float64)
    nonce = asking.nonces["north"]
    for bad, figures in (
        ({"statistics": {"statistics": good[:, 1:]}}, {}),
        ({"statistics": {"statistics": good * float("nan")}}, {}),
        ({"statistics": {"statistics": good * 1e30}}, {}),
        ({"statistics": {"statistics": good}, "delta": {"w": good}}, {}),
        ({"statistics": {"statistics": good}}, {"train_loss": torch.ones(1)}),
    ):
        with pytest.raises(MessageError):
            asking.handle("report", "north", report(nonce, bad, figures))
    with pytest.raises(MessageError):
        asking.handle("report", "north", report(nonce, kind="away"))
    assert asking.handle("report", "south", report(nonce)) is None  # another's visit
    sent = {"statistics": {"statistics": good}}
    assert asking.handle("report", "north", report(nonce, sent)).kind == "thanks"
    with pytest.raises(MessageError, match="there already"):
        asking.handle("report", "north", report(nonce, sent))
    # who has answered waits, who has not is asked; whose data are scaled is none of this
    assert asking.handle("fetch", "south", Message("fetch")).kind == "statistics"
    assert asking.handle("fetch", "south", Message("fetch", {"scaled": True})) is None
    asking.close(settled=True)
    assert asking.handle("fetch", "north", Message("fetch")).kind == "rejoin"


def test_a_trusted_server_bounds_what_each_client_sends_and_noises_the_sum_once():
    plan = offer(ClientLevel(rounds=1, noise_multiplier=1.0, statistics_noise=2.0))
    asking = statistics.Asking(plan, NAMES)
    sent = torch.zeros(1, asking.length, dtype=torch.float64)
    sent[0, 0] = asking.asked.norm * 1.01
    with pytest.raises(MessageError, match="at most"):
        asking.handle(
            "report", "north", report(asking.nonces["north"], {"statistics": {"statistics": sent}})
        )
    settled, warning = asking.read()  # nobody was there: all is noise, and said to be
    assert len(settled.center) == 2 and "mostly noise" in warning


@pytest.mark.parametrize(
    "changes",
    [
        {"center": [50.0], "width": [1.0, 1.0]},
        {"center": [50.0, 1001.0], "width": [1.0, 1.0]},
        {"center": [50.0, float("nan")], "width": [1.0, 1.0]},
        {"center": [50.0, 10.0], "width": [1.0, 0.0]},
        {"center": [50.0, 10.0], "width": [121.0, 1.0]},
        {"statistics": "everything"},
        {"standardize": ["age"]},
        {"standardize": []},
        {"privacy": SampleLevel(rounds=1)},
    ],
    ids=str,
)
def test_a_plan_with_numbers_that_no_statistics_give_is_refused(changes):
    here = SiteConfig(name="north", insecure=True)
    assert accept(plans.describe(offer()), here).standardize == BOUNDS
    with pytest.raises(ConfigError):
        accept(plans.describe(offer()) | plans.describe(offer(**changes)), here)


def serve(**changes) -> ServeConfig:
    given = {"sites": NAMES, "input_shape": [2], "insecure": True, "standardize": BOUNDS}
    return ServeConfig(**given | changes)


def test_a_server_asks_for_statistics_under_a_plan_that_pays(tmp_path):
    assert make_plan(serve(), "r").privacy.once[0].noise == 10
    for changes, why in (
        ({"privacy": None}, "needs a privacy plan"),
        ({"standardize": [], "privacy": FRESH}, "none are asked for"),
        ({"standardize": ["age=9:1"]}, "standardize age=9:1"),
    ):
        with pytest.raises(ConfigError, match=why):
            serve(**changes)
    plan = replace(make_plan(serve(), "r"), center=[1.0, 2.0], width=[3.0, 4.0])
    keep(tmp_path, plan)
    assert known(tmp_path, True) == {"run": "r", "center": [1.0, 2.0], "width": [3.0, 4.0]}
    assert json.loads((tmp_path / "sites.json").read_text())["run"] == "r"
