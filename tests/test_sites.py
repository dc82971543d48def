"""Sites over TLS on loopback: the weights of one process, and nothing believed that was not checked."""

import logging
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch

from fedtorch import (
    QSGD,
    Client,
    FedAvg,
    Local,
    Median,
    PowerSGD,
    RandomK,
    Recipe,
    Scaffold,
    Server,
    TopK,
    seeds,
)
from fedtorch.data import Npz
from fedtorch.data.base import facts_of
from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message
from fedtorch.privacy import AdaptiveClip, ClientLevel, LocalDP, SampleLevel
from fedtorch.run import checkpoint
from fedtorch.sites import keys
from fedtorch.sites import offer as offers
from fedtorch.sites.engine import ALIVE_SECONDS, SMALL, Sites, remotes
from fedtorch.sites.joined import Joined
from fedtorch.sites.ledgers import SiteLedgers
from fedtorch.sites.limits import accept
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.reports import Assignment, expected, judge
from fedtorch.sites.rpc import Refused, ServerLine, Unreachable
from fedtorch.sites.serve import calibrated
from fedtorch.sites.site import Site
from fedtorch.strategies import FedBABU, FedNova
from fedtorch.training.module import snapshot
from fedtorch.types import ConfigError, OverBudget, Task

pytestmark = pytest.mark.timeout(300)
NAMES = ["north", "south"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    keys.make(folder / "keys", ["localhost", "127.0.0.1"], [*NAMES, "stranger"], 2)
    keys.make(folder / "others", ["localhost"], NAMES, 2)
    g = torch.Generator().manual_seed(0)
    for name, n in zip([*NAMES, "stranger"], (40, 30, 20), strict=True):
        x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        import numpy as np

        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    return folder


def offer(strategy=FedAvg(), **changes) -> offers.Plan:
    facts = facts_of((6,), 3, "classification")
    options = {"model_args": {"hidden": 8}, "batch_size": 8, "epochs": 2} | changes
    return offers.Plan(run="test", model="mlp", facts=facts, strategy=strategy, **options)


@contextmanager
def server(folder, offered, memory=None, names=NAMES, **options):
    with seeds.seeded(1):
        model, recipe = offered.build()
    options = {"address": "127.0.0.1:0", "keys": folder / "keys/server", "deadline": 60.0} | options
    made = Server(model, remotes(names), recipe, engine=Sites(plan=offered, **options), seed=3)
    if memory:
        made.load_state_dict(memory)
    try:
        yield made
    finally:
        made.session.seen.clear()  # a test that called by hand does not call to hear of the end
        made.close()


def site_config(folder, port, name, state, **changes) -> SiteConfig:
    options = {
        "server": f"127.0.0.1:{port}",
        "name": name,
        "dataset": Npz(str(folder / f"{name}.npz")),
        "credentials": str(folder / "keys" / name),
        "state": str(state),
        "patience": 20.0,
    } | changes
    return SiteConfig(**options)


@contextmanager
def sites(folder, port, state, names=NAMES, **options):
    """Sites at work in threads of this process.

    They join one after another and before the first round: neither the parser of plans nor torch.fx, which
    looks at the model, can be used by two threads at once. Real sites have a process each.
    """
    made = [Site(site_config(folder, port, n, state / n, **options)) for n in names]
    threads = [threading.Thread(target=s.run) for s in made]
    for t, s in zip(threads, made, strict=True):
        t.start()
        while s.plan is None and t.is_alive():
            time.sleep(0.01)
    yield made
    for t, s in zip(threads, made, strict=True):
        t.join()
        s.close()


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def here(folder, offered, rounds, names=NAMES, engine=Local(chunk=1)):
    """The same federation in one process."""
    with seeds.seeded(1):
        model, recipe = offered.build()
    data = [Npz(str(folder / f"{n}.npz")).load(0).train for n in names]
    clients = [Client(n, d) for n, d in zip(names, data, strict=True)]
    made = Server(model, clients, recipe, engine=engine, seed=3)
    for _ in made.rounds(rounds):
        pass
    return state_of(model)


@pytest.mark.parametrize(
    "parts",
    [
        {"strategy": FedNova(mu=0.1)},
        {"strategy": Scaffold()},
        {"channel": (RandomK(share=0.3),)},
        {"aggregator": Median(), "channel": (PowerSGD(rank=1), TopK(share=0.5), QSGD())},
    ],
    ids=["fednova", "scaffold", "sum of codes", "median of codes"],
)
def test_sites_give_the_weights_of_one_process(folder, tmp_path, parts):
    offered = offer(**parts)
    with server(folder, offered) as there, sites(folder, there.session.port, tmp_path) as made:
        for figures in there.rounds(3):
            assert figures["cohort"] == NAMES
        told = there.session.figures()
        there.close()
    # the sites took the fast path, and one process takes the general one
    assert all("fast path, up to 1 client" in " ".join(s.joined.session.notes) for s in made)
    wanted = here(folder, offered, 3, engine=Local(chunk=1, solver="general"))
    worst = max((wanted[k] - v).abs().max().item() for k, v in there.model.state_dict().items())
    assert worst <= 1e-6
    size = sum(v.numel() * 4 for v in wanted.values())
    assert size < told["site_north_bytes_sent"] < 3 * size + 2000
    assert os.listdir(tmp_path / "north/tensorboard")


def squared(model, batch):
    x, y = batch
    return (model(x).softmax(1) - torch.nn.functional.one_hot(y, 3)).square().sum(1)


def test_a_step_that_every_site_has_gives_the_weights_of_one_process(folder, tmp_path):
    offered = offer(step="test_sites:squared")
    own = {"steps": ["test_sites:squared"], "credentials": "", "insecure": True}
    with (
        server(folder, offered, keys=None) as there,
        sites(folder, there.session.port, tmp_path, **own) as made,
    ):
        for figures in there.rounds(2):
            assert figures["cohort"] == NAMES
        there.close()
    wanted = here(folder, offered, 2, engine=Local(chunk=1))
    for k, v in there.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6, k
    # what a site shows its own people is by the step, too
    metrics, judge = made[0].judged
    assert (
        not metrics
        and judge(made[0].joined.model, (torch.zeros(1, 6), torch.zeros(1).long()))["loss"] > 0
    )


def test_a_site_freezes_what_the_strategy_does_not_train(folder, tmp_path):
    offered = offer(FedBABU(head=("5.*",)))
    with server(folder, offered) as there, sites(folder, there.session.port, tmp_path):
        before = state_of(there.model)
        assert next(there.rounds(1))["cohort"] == NAMES
        there.close()
    now = state_of(there.model)
    assert {k for k, v in now.items() if not torch.equal(v, before[k])} == now.keys() - {
        "5.weight",
        "5.bias",
    }


def test_a_site_keeps_its_own_head_from_visit_to_visit(folder, tmp_path):
    offered = offer(FedAvg(personal=("5.*",)))
    with server(folder, offered) as there, sites(folder, there.session.port, tmp_path) as made:
        figures = [*there.rounds(3)]
        there.close()
    assert figures[0]["bytes_up"] == sum(
        2 * 4 * v.numel() for k, v in there.model.state_dict().items() if k[0] != "5"
    )
    wanted = here(folder, offered, 3, engine=Local(chunk=1, solver="general"))
    for k, v in there.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6, k
    heads = [s.client.memory["personal"]["5.weight"] for s in made]
    assert not torch.equal(*heads) and not there.own()


def test_a_site_is_given_what_never_changes_once_if_it_built_something_else(
    folder, tmp_path, monkeypatch
):
    plain = offers.Plan.build

    def build(plan):
        # weights that nobody trains differ from build to build, as those of a backbone may
        layers = torch.nn.Linear(6, 40), torch.nn.BatchNorm1d(40).eval(), torch.nn.Linear(40, 3)
        for part in layers[:2]:
            part.requires_grad_(False)
        return torch.nn.Sequential(*layers), plain(plan)[1]

    monkeypatch.setattr(offers.Plan, "build", build)
    with server(folder, offer()) as there, sites(folder, there.session.port, tmp_path):
        first, second, third = ([f, there.session.figures()] for f in there.rounds(3))
        there.close()
    assert all(f["bytes_down"] == f["bytes_up"] == 2 * 4 * 123 for f, _ in (first, second, third))
    sent = [told["site_north_bytes_sent"] for _, told in (first, second, third)]
    # the norm's weights and statistics were built alike, and are not sent
    assert 4 * 280 < sent[0] - sent[1] < 4 * (280 + 160)
    assert sent[1] == pytest.approx(sent[2], abs=64)
    wanted = here(folder, offer(), 3, engine=Local(chunk=1, solver="general"))
    for k, v in there.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6, k


def test_private_sites_are_not_asked_for_statistics_of_their_data():
    net = torch.nn.Linear(3, 2)
    net.register_buffer("filters", torch.ones(2))  # as fixed wavelets are
    params = dict(net.named_parameters())
    plain, private = (
        expected(Recipe(privacy=p), params, net) for p in (None, SampleLevel(rounds=1))
    )
    assert set(plain.buffers) == {"filters"} and not private.buffers


@pytest.mark.parametrize(
    "mode, strict", [("stacked", False), ("auto", True), ("hooks", False), ("ghost", False)]
)
def test_private_noise_is_added_at_the_sites_and_charged_there(folder, tmp_path, mode, strict):
    privacy = SampleLevel(
        noise_multiplier=1.0, rounds=2, steps=2, insecure_seed=5, mode=mode, strict=strict
    )
    offered = offer(privacy=privacy)
    with server(folder, offered, keys=None) as there:
        port = there.session.port
        options = {"credentials": "", "insecure": True, "max_epsilon": 30.0}
        with sites(folder, port, tmp_path, **options) as made:
            for _ in there.rounds(2):
                pass
            there.close()
    wanted = here(folder, offered, 2)
    for k, v in there.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6
    # the site's own book says what the server's says, and outlives the process
    assert made[0].budget.spent() == pytest.approx(there.private.ledger.spent(1e-5))
    again = SiteLedgers(tmp_path / "north", "north", 30.0, 1e-5)
    assert again.spent() == made[0].budget.spent() > 0
    again.most = again.spent() + 1e-6
    with pytest.raises(OverBudget):
        again.charge(privacy, 0, 1.0)
    assert again.spent() == made[0].budget.spent()
    (tmp_path / "north/ledger-example.jsonl").write_text("")
    with pytest.raises(ConfigError):
        SiteLedgers(tmp_path / "north", "north", 30.0, 1e-5)


def test_a_site_stops_at_its_own_budget_and_the_run_goes_on(folder, tmp_path, caplog):
    # the plan allows more than north does
    offered = offer(privacy=SampleLevel(noise_multiplier=1.0, rounds=3, steps=2, mode="stacked"))
    one = offered.privacy.planned(1.0, 1)
    with server(folder, offered) as there:
        port = there.session.port
        with (
            sites(folder, port, tmp_path, ["north"], max_epsilon=one * 1.01),
            sites(folder, port, tmp_path, ["south"]),
        ):
            failed = [f["failed"] for f in there.rounds(3)]
            there.close()
    assert failed == [{}, {"north": "budget"}, {"north": "budget"}]
    assert [f"round {k}: not done" in caplog.text for k in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 0]


def test_a_site_with_a_budget_joins_only_runs_whose_noise_it_adds(tmp_path):
    budget = SiteLedgers(tmp_path, "north", 1.0, 1e-5)
    for privacy, why in (
        (None, "no noise"),
        (ClientLevel(rounds=1), "only the server adds"),
        (SampleLevel(delta=1e-3, rounds=1), "delta"),
        (SampleLevel(insecure_seed=1, rounds=1), "known seed"),
        (SampleLevel(), "how many rounds"),
    ):
        with pytest.raises(ConfigError, match=why):
            budget.admit(Recipe(privacy=privacy), insecure=False, derived=False)
    budget.admit(Recipe(privacy=LocalDP(rounds=1)), insecure=False, derived=False)


def test_a_server_that_falls_back_to_a_checkpoint_repeats_the_rounds_bit_for_bit(folder, tmp_path):
    # the sites stay up; what they did after the checkpoint has not been, for their memory too
    offered = offer(Scaffold())
    with server(folder, offered) as first:
        address = f"127.0.0.1:{first.session.port}"
        with sites(folder, first.session.port, tmp_path):
            first.round()
            checkpoint.save(tmp_path, first.state_dict())
            first.round()
            first.session.listener.server.stop(grace=None).wait()  # gone without a word
            saved = checkpoint.load(tmp_path)
            with server(folder, offered, saved, address=address) as second:
                for _ in second.rounds(2):
                    pass
                second.close()
    assert second.round_number == 3
    wanted = here(folder, offered, 3)
    for k, v in second.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6


def line(folder, port, name, which="keys", as_name=None):
    return ServerLine(f"127.0.0.1:{port}", folder / which / (as_name or name), name, 1 << 24)


def ask(line, method, facts=None):
    try:
        return wire.decode(line.call(method, wire.encode(Message(method, facts or {})), 5))
    finally:
        line.close()


def test_a_site_without_the_right_key_is_turned_away_and_the_log_says_so(folder, caplog, capfd):
    with server(folder, offer()) as made:
        port = made.session.port
        assert ask(line(folder, port, "north"), "join").kind == "plan"
        with pytest.raises(Unreachable):  # a certificate of another authority
            ask(line(folder, port, "north", "others"), "join")
        with pytest.raises(Unreachable):  # plain text
            ask(ServerLine(f"127.0.0.1:{port}", None, "north", 1 << 24), "join")
        with pytest.raises(Unreachable):  # the server's certificate is not a site's
            ask(line(folder, port, "server"), "join")
        with caplog.at_level(logging.WARNING), pytest.raises(Refused, match="not one of this run"):
            ask(line(folder, port, "stranger"), "join")
        # claiming a name changes nothing: the certificate says who calls
        with caplog.at_level(logging.WARNING), pytest.raises(Refused, match="stranger"):
            ask(line(folder, port, "north", as_name="stranger"), "join")
    assert "turned away stranger" in caplog.text
    assert "andshake" in capfd.readouterr().err


def test_without_keys_only_loopback_is_served():
    with pytest.raises(ConfigError, match="only this machine"):
        Sites(plan=offer(), address="0.0.0.0:0").open(offer().build()[0], remotes(NAMES), Recipe())
    with pytest.raises(ConfigError, match="loss or step of their plan"):
        asked = Recipe(step=lambda model, batch: model(batch).mean())
        Sites(plan=offer(), address="127.0.0.1:0").open(offer().build()[0], remotes(NAMES), asked)
    with pytest.raises(ConfigError, match="insecure"):
        SiteConfig(name="north")


def report(made, name, change):
    """Take a task as a site would and send back what ``change`` makes of an honest report."""
    task = None
    while task is None or task.kind != "task":
        task = ask(made["line"](name), "fetch", {"run": "test"})
    state = messages.read_task(task).state
    update = messages.Released.received(
        (name,),
        {"delta": {k: torch.zeros(1, *v.shape).double() for k, v in state.items()}},
        {},
        torch.ones(1),
        {k: torch.ones(1) for k in ("train_loss", "update_norm", "examples", "visited", "steps")},
    )
    message = messages.outcome_message(
        messages.Outcome(update, [], {}),
        [name],
        run="test",
        visit=task.facts["visit"],
        round=task.facts["round"],
    )
    data = wire.encode(Message("report", *change(message.facts, message.groups)))
    telephone = made["line"](name)
    try:
        telephone.call("report", data, 10)
        return data
    finally:
        telephone.close()


def spoil_nan(facts, groups):
    first = next(iter(groups["sent/delta"].values()))
    first[0].fill_(torch.nan)
    return facts, groups


def spoil_shape(facts, groups):
    name = next(iter(groups["sent/delta"]))
    groups["sent/delta"][name] = torch.zeros(1, 2).double()
    return facts, groups


def spoil_name(facts, groups):
    groups["sent/delta"]["rows"] = torch.zeros(1, 2).double()
    return facts, groups


def spoil_round(facts, groups):
    return facts | {"round": 7}, groups


def spoil_client(facts, groups):
    return facts | {"ids": ["south"]}, groups


@pytest.mark.parametrize(
    "spoil, why",
    [
        (spoil_nan, "not finite"),
        (spoil_shape, r"\[1, 2\]"),
        (spoil_name, "'rows'"),
        (spoil_round, "another round"),
        (spoil_client, "other clients"),
    ],
)
def test_a_wrong_report_is_refused_by_name_and_the_round_goes_on(folder, spoil, why):
    with server(folder, offer()) as made:
        at = {"line": lambda name: line(folder, made.session.port, name)}
        worker = threading.Thread(target=report, args=(at, "south", lambda f, g: (f, g)))
        worker.start()
        caught = []

        def wrong():
            with pytest.raises(Refused, match=why) as e:
                report(at, "north", spoil)
            caught.append(e)

        other = threading.Thread(target=wrong)
        other.start()
        figures = made.round()
        worker.join()
        other.join()
    assert caught and figures["cohort"] == ["south"] and figures["failed"] == {"north": "refused"}


def test_replayed_late_and_oversized_messages_are_refused(folder):
    with server(folder, offer(), deadline=1.5) as made:
        at = {"line": lambda name: line(folder, made.session.port, name)}
        sent = []
        worker = threading.Thread(
            target=lambda: sent.append(report(at, "south", lambda f, g: (f, g)))
        )
        worker.start()
        figures = made.round()  # north never comes
        worker.join()
        assert figures["cohort"] == ["south"] and figures["failed"] == {"north": "absent"}
        telephone = at["line"]("south")
        with pytest.raises(Refused, match="reported before"):
            telephone.call("report", sent[0], 5)
        late = {"run": made.session.options.plan.run, "round": 10**4300 - 1}
        with pytest.raises(Refused, match=r"visit of round \? is over"):
            telephone.call("report", wire.encode(Message("report", late)), 5)
        with pytest.raises(Refused, match="larger than max"):
            telephone.call("report", bytes(made.session.limit + 1), 30)
        with pytest.raises(Refused, match="no fedtorch message"):
            telephone.call("report", b"x" * 1000, 5)
        telephone.close()


class Cable:
    """A TCP connection between site and server that can be cut."""

    def __init__(self, port):
        self.port, self.ends, self.down = port, [], 0.0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if time.monotonic() < self.down:
                    self.hang_up(near)
                    continue
                far = socket.create_connection(("127.0.0.1", self.port))
                self.ends += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self.carry, args=(a, b), daemon=True).start()

    def carry(self, a, b):
        with suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
        self.hang_up(a, b)

    def hang_up(self, *ends):
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self, seconds=0.0):
        self.down = time.monotonic() + seconds
        self.hang_up(*self.ends)
        self.ends = []


