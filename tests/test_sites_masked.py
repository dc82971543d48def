"""Secure aggregation over TLS on loopback: the sums of plain rounds, and deaths in every phase."""

import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import torch

from fedtorch import ConfigError, Scaffold
from fedtorch.engines import wire
from fedtorch.engines.wire import Message
from fedtorch.privacy import DistributedDP, LocalDP
from fedtorch.run import checkpoint
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.protocol import PHASES
from fedtorch.secure.refused import Refused as Unfit
from fedtorch.secure.roster import Member
from fedtorch.secure.server import SecureServer
from fedtorch.sites import keys
from fedtorch.sites import offer as offers
from fedtorch.sites.engine import SitesSession
from fedtorch.sites.masked import MaskedSession
from fedtorch.sites.masks import Party
from fedtorch.sites.openings import Openings
from fedtorch.sites.reports import Reader
from fedtorch.sites.rpc import Listener, Refused
from fedtorch.sites.site import Site
from fedtorch.sites.sums import Sums
from fedtorch.types import Task
from tests.test_sites import here, offer, server, site_config, state_of

pytestmark = pytest.mark.timeout(120)
NAMES = ["east", "north", "south", "west"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    keys.make(folder / "keys", ["localhost", "127.0.0.1"], NAMES, 2)
    g = torch.Generator().manual_seed(0)
    for name, n in zip(NAMES, (40, 30, 20, 25), strict=True):
        x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    return folder


class Died(BaseException):
    """In place of kill -9: nothing is sent or written after it."""


class Crowd:
    """Sites at work in threads of this process; one that died may be started again."""

    def __init__(self, folder, port, state, names=NAMES, **options):
        self.folder, self.port, self.state, self.options = folder, port, state, options
        self.sites: dict[str, Site] = {}
        self.threads: dict[str, threading.Thread] = {}
        self.codes: dict[str, object] = {}
        for name in names:
            self.start(name)

    def start(self, name):
        if name in self.sites:
            self.threads[name].join()
            self.sites[name].close()
        config = site_config(self.folder, self.port, name, self.state / name, **self.options)
        made = self.sites[name] = Site(config)
        self.threads[name] = threading.Thread(target=self.work, args=(name, made))
        self.threads[name].start()
        while made.plan is None and self.threads[name].is_alive():
            time.sleep(0.005)

    def work(self, name, made):
        try:
            self.codes[name] = made.run()
        except (Died, ConfigError) as e:
            self.codes[name] = e

    def join(self):
        for name, thread in self.threads.items():
            thread.join()
            self.sites[name].close()


@contextmanager
def crowd(folder, port, state, **options):
    made = Crowd(folder, port, state, **options)
    yield made
    made.join()


@contextmanager
def federation(folder, offered, state, **options):
    with (
        server(folder, offered, names=NAMES) as there,
        crowd(folder, there.session.port, state, **options) as made,
    ):
        yield there, made
        there.close()


def received(monkeypatch):
    """Every message that a server takes, as it came."""
    found, real = [], SitesSession.handle

    def handle(self, method, site, data):
        found.append((method, site, wire.decode(data)))
        return real(self, method, site, data)

    monkeypatch.setattr(SitesSession, "handle", handle)
    return found


def known(monkeypatch, offered):
    """To read a plan out of a message takes a second for each site: here they know it."""
    monkeypatch.setattr("fedtorch.sites.site.accept", lambda table, config: offered)
    return offered


def updates(monkeypatch):
    """What each site learned in each round, in the clear: (round, site) -> its numbers."""
    found, real = {}, Party.begin

    def begin(self, update):
        numbers = torch.cat([v.flatten() for s in update.sent.values() for v in s.values()])
        found[self.task.round, update.ids[0]] = numbers
        return real(self, update)

    monkeypatch.setattr(Party, "begin", begin)
    return found


def test_the_weights_are_those_without_masks_and_no_update_arrives_in_the_clear(
    folder, tmp_path, monkeypatch
):
    came, own = received(monkeypatch), updates(monkeypatch)
    offered = offer(Scaffold(), aggregator=Secure())
    with federation(folder, offered, tmp_path) as (there, made):
        figures = [*there.rounds(3)]
    assert [*made.codes.values()] == [0] * 4
    wanted = here(folder, offer(Scaffold(weighting="uniform")), 3, NAMES)
    for k, v in there.model.state_dict().items():
        assert (wanted[k].double() - v.double()).abs().max() <= 1e-9, k
    told = figures[-1]
    assert told["cohort"] == NAMES and told["failed"] == {} and told["examples"] == 89
    assert not told.keys() & {"update_norm", "client_loss_max", "cosine_to_mean"}

    # in all that arrived: five reports of each site a round, and no number of its update or figures in any
    reports = [(s, m) for method, s, m in came if method == "report"]
    assert len(reports) == 3 * 4 * 5 and len(own) == 12
    for site, message in reports:
        assert not {"ids", "failures", "metrics"} & message.facts.keys()
        assert all(g.startswith("secure") for g in message.groups)
        if message.facts["phase"] == "masked":
            vector = message.groups["secure"]["vector"]
            plain = own[message.facts["round"], site]
            assert vector.dtype == torch.int64 and len(vector) == len(plain) + 4
            assert not torch.isin(vector[:-4], torch.round(plain * 2**40).long()).any()
            # as words under a mask they are anywhere in 64 bits, where updates of this size are below 2^41
            assert (vector.abs() > 2**50).double().mean() > 0.99
    calls = [m for method, _, m in came if method != "report"]
    assert all(not m.groups for m in calls)


def test_noise_of_each_site_is_under_its_mask_and_half_words_do(folder, tmp_path, monkeypatch):
    came, own = received(monkeypatch), updates(monkeypatch)
    privacy = LocalDP(noise_multiplier=1.0, rounds=1)
    offered = known(monkeypatch, offer(privacy=privacy, aggregator=Secure(width=32, range=50.0)))
    with federation(folder, offered, tmp_path, max_epsilon=60.0) as (there, made):
        before = state_of(there.model)
        (figures,) = there.rounds(1)
        assert "clamped" not in there.session.figures()
    assert moved(there.model, before, own, 0, NAMES) <= 1e-6
    assert not figures.keys() & {"train_loss", "nonprivate_train_loss", "examples"}
    vectors = [m.groups["secure"]["vector"] for _, _, m in came if m.facts.get("phase") == "masked"]
    assert len(vectors) == 4 and all(v.dtype == torch.int32 for v in vectors)
    spent = {made.sites[n].budget.spent() for n in NAMES}
    assert spent == {there.private.ledger.spent(1e-5)}


def test_shares_of_the_noise_are_summed_under_masks(folder, tmp_path, monkeypatch):
    came, own = received(monkeypatch), updates(monkeypatch)
    privacy = DistributedDP(epsilon=8.0, rounds=1)
    bare = offer(privacy=privacy, aggregator=Secure(width=32))
    with server(folder, bare, names=NAMES) as there:
        placed = there.session.options.plan
        assert placed.privacy == there.recipe.privacy
        assert (placed.privacy.clients, placed.privacy.shares) == (4, 3)
    assert offers.read(offers.describe(placed), ["mlp"]).privacy == placed.privacy
    known(monkeypatch, placed)
    with federation(folder, placed, tmp_path, max_epsilon=8.0, require_secure=True) as (
        there,
        made,
    ):
        before = state_of(there.model)
        (figures,) = there.rounds(1)
    assert moved(there.model, before, own, 0, NAMES) <= 1e-6
    whole = own[0, "east"] * placed.privacy.resolution
    assert torch.equal(whole, whole.round()) and whole.std() > 1000
    assert not figures.keys() & {"train_loss", "nonprivate_train_loss", "examples"}
    vectors = [m.groups["secure"]["vector"] for _, _, m in came if m.facts.get("phase") == "masked"]
    assert len(vectors) == 4 and all(v.dtype == torch.int32 for v in vectors)
    assert {made.sites[n].budget.spent() for n in NAMES} == {there.private.ledger.spent(1e-5)}


def test_terms_with_fewer_honest_shares_than_the_noise_is_made_for_are_refused(folder):
    plan = DistributedDP(epsilon=8.0, rounds=1, colluding=1).placed(4, 4, 155)
    model, recipe = offer(privacy=plan, aggregator=Secure(width=32)).build()
    sums = Sums(Reader.of(recipe, model, 100), recipe.aggregator)
    members = tuple(Member(n, bytes([k]) * 32) for k, n in enumerate(NAMES))
    task = Task(state_of(model), {}, 0, 0, 0.1, {"clip": 1.0, "noise": 1.0})
    assert sums.terms("test", bytes(16), members, 4, task).scale == plan.resolution
    with pytest.raises(Unfit, match="honest shares"):
        sums.terms("test", bytes(16), members, 3, task)


def moved(model, before, own, number, cohort):
    """How far the model's step is from the mean of what these sites learned."""
    now = state_of(model)
    step = torch.cat([(now[k].double() - before[k].double()).flatten() for k in now])
    return float((step - torch.stack([own[number, n] for n in cohort]).mean(0)).abs().max())


def test_a_site_may_die_in_any_phase_and_is_back_in_the_next_round(
    folder, tmp_path, monkeypatch, caplog
):
    own, at = updates(monkeypatch), {}
    begin, go_on = Party.begin, Party.go_on

    def dies(party, phase):
        if (party.masks.own.name, phase) == ("west", at.get("phase")):
            del at["phase"]
            raise Died

    def begun(self, update):
        dies(self, "keys")
        return begin(self, update)

    def gone_on(self, message):
        dies(self, self.half.phase)
        return go_on(self, message)

    monkeypatch.setattr(Party, "begin", begun)
    monkeypatch.setattr(Party, "go_on", gone_on)
    offered = known(monkeypatch, offer(aggregator=Secure()))
    with federation(folder, offered, tmp_path) as (there, made):
        before = state_of(there.model)
        for number, phase in enumerate(PHASES[:-1]):
            at["phase"] = phase
            again = threading.Thread(target=made.start, args=("west",))
            again.start()  # waits for it to die
            figures = there.round()
            again.join()
            # who had sent its masked vector is in the sum; who had sent no keys does the visit again
            gone = phase in ("shares", "masked")
            cohort = NAMES[:3] if gone else NAMES
            assert figures["cohort"] == cohort, phase
            assert figures["failed"] == ({"west": "late"} if gone else {})
            assert moved(there.model, before, own, number, cohort) <= 1e-6, phase
            before = state_of(there.model)
    assert "it was started again before it had sent shares" in caplog.text
    kept = Openings(tmp_path / "north").runs["test"]
    assert [len(who) for _, who in kept] == [4, 3, 3, 4, 4]


def test_a_server_may_die_in_any_phase_and_goes_on(folder, tmp_path, monkeypatch):
    real, at = SecureServer.close, {}
    offered = known(monkeypatch, offer(Scaffold(), aggregator=Secure()))

    def close(self):
        if self.phase == at.get("phase"):
            raise Died
        return real(self)

    monkeypatch.setattr(SecureServer, "close", close)
    monkeypatch.setattr("fedtorch.sites.site._pause", lambda times: time.sleep(0.05))
    channel, soon = grpc.secure_channel, [("grpc.initial_reconnect_backoff_ms", 100)]
    monkeypatch.setattr(grpc, "secure_channel", lambda a, c, options: channel(a, c, options + soon))
    with ExitStack() as held:
        last = held.enter_context(server(folder, offered, names=NAMES))
        address = f"127.0.0.1:{last.session.port}"
        with crowd(folder, last.session.port, tmp_path) as made:
            last.round()
            checkpoint.save(tmp_path, last.state_dict())
            for phase in PHASES[:-1]:
                at["phase"] = phase
                with pytest.raises(Died):
                    last.round()
                last.session.listener.server.stop(None).wait()  # gone without a word
                last.session.seen.clear()
                saved = checkpoint.load(tmp_path)
                last = held.enter_context(
                    server(folder, offered, saved, names=NAMES, address=address)
                )
            at.clear()
            assert [f["failed"] for f in last.rounds(2)] == [{}, {}]
            last.close()
    assert [*made.codes.values()] == [0] * 4
    wanted = here(folder, offer(Scaffold(weighting="uniform")), 3, NAMES)
    for k, v in last.model.state_dict().items():
        assert (wanted[k].double() - v.double()).abs().max() <= 1e-9, k
    for name in NAMES:
        kept = Openings(tmp_path / name).runs["test"]
        assert kept == [(k, frozenset(NAMES)) for k in range(3)]


@pytest.mark.parametrize(
    "options, names, rule, why",
    [
        ({"keys": None}, NAMES, Secure(), "needs --credentials"),
        ({"enough": 3, "minimum": 3}, NAMES, Secure(), "over-selection"),
        ({}, NAMES[:2], Secure(), "3"),
        ({}, NAMES, Secure(neighbours=2), "neighbours is for simulations"),
    ],
    ids=["keys", "enough", "few", "neighbours"],
)
def test_a_run_that_could_never_be_secure_is_refused_before_it_listens(
    folder, monkeypatch, options, names, rule, why
):
    monkeypatch.setattr(Listener, "__init__", lambda *args: pytest.fail("it listens"))
    with (
        pytest.raises(ConfigError, match=why),
        server(folder, offer(aggregator=rule), names=names, **options),
    ):
        pass


def test_too_few_sites_are_waited_for_and_then_named(folder, tmp_path, monkeypatch, caplog):
    offered = known(monkeypatch, offer(aggregator=Secure(phase_seconds=0.2)))
    with federation(folder, offered, tmp_path) as (there, _):
        assert there.session.needed == 3  # of four
        monkeypatch.setattr(there.session, "_here", lambda: NAMES[:2])
        figures = there.round()
        assert figures["failed"] == {n: "absent" if n in NAMES[2:] else "toofew" for n in NAMES}
        assert there.nobody and not there.moved()
        monkeypatch.undo()
        assert there.round()["cohort"] == NAMES
    assert "2 sites are there, and 3 are needed" in caplog.text


def test_an_update_in_the_clear_and_a_masked_one_too_late_are_refused(
    folder, tmp_path, monkeypatch
):
    offered, said = known(monkeypatch, offer(aggregator=Secure())), []
    send = Site._send

    def sends(self, message, round):
        if self.config.name == "west" and message.facts.get("phase") == "masked":
            line = self.line.call
            bare = {k: v for k, v in message.facts.items() if k != "phase"}
            for facts in (
                bare | {"ids": ["west"]},
                message.facts | {"phase": "open"},
                message.facts,
            ):
                with pytest.raises(Refused) as e:
                    line("report", wire.encode(Message("report", facts, message.groups)), 5)
                said.append(str(e.value))
            return
        send(self, message, round)

    monkeypatch.setattr(Site, "_send", sends)
    with federation(folder, offered, tmp_path) as (there, _):
        assert there.round()["failed"] == {"west": "refused"}
    assert "not masked" in said[0] and "is over" in said[1] and "is over" in said[2]


def test_a_call_that_a_dead_process_left_open_speaks_for_nobody(folder, tmp_path, monkeypatch):
    # it asks by no visit, and would be taken for a process that has lost its keys
    offered, opened = known(monkeypatch, offer(aggregator=Secure())), threading.Event()
    begin, send, answers, stale = Party.begin, Site._send, [], []

    def begun(self, update):
        if self.masks.own.name == "south":
            opened.wait(10)
            while newest.get("west") is stale[0]:  # until west itself has asked again
                time.sleep(0.01)
        return begin(self, update)

    def sent(self, message, round):
        send(self, message, round)
        if self.config.name == "west" and not opened.is_set():
            before = newest.get("west")
            old.start()
            while newest.get("west") is before:  # until the old call is open
                time.sleep(0.01)
            stale.append(newest["west"])
            opened.set()

    monkeypatch.setattr(Party, "begin", begun)
    monkeypatch.setattr(Site, "_send", sent)
    with federation(folder, offered, tmp_path) as (there, _):
        left, newest = wire.encode(Message("fetch", {"run": "test"})), there.session.newest

        def call():
            answers.append(wire.decode(there.session.handle("fetch", "west", left)).kind)

        old = threading.Thread(target=call)
        assert there.round()["failed"] == {}
        old.join()
    assert answers == ["wait"]


def test_just_as_many_as_must_be_are_enough_to_close_the_sum():
    half = SimpleNamespace(phase="masked", waiting={1}, late={2}, close=lambda: "unmask")
    attempt = SimpleNamespace(
        half=half, terms=SimpleNamespace(members=range(5)), names=NAMES, down=None
    )
    session = SimpleNamespace(least=3, change=threading.Condition())
    with session.change:
        MaskedSession._close(session, attempt)
        assert attempt.down == "unmask"
        session.least = 4
        with pytest.raises(Unfit, match="3 sites sent a masked update, and minimum is 4"):
            MaskedSession._close(session, attempt)
