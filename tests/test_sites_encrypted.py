"""Sums under homomorphic encryption over TLS on loopback: the plain mean, and a server that cannot read."""

import shutil
import struct
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch

from fedtorch import HE, ConfigError, FedAvg, seeds
from fedtorch import __main__ as program
from fedtorch.data import Npz
from fedtorch.engines import wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.run import checkpoint
from fedtorch.secure import he
from fedtorch.secure.encryption import Adder
from fedtorch.secure.refused import Refused as Unfit
from fedtorch.sites import letters, sealed
from fedtorch.sites.engine import SitesSession
from fedtorch.sites.masks import HARMLESS
from fedtorch.sites.openings import ENCRYPTED, Openings
from fedtorch.sites.reports import Reader
from fedtorch.sites.sealed import Sealing, Vector, read_secret
from fedtorch.sites.site import Site
from fedtorch.types import Released, Task
from tests.test_sites import here, offer, server, site_config, sites
from tests.test_sites_masked import Crowd, Died

pytestmark = pytest.mark.timeout(120)
NAMES = ["east", "north", "west"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    argv = [str(folder / "keys"), "--server", "localhost,127.0.0.1", "--sites", ",".join(NAMES)]
    assert program.main(["keys", *argv, "--he"]) == 0
    g = torch.Generator().manual_seed(0)
    for name, n in zip(NAMES, (40, 30, 20), strict=True):
        x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    return folder


@pytest.fixture(autouse=True)
def own_key(monkeypatch, folder):
    """Each site reads its own file, and no process of a federation makes a key."""
    monkeypatch.setattr(he, "_keys", None)


def test_the_secret_is_for_sites_alone_and_for_later_ones_the_same(folder, tmp_path):
    for name in (*NAMES, "ca"):
        assert (folder / "keys" / name / "he.secret").stat().st_mode & 0o777 == 0o600
    assert not (folder / "keys/server/he.secret").exists()
    data = {(folder / "keys" / n / "he.secret").read_bytes() for n in NAMES}
    assert len(data) == 1
    assert sealed.make(folder / "keys", NAMES) == []
    with pytest.raises(ConfigError, match="must never have"):
        sealed.read_public(folder / "keys/east/he.secret")
    with pytest.raises(ConfigError, match="--he-public FILE"):
        sealed.read_public(None)


def federation(folder, state, offered, **options):
    public = folder / "keys/server/he.public"
    return server(folder, offered, names=NAMES, public=public, **options)


def crowd(folder, there, state):
    return sites(folder, there.session.port, state, NAMES)


def test_the_model_is_that_of_the_plain_mean_and_nothing_arrives_that_the_server_can_read(
    folder, tmp_path, monkeypatch
):
    came, real = [], SitesSession.handle

    def handle(self, method, site, data):
        came.append((method, wire.decode(data)))
        return real(self, method, site, data)

    monkeypatch.setattr(SitesSession, "handle", handle)
    offered = offer(aggregator=HE())
    with federation(folder, tmp_path, offered) as there, crowd(folder, there, tmp_path):
        figures = [*there.rounds(2)]
        told = there.session.figures()
        adder = there.session.adder
        there.close()
    wanted = here(folder, offer(FedAvg(weighting="uniform")), 2, NAMES)
    for k, v in there.model.state_dict().items():
        assert (wanted[k].double() - v.double()).abs().max() <= 1e-6, k
    trained = sum(len(Npz(str(folder / f"{n}.npz")).load(0).train) for n in NAMES)
    assert figures[-1]["cohort"] == NAMES and figures[-1]["examples"] == trained
    assert told["site_north_bytes_received"] > 60_000
    assert not any(v.is_private() for v in vars(adder).values())
    phases = [m.facts.get("phase") for method, m in came if method == "report"]
    assert sorted(phases) == ["open"] * 2 + ["sealed"] * 6
    for _, message in came:
        assert "metrics" not in message.groups and all(g == "secure" for g in message.groups)


def lies(reply):
    reply.groups["secure"]["values"][-4] += 1  # as with another key
    return reply


def declines(reply):
    raise Unfit("few", "too few")


def stalls(reply):
    time.sleep(1.2)  # as good as dead
    return reply


@pytest.mark.parametrize("fails", [lies, declines, stalls])
def test_a_round_whose_opener_fails_is_lost_and_the_next_is_opened_by_another(
    folder, tmp_path, monkeypatch, caplog, fails
):
    real, failed = Sealing.go_on, []

    def go_on(self, message):
        if failed:
            return real(self, message)
        failed.append(self.visit)
        return fails(real(self, message))

    monkeypatch.setattr(Sealing, "go_on", go_on)
    plan = offer(aggregator=HE(phase_seconds=1.0 if fails is stalls else 30.0))
    monkeypatch.setattr("fedtorch.sites.site.accept", lambda table, config: plan)
    with federation(folder, tmp_path, plan) as there, crowd(folder, there, tmp_path):
        before = [v.clone() for v in there.model.state_dict().values()]
        lost = there.round()
        after = [*there.model.state_dict().values()]
        assert lost["failed"] == dict.fromkeys(NAMES, "toofew")
        assert all(map(torch.equal, before, after))
        assert there.round()["cohort"] == NAMES
        there.close()
    assert "no sum was opened: east did not open the sum" in caplog.text
    kept = [Openings(tmp_path / name).runs for name in NAMES]
    assert all(k["test" + ENCRYPTED] == [(0, {"east"}), (1, {"north"})] for k in kept)
    assert [k.get("test") for k in kept] == [[(0, {*NAMES})], [(1, {*NAMES})], None]


def test_a_site_may_die_before_it_seals_and_when_it_opens(folder, tmp_path, monkeypatch):
    at = {("west", 0, "begin"), ("north", 1, "go_on")}

    def dies(where):
        real = getattr(Sealing, where)

        def step(self, message):
            if (self.name, self.task.round, where) in at:
                at.remove((self.name, self.task.round, where))
                raise Died
            return real(self, message)

        monkeypatch.setattr(Sealing, where, step)

    dies("begin")
    dies("go_on")
    plan = offer(aggregator=HE())
    monkeypatch.setattr("fedtorch.sites.site.accept", lambda table, config: plan)
    with federation(folder, tmp_path, plan) as there:
        made = Crowd(folder, there.session.port, tmp_path, NAMES)
        for name, failed in (("west", {}), ("north", dict.fromkeys(NAMES, "toofew")), (None, {})):
            again = threading.Thread(target=made.start, args=(name,)) if name else None
            if again:
                again.start()  # waits for it to die
            assert there.round()["failed"] == failed
            if again:
                again.join()
        there.close()
        made.join()
    assert not at and [*made.codes.values()] == [0] * 3


def test_a_server_may_die_before_and_after_a_sum_is_opened(folder, tmp_path, monkeypatch):
    add, unseal, at = Adder.add, Vector.unseal, {}

    def dies(where, real):
        def step(*args):
            if at.pop(where, None):
                raise Died
            return real(*args)

        return step

    plan = offer(aggregator=HE())
    monkeypatch.setattr("fedtorch.sites.site.accept", lambda table, config: plan)
    monkeypatch.setattr(Adder, "add", dies("add", add))
    monkeypatch.setattr(Vector, "unseal", dies("unseal", unseal))
    monkeypatch.setattr("fedtorch.sites.site._pause", lambda times: time.sleep(0.05))
    channel, soon = grpc.secure_channel, [("grpc.initial_reconnect_backoff_ms", 100)]
    monkeypatch.setattr(grpc, "secure_channel", lambda a, c, options: channel(a, c, options + soon))
    with ExitStack() as held:
        last = held.enter_context(federation(folder, tmp_path, plan))
        address = f"127.0.0.1:{last.session.port}"
        made = Crowd(folder, last.session.port, tmp_path, NAMES)
        last.round()
        checkpoint.save(tmp_path, last.state_dict())
        for where in ("add", "unseal"):
            at[where] = True
            with pytest.raises(Died):
                last.round()
            last.session.listener.server.stop(None).wait()  # gone without a word
            last.session.seen.clear()
            saved = checkpoint.load(tmp_path)
            again = {"memory": saved, "address": address}
            last = held.enter_context(federation(folder, tmp_path, plan, **again))
        assert [f["failed"] for f in last.rounds(2)] == [{}, {}]
        last.close()
        made.join()
    wanted = here(folder, offer(FedAvg(weighting="uniform")), 3, NAMES)
    for k, v in last.model.state_dict().items():
        assert (wanted[k].double() - v.double()).abs().max() <= 2e-6, k
    assert [Openings(tmp_path / n).runs["test"] for n in NAMES] == [
        [(k, {*NAMES})] for k in range(3)
    ]


def test_what_a_server_of_before_had_asked_for_is_let_go(folder, tmp_path):
    late = {"run": "test", "phase": "sealed", "visit": "0" * 32, "round": 3}
    with federation(folder, tmp_path, offer(aggregator=HE())) as there:
        for facts in (late, late | {"phase": "open"}):
            with pytest.raises(MessageError, match="its visit of round 4 is over"):
                there.session._report("east", Message("report", facts), 9)


def test_a_site_without_a_key_says_so(folder, tmp_path):
    offered = offer(aggregator=HE())
    with federation(folder, tmp_path, offered) as there:
        bare = tmp_path / "keys"
        shutil.copytree(folder / "keys/east", bare, ignore=shutil.ignore_patterns("he.*"))
        own = {"credentials": str(bare)}
        made = Site(site_config(folder, there.session.port, "east", tmp_path / "east", **own))
        with pytest.raises(ConfigError, match="this site has no key: --he-secret FILE"):
            made.run()
        made.close()


SAID = {"asked": 3, "least": 3, "attempt": "00" * 16, "opener": "east"}


class Party:
    """One site in a round of its own making; what an honest or a hostile server makes of it is below."""

    def __init__(self, folder, state, name, start=0.0, **said):
        self.name = name
        state.mkdir(exist_ok=True)
        with seeds.seeded(1):
            model, recipe = offer(aggregator=HE()).build()
        recipe = replace(recipe, strategy=recipe.strategy.prepare(model))
        reader = Reader.of(recipe, model, 0)
        params = {k: v.detach() for k, v in model.named_parameters()}
        given = {k: v + start for k, v in params.items()}
        self.params, task = params, Task(given, {}, said.pop("round", 0), 1, 0.1)
        key = read_secret(site_config(folder, 1, name, state))[1].hex()
        message = Message("task", {"visit": "0" * 32, "he": SAID | {"key": key} | said})
        config = site_config(folder, 1, name, state)
        openings = Openings(state)
        self.part = Sealing(config, openings, reader, message, "test", task)

    def sealed(self, value):
        ones = {k: torch.full((1, *v.shape), value).double() for k, v in self.params.items()}
        figures = {"examples": torch.tensor([9.0]), "train_loss": torch.tensor([1.0])}
        sent = Released.received(
            (self.name,), {"delta": ones}, {}, torch.ones(1), metrics=figures, summed=False
        )
        message = self.part.begin(sent)
        return letters.read_blocks(message, self.part.vector.blocks)

    def opens(self, code, names=NAMES):
        facts = {"visit": "0" * 32, "phase": "open", "sites": [*names]}
        return self.part.go_on(Message("phase", facts, letters.blocks(code)))


def parties(folder, tmp_path, names=NAMES, **said):
    return [Party(folder, tmp_path / n, n, **said) for n in names]


def test_the_sum_of_who_is_named_is_opened_once(folder, tmp_path):
    public, _ = sealed.read_public(folder / "keys/server/he.public")
    made = parties(folder, tmp_path)
    codes = [p.sealed(k + 1.0) for k, p in enumerate(made)]
    code = public.add(codes)
    values = made[0].opens(code).groups["secure"]["values"]
    assert len(values) == made[0].part.vector.size  # the tags stay at the site
    assert (values[:-4] - 6).abs().max() < 1e-6 and made[0].part.done
    assert Openings(tmp_path / "east").runs["test"] == [(0, {*NAMES})]
    with pytest.raises(MessageError, match="for 'east' to open"):
        made[1].opens(code)


def added(public, codes, vector):
    """Numbers of the server's own: one update, and what makes it look like a sum of three."""
    own = np.zeros(vector.whole)
    own[vector.size - 4] = 2.0
    return public.add([codes[0], public.encrypt(own)]), NAMES


@pytest.mark.parametrize(
    "forged",
    [
        added,
        lambda public, codes, vector: (codes[0], NAMES),
        lambda public, codes, vector: (public.add(codes[:2] + codes[:1]), NAMES),
        lambda public, codes, vector: (public.add([*codes, codes[1]]), NAMES),
        lambda public, codes, vector: (public.add(codes), ["east", "north", "invented"]),
        lambda public, codes, vector: (public.encrypt(np.zeros(vector.whole)), NAMES),
    ],
    ids=["server's own", "one alone", "one twice", "four", "other names", "nothing"],
)
def test_a_sum_that_is_not_of_who_is_named_is_not_opened(folder, tmp_path, forged):
    public, _ = sealed.read_public(folder / "keys/server/he.public")
    made = parties(folder, tmp_path)
    code, names = forged(public, [p.sealed(1.0) for p in made], made[0].part.vector)
    with pytest.raises(Unfit, match="is not the sum of what") as e:
        made[0].opens(code, names)
    assert e.value.kind in HARMLESS and not made[0].part.done
    assert "test" not in Openings(tmp_path / "east").runs


@pytest.mark.parametrize(
    "other",
    [{"start": 1e-6}, {"round": 1}, {"attempt": "11" * 16}, {"opener": "west"}],
    ids=["model", "round", "attempt", "opener"],
)
def test_a_site_that_was_told_something_else_is_in_no_sum_with_the_others(folder, tmp_path, other):
    public, _ = sealed.read_public(folder / "keys/server/he.public")
    made = parties(folder, tmp_path, NAMES[:2])
    made += parties(folder, tmp_path, NAMES[2:], **other)
    code = public.add([p.sealed(1.0) for p in made])
    with pytest.raises(Unfit, match="another key or another model"):
        made[0].opens(code)


def test_a_round_done_again_opens_no_other_list_and_has_no_other_opener(folder, tmp_path):
    public, _ = sealed.read_public(folder / "keys/server/he.public")
    names = [*NAMES, "south"]  # has no folder of keys: the secret is one
    shutil.copytree(folder / "keys/east", folder / "keys/south", dirs_exist_ok=True)
    shutil.copy(folder / "east.npz", folder / "south.npz")
    first = parties(folder, tmp_path, names, asked=4)
    first[0].opens(public.add([p.sealed(1.0) for p in first]), names)
    again = parties(folder, tmp_path, names, asked=4, attempt="11" * 16)
    codes = [p.sealed(1.0) for p in again]
    with pytest.raises(Unfit, match="the lists of sites differ by 1"):
        again[0].opens(public.add(codes[:3]), names[:3])
    third = parties(folder, tmp_path, names, asked=4, attempt="22" * 16)
    third[0].opens(public.add([p.sealed(1.0) for p in third]), names)
    other = Party(folder, tmp_path / "north", "north", opener="west", attempt="33" * 16)
    assert other.part.declined == "round 1 is done again, and east was to open its sum, not west"
    later = Party(folder, tmp_path / "north", "north", round=2)
    later.sealed(1.0)
    back = Party(folder, tmp_path / "north", "north", round=1)
    assert "round 2 was passed over" in back.part.declined


def test_a_sum_of_too_few_or_of_one_twice_is_not_opened(folder, tmp_path):
    public, _ = sealed.read_public(folder / "keys/server/he.public")
    made = parties(folder, tmp_path)
    codes = [p.sealed(1.0) for p in made]
    for names in (NAMES[:2], ["east", "north", "north"]):
        with pytest.raises(Unfit, match="of 2 sites, and 3 are due"):
            made[0].opens(public.add(codes), names)
    with pytest.raises(MessageError, match="does not say whose"):
        made[0].part.go_on(
            Message("phase", {"visit": "0" * 32, "phase": "open"}, letters.blocks(codes[0]))
        )
    with pytest.raises(MessageError, match="no ciphertext"):
        made[0].opens([b"\x0a\x01\x05"])


def test_an_update_that_is_not_finite_is_not_sealed(folder, tmp_path):
    (made,) = parties(folder, tmp_path, NAMES[:1])
    with pytest.raises(Unfit, match="not finite"):
        made.sealed(float("nan"))


@pytest.mark.parametrize(
    ("said", "error", "why"),
    [
        ({"key": "00"}, ConfigError, "not of the pair"),
        ({"least": 2}, MessageError, "a sum of 2 to 3 sites"),
        ({"asked": 2}, MessageError, "a sum of 3 to 2 sites"),
        ({"asked": 10**9}, MessageError, "1000000000 sites"),
        ({"asked": True}, MessageError, "how many are in its sum"),
        ({"attempt": "x" * 32}, MessageError, "which site opens"),
        ({"opener": None}, MessageError, "which site opens"),
    ],
    ids=["another pair", "two", "fewer asked", "too many", "no number", "no attempt", "no opener"],
)
def test_a_site_has_no_part_in_rounds_that_are_none(folder, tmp_path, said, error, why):
    with pytest.raises(error, match=why):
        Party(folder, tmp_path, "east", **said)


def test_least_peers_holds_whatever_the_opener_would_take(folder, tmp_path):
    message = Message("task", {"visit": "0" * 32, "he": SAID})
    config = site_config(folder, 1, "east", tmp_path, least_peers=3)
    with pytest.raises(
        ConfigError, match=r"as few as 2 other sites.*least_peers is 3: let the server"
    ):
        Sealing(config, None, None, message, "test", None)


def test_a_ciphertext_that_cannot_be_added_is_refused_before_it_is(folder):
    adder, _ = sealed.read_public(folder / "keys/server/he.public")
    code = adder.encrypt(np.ones(9))
    adder.look(code, 9)
    # an envelope with nothing in it, or of another scale, the library takes, and falls over it later
    empty, scale = code[0][:3], code[0][:-8] + struct.pack("<d", 2.0**20)
    other = code[0][:3] + b"\x2a" + code[0][4:]
    for bad, size in (
        *((code, 8), ([b"x" * 100], 9), ([code[0][:-5]], 9), ([b""], 9)),
        *(([empty], 9), ([scale], 9), ([other], 9), (code, 0)),
    ):
        with pytest.raises(ConfigError, match="no ciphertext"):
            adder.look(bad, size)