def test_a_report_outlives_a_line_that_breaks_and_is_charged_once(
    folder, tmp_path, caplog, monkeypatch
):
    privacy = SampleLevel(noise_multiplier=1.0, rounds=2, steps=2, insecure_seed=5)
    offered = offer(privacy=privacy)
    with server(folder, offered, keys=None) as there:
        cable = Cable(there.session.port)
        options = {"credentials": "", "insecure": True, "max_epsilon": 99.0}
        with (
            caplog.at_level(logging.WARNING),
            sites(folder, cable.own_port, tmp_path, ["north"], **options) as (north,),
            sites(folder, there.session.port, tmp_path, ["south"], **options),
        ):
            train = Joined.train

            def then_cut(joined, client, task):
                outcome = train(joined, client, task)
                if client.id == "north":
                    cable.cut(0.3 * task.round)
                return outcome

            monkeypatch.setattr(Joined, "train", then_cut)
            for figures in there.rounds(2):
                assert figures["cohort"] == NAMES
            there.close()
        cable.listener.close()
        cable.cut()
    assert "round 2: cannot report, trying again" in caplog.text
    assert [e.round for e in north.budget.ledgers["example"].entries] == [0, 1]
    wanted = here(folder, offered, 2)
    for k, v in there.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6


def test_a_site_is_here_while_it_calls_and_not_before(folder):
    with server(folder, offer(), keys=None) as there:
        session = there.session
        assert session._here() == []
        session.seen = {"north": time.monotonic(), "south": time.monotonic() - ALIVE_SECONDS - 1}
        assert session._here() == ["north"]


def test_a_report_has_room_for_the_weights_in_float64_and_what_a_strategy_adds(folder):
    for strategy, groups in ((FedAvg(), 1), (Scaffold(), 2)):
        with server(folder, offer(strategy), keys=None) as there:
            numbers = sum(v.numel() for v in there.model.state_dict().values())
            room = there.session.limit - there.session.header_limit - SMALL
            assert room == 8 * numbers * (groups + 1)


def test_too_few_reports_leave_the_model_as_it_was(folder):
    with server(folder, offer(), deadline=1.5, minimum=2) as made:
        before = state_of(made.model)
        at = {"line": lambda name: line(folder, made.session.port, name)}
        worker = threading.Thread(target=report, args=(at, "south", lambda f, g: (f, g)))
        worker.start()
        figures = made.round()
        worker.join()
        assert figures["failed"] == {"north": "absent", "south": "toofew"}
        assert all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())
        assert made.session.memory() == {}


def late_south(made, at, caplog):
    """North reports while south still trains; returns the round's figures."""
    taken, go = threading.Event(), threading.Event()

    def slow(facts, groups):
        taken.set()
        assert go.wait(30)
        return facts, groups

    def south():
        with pytest.raises(Refused, match="discarded"):
            report(at, "south", slow)

    threads = [threading.Thread(target=south)]
    threads.append(
        threading.Thread(target=lambda: taken.wait(30) and report(at, "north", lambda f, g: (f, g)))
    )
    for t in threads:
        t.start()
    with caplog.at_level(logging.WARNING):
        figures = made.round()
        go.set()
        for t in threads:
            t.join()
    return figures


@pytest.mark.parametrize(
    "privacy", [None, SampleLevel(noise_multiplier=1.0, rounds=2)], ids=["plain", "private"]
)
def test_over_selection_takes_the_first_and_discards_the_late_by_name(folder, caplog, privacy):
    began = time.monotonic()
    with server(folder, offer(privacy=privacy), enough=1) as made:
        at = {"line": lambda name: line(folder, made.session.port, name)}
        before = state_of(made.model)
        figures = late_south(made, at, caplog)
        assert time.monotonic() - began < 30  # and not the deadline of 60 s
        assert figures["cohort"] == ["north"] and figures["failed"] == {"south": "late"}
        assert made.session.figures()["site_south_reported"] == 0
        assert {*made.session.memory()} == {"north"}
        # both updates are all zeros, and north's alone was added
        assert all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())
        if privacy:  # who was asked has been charged, used or not
            assert [e.clients for e in made.private.ledger.entries] == [("north", "south")]
    assert "round 1 goes on without south: 1 others had reported" in caplog.text
    assert "refused a message of south: its visit of round 1 is over" in caplog.text


def test_of_reports_that_came_together_the_first_count():
    task = messages.Task({}, {}, 0, 0, 0.1)
    update = messages.Released.received(("x",), {}, {}, torch.ones(1))
    visits = [
        Assignment(n, task, taken=True, outcome=update, place=p)
        for n, p in zip("abc", (3, 1, 2), strict=True)
    ]
    visits.append(Assignment("d", task, outcome=messages.Failure("d", "error", "")))
    judged = [v.outcome for v in judge(visits, most=2, least=1, deadline=9.0)]
    assert judged[1] is update and judged[2] is update
    assert [f.kind for f in (judged[0], judged[3])] == ["late", "error"]
    assert {v.outcome.kind for v in judge(visits[:3], 2, 3, 9.0)} == {"late", "toofew"}


@pytest.mark.parametrize(
    "privacy, enough, why",
    [
        (ClientLevel(), 2, "twice the clipping norm"),
        (SampleLevel(rounds=1, strict=True), 2, "privacy.strict"),
        (None, 4, "between minimum"),
        (None, 1, "between minimum"),
    ],
)
def test_over_selection_that_would_void_a_claim_is_refused(privacy, enough, why):
    model, recipe = offer(privacy=privacy).build()
    engine = Sites(plan=offer(), address="127.0.0.1:0", minimum=2, enough=enough)
    with pytest.raises(ConfigError, match=why):
        engine.open(model, remotes("abc"), recipe)


def test_under_client_level_privacy_no_round_hangs_on_one_client(folder):
    """With a round that counts from two reports on, the second client would show by a whole update."""
    offered = offer(privacy=ClientLevel(noise_multiplier=1e-9, rounds=1, insecure_seed=1))
    three = [*NAMES, "stranger"]
    with server(folder, offered, names=three, deadline=1.5, minimum=2) as made:
        at = {"line": lambda name: line(folder, made.session.port, name)}
        worker = threading.Thread(target=report, args=(at, "south", lambda f, g: (f, g)))
        worker.start()
        figures = made.round()
        worker.join()
    assert figures["nonprivate_cohort"] == ["south"]


def test_adaptive_clipping_works_over_sites(folder, tmp_path):
    plan_ = ClientLevel(
        adaptive=AdaptiveClip(start=0.5), noise_multiplier=0.1, rounds=3, insecure_seed=1
    )
    offered, three = offer(privacy=plan_), [*NAMES, "stranger"]
    with (
        server(folder, offered, names=three, keys=None) as there,
        sites(folder, there.session.port, tmp_path, three, credentials="", insecure=True),
    ):
        for figures in there.rounds(3):
            assert figures["nonprivate_cohort"] == three
        there.close()
    wanted = here(folder, offered, 3, three)
    for k, v in there.model.state_dict().items():
        assert (wanted[k] - v).abs().max() <= 1e-6
    assert there.private.state["clip"] != 0.5


@pytest.mark.parametrize(
    "table, why",
    [
        ({"model": "os.path:join"}, "does not train"),
        ({"model": "/tmp/x.py"}, "does not train"),
        ({"model": "cnn"}, "does not train"),
        ({"loss": "os:system"}, "no loss"),
        ({"optimizer": "evil.module.Class"}, "no optimizer"),
        ({"strategy": {"name": "evil.module.Class"}}, "no strategy"),
        ({"strategy": {"name": "fedavg", "server": "evil.Class"}}, "no strategy.server"),
        ({"model": {"name": "mlp", "hidden": 10**6}}, "parameters"),
        ({"privacy": {"name": "evil.Class"}}, "no privacy"),
        ({"surprise": 1}, "surprise"),
        ({"lr": "many"}, "lr"),
    ],
)
def test_a_site_trains_only_what_it_has(table, why):
    config = SiteConfig(name="north", insecure=True, models=["mlp"], max_parameters=10**6)
    full = offers.describe(offer())
    assert accept(full, config) == offer()
    with pytest.raises(ConfigError, match=why):
        accept(full | table, config)


def test_a_site_gives_up_on_a_server_that_stays_away(folder, tmp_path):
    config = site_config(folder, 1, "north", tmp_path, patience=0.2)
    began = time.monotonic()
    made = Site(config)
    assert made.run() == 1
    made.close()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "told, why",
    [
        ({"clip": 1e-6, "noise": 1.0}, "clip is 1e-06, the plan's 1"),
        ({"clip": 1.0, "noise": 0.5}, "noise multiplier is 0.5, the plan's 1"),
        ({}, "must name clip and noise"),
    ],
)
def test_a_task_that_is_not_of_the_plan_is_refused_before_it_is_charged(
    folder, tmp_path, caplog, told, why
):
    offered = offer(privacy=SampleLevel(noise_multiplier=1.0, rounds=1))
    net, _ = offered.build()
    task = Task(snapshot(net), {}, 0, 0, 1.0, told)
    asked = messages.task_message(task, visit="0" * 32, after="", seconds=9.0)
    answers = {"join": Message("plan", {"plan": offers.describe(offered)}), "fetch": asked}
    options = {"insecure": True, "dataset": Npz(str(folder / "north.npz")), "state": str(tmp_path)}
    site = Site(SiteConfig(name="north", **options))
    site._ask = lambda method, message, seconds: wire.decode(wire.encode(answers[method]), 1 << 30)
    assert site.run() == 1
    site.close()
    assert why in caplog.text
    assert site.budget.spent() == 0


def test_a_run_that_goes_on_for_longer_tells_sites_the_noise_it_was_planned_with(tmp_path):
    saved = {"privacy": {"rounds": 3}}
    checkpoint.save(tmp_path / "checkpoints", saved | {"round": 3})
    longer = offer(privacy=SampleLevel(rounds=9))
    assert calibrated(longer, tmp_path).privacy.rounds == 3
    given = offer(privacy=SampleLevel(rounds=9, noise_multiplier=1.0))
    assert calibrated(given, tmp_path) == given
    assert calibrated(offer(), tmp_path).privacy is None


def test_a_call_that_nobody_answers_ends_after_a_while_and_is_made_again(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedtorch.sites.engine.HOLD_SECONDS", 0.2)
    offered = offer()
    ask = Message("fetch", {"run": offered.run})
    with server(folder, offered) as there:
        # before the site itself calls: its newer call would end this one at once
        began = time.monotonic()
        answer = there.session.handle("fetch", "north", wire.encode(ask))
        assert wire.decode(answer, 1000).kind == "wait"
        assert 0.15 < time.monotonic() - began < 10
        calls, end = {**there.session.newest}, time.monotonic() + 30
        with sites(folder, there.session.port, tmp_path):
            for _ in range(2):  # both have called, are told to wait, and call again
                while any(there.session.newest.get(n) is calls.get(n) for n in NAMES):
                    assert time.monotonic() < end
                    time.sleep(0.01)
                calls = {**there.session.newest}
            assert [f["cohort"] for f in there.rounds(1)] == [NAMES]
            there.close()


def test_a_site_that_knows_another_run_joins_this_one(folder, tmp_path, caplog, monkeypatch):
    # a server that was started anew while the site was up
    caplog.set_level(logging.INFO, "fedtorch.site")
    monkeypatch.setattr("fedtorch.sites.engine.HOLD_SECONDS", 0.2)
    offered, alone = offer(), ["north"]
    with (
        server(folder, offered, names=alone) as there,
        sites(folder, there.session.port, tmp_path, names=alone) as (site,),
    ):
        site.joined.plan = replace(site.joined.plan, run="one that is over")
        end = time.monotonic() + 30
        while caplog.text.count("joined run test") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert [f["cohort"] for f in there.rounds(1)] == [alone]
        there.close()
    assert site.plan.run == offered.run
    assert caplog.text.count("joined run test") == 2


@pytest.mark.parametrize("wrong", ["max_epsilon", "patience", "max_megabytes", "max_parameters"])
def test_a_site_with_a_limit_of_nothing_is_refused(wrong):
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"{wrong} must be"):
            SiteConfig(name="a", insecure=True, **{wrong: value})
