"""A site's half of secure aggregation, against servers that lie: each lie is refused by its name."""

import logging
from dataclasses import replace

import pytest
import torch

from fedtorch.data.base import facts_of
from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.protocol import PHASES, Roll, Survivors
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import Member
from fedtorch.secure.server import SecureServer
from fedtorch.sites import keys
from fedtorch.sites import offer as plans
from fedtorch.sites.masked import Attempt
from fedtorch.sites.masks import HARMLESS, Masks, Party
from fedtorch.sites.openings import Openings
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.reports import Reader
from fedtorch.sites.sums import Sums, check_apart
from fedtorch.types import ConfigError, Released, Task

NAMES = ["north", "south", "east", "west"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    keys.make(folder, ["localhost"], [*NAMES, "ghost"], 2)
    keys.make(folder / "again", ["localhost"], ["south"], 2)
    return folder


def offered(**changes) -> plans.Plan:
    options = {"model": "logistic", "facts": facts_of((6,), 3, "classification")}
    return plans.Plan(run="r", **options | {"aggregator": Secure()} | changes)


def sums(**changes) -> Sums:
    plan = offered(**changes)
    model, recipe = plan.build()
    torch.manual_seed(0)
    return Sums(Reader.of(recipe, model, 10**6), plan.aggregator)


def task(shared: Sums, **changes) -> Task:
    state = {"1.weight": torch.ones(3, 6), "1.bias": torch.zeros(3)}
    return Task(**{"state": state, "extras": {}, "round": 4, "seed": 1, "lr": 0.1} | changes)


def update(k: int, shared: Sums) -> Released:
    g = torch.Generator().manual_seed(k)
    sent = {"1.weight": torch.randn(1, 3, 6, generator=g), "1.bias": torch.randn(1, 3, generator=g)}
    told = {"examples": torch.tensor([10.0 + k]), "train_loss": torch.tensor([0.5 * k])}
    sent = {"delta": {n: v.double() for n, v in sent.items()}}
    return Released.received((NAMES[k],), sent, {}, torch.ones(1), told)


class Federation:
    """Four sites and a server, message by message; ``lie`` may change what the server sends to one."""

    def __init__(
        self,
        folder,
        state,
        shared=None,
        names=NAMES,
        lie=lambda phase, to, message: message,
        **options,
    ):
        self.folder, self.state, self.shared = folder, state, shared or sums()
        self.names, self.lie, self.options = [*names], lie, options
        self.refused: dict[str, Exception] = {}
        self.masks = {n: self.site(n) for n in self.names if n != "ghost"}

    def site(self, name) -> Masks:
        place = self.state / name
        place.mkdir(exist_ok=True)
        own = str(self.folder / name)
        config = SiteConfig(name=name, credentials=own, state=str(place), **self.options)
        return Masks(config, Openings(place))

    def begin(self, attempt=b"\x01" * 16, threshold=None, **changes) -> None:
        """Everybody is sent the task."""
        pems = {n: (self.folder / n / "cert.pem").read_bytes() for n in self.names}
        members = [Member(n, bytes.fromhex(keys.fingerprint(p))) for n, p in pems.items()]
        self.task = task(self.shared, **changes)
        needed = threshold or self.shared.secure.needed(len(members))
        self.attempt = Attempt(self.shared.terms("r", attempt, members, needed, self.task), pems)
        self.parties = {}
        for name in self.masks:
            facts = letters_facts(self.attempt) | {"visit": name.encode().hex().ljust(32, "0")}
            message = self.carry("task", name, messages.task_message(self.task, **facts))
            self.tried(name, lambda n=name, m=message: self.parties.update({n: self.party(n, m)}))

    def party(self, name, message) -> Party:
        own = replace(self.shared, reader=self.shared.reader)
        return Party(self.masks[name], own, message, "r", messages.read_task(message))

    def phase(self, silent=()) -> None:
        """One phase of those that are still in it; ``silent`` do not answer."""
        phase = self.attempt.half.phase
        for name, party in [*self.parties.items()]:
            if name in {*silent, *self.refused} or not self.attempt.waits_for(name):
                continue
            if phase == "keys":
                k = NAMES.index(name)
                made = self.tried(name, lambda p=party, k=k: p.begin(update(k, self.shared)))
            else:
                message = self.carry(phase, name, self.attempt.message(Visit(name, party.visit)))
                made = self.tried(name, lambda p=party, m=message: p.go_on(m))
            if made is not None:
                self.attempt.take(name, wire.decode(wire.encode(made)))
        self.attempt.down = self.attempt.half.close()

    def run(self, **silent) -> Released:
        """All phases, then the sum."""
        for phase in PHASES[:-1]:
            self.phase(silent.get(phase, ()))
        half = self.attempt.half
        ids = [self.names[k] for k in half.survivors]
        return self.shared.unseal(self.attempt.terms, half.sum(), ids, self.task)

    def carry(self, phase, to, message) -> Message:
        return wire.decode(wire.encode(self.lie(phase, to, message)))

    def tried(self, name, do):
        try:
            return do()
        except (Refused, MessageError, ConfigError) as e:
            self.refused[name] = e
            return None


def letters_facts(attempt):
    from fedtorch.sites import letters

    return letters.terms_facts(attempt.terms)


class Visit:
    def __init__(self, site, nonce):
        self.site, self.nonce = site, nonce


def mean(ks, shared):
    each = [update(k, shared).sent["delta"] for k in ks]
    return {n: torch.cat([e[n] for e in each]).mean(0) for n in each[0]}


@pytest.mark.parametrize(
    "out", [{}, {"shares": ["east"]}, {"masked": ["west"]}, {"open": ["north"]}]
)
def test_the_sum_of_whoever_came_through_is_opened_and_nothing_else(folder, tmp_path, out):
    made = Federation(folder, tmp_path)
    made.begin()
    total = made.run(**out)
    gone = [n for phase, names in out.items() if phase != "open" for n in names]
    ks = [k for k, n in enumerate(NAMES) if n not in gone]
    assert total.ids == tuple(NAMES[k] for k in ks) and not made.refused
    for name, value in mean(ks, made.shared).items():
        assert (total.sent["delta"][name][0] - value).abs().max() <= 2**-40
    assert total.weight.tolist() == [1.0] * len(ks)
    assert total.metrics["examples"].sum() == pytest.approx(sum(10 + k for k in ks))
    assert total.metrics["train_loss"][0] == pytest.approx(sum(0.5 * k for k in ks) / len(ks))
    kept = Openings(tmp_path / "south").runs
    assert kept == {"r": [(4, frozenset(total.ids))]}
    silent = {n for names in out.values() for n in names}
    assert {n for n, p in made.parties.items() if p.done} == {*NAMES} - silent


def test_a_site_that_is_sent_another_model_is_known_by_its_keys(folder, tmp_path, monkeypatch):
    def lie(phase, to, message):
        if (phase, to) != ("task", "east"):
            return message
        state = {k: v * 0 for k, v in message.groups["state"].items()}
        return Message("task", message.facts, message.groups | {"state": state})

    monkeypatch.setattr("fedtorch.secure.server.checked", lambda *a: None)  # the server looks away
    made = Federation(folder, tmp_path, lie=lie)
    made.begin()
    made.phase()
    with pytest.raises(Refused, match=r"are needed|clients in"):
        made.phase()
    assert {*made.refused} == {*NAMES}
    for name, why in made.refused.items():
        assert why.kind == "signature" not in HARMLESS
        who = "north" if name == "east" else "east"
        assert str(why) == f"{who} has not signed its keys for this task, roster and attempt"


def test_an_honest_server_names_who_signed_another_task(folder, tmp_path):
    made = Federation(folder, tmp_path)
    made.begin()
    party = made.parties["east"]
    party.half.terms = replace(party.terms, task=b"\x00" * 32)
    with pytest.raises(Refused, match="east has not signed its keys for this task"):
        made.phase()


def test_a_lowered_threshold_is_refused_in_the_plan_and_in_the_task(folder, tmp_path):
    def lie(phase, to, message):
        said = message.facts["secure"] | {"threshold": 2}
        return Message("task", message.facts | {"secure": said}, message.groups)

    made = Federation(folder, tmp_path, lie=lie)
    made.begin()
    assert {str(e) for e in made.refused.values()} == {
        "a threshold of 2 is below the 3 of 4 that the plan has"
    }
    low = sums(aggregator=Secure(threshold=2))
    with pytest.raises(Refused, match="a threshold of 2: 3 to 4"):
        Federation(folder, tmp_path, low).begin()
    # of three sites two may be more than half: least_peers asks for three in a sum
    few = Federation(folder, tmp_path, low, NAMES[:3])
    few.begin()
    assert all("as few as 1 other sites" in str(e) for e in few.refused.values())


def test_an_invented_site_is_named_by_those_who_pin_their_peers(folder, tmp_path):
    pinned = {n: keys.fingerprints(folder)[n] for n in NAMES}
    made = Federation(folder, tmp_path, names=[*NAMES, "ghost"], peers=pinned)
    made.begin()
    assert {*made.refused} == {*NAMES}
    for e in made.refused.values():
        assert isinstance(e, ConfigError) and "'ghost' is not among this site's peers" in str(e)
        assert keys.fingerprints(folder)["ghost"] in str(e)
    # nor one of theirs with other keys
    other = keys.fingerprint((folder / "again/south/cert.pem").read_bytes())
    made = Federation(folder, tmp_path, peers=pinned | {"south": other})
    made.begin()
    assert "'south' shows another certificate than" in str(made.refused["north"])
    made = Federation(folder, tmp_path, peers=pinned)
    made.begin()
    assert made.run().ids == tuple(NAMES)


def test_without_pinned_peers_a_site_says_so(folder, tmp_path, caplog):
    Federation(folder, tmp_path, peers={n: keys.fingerprints(folder)[n] for n in NAMES})
    assert "no peers are pinned" not in caplog.text
    with caplog.at_level(logging.WARNING):
        Federation(folder, tmp_path, names=NAMES[:1])
    assert "no peers are pinned" in caplog.text


def test_a_roster_without_this_site_or_with_another_certificate_of_it_is_refused(folder, tmp_path):
    def lie(phase, to, message):
        said = message.facts["secure"]
        rows = [[n, "00" * 32 if n == to else p] for n, p in said["members"]]
        return Message("task", message.facts | {"secure": said | {"members": rows}}, message.groups)

    made = Federation(folder, tmp_path, lie=lie)
    made.begin()
    assert all("another certificate of this site" in str(e) for e in made.refused.values())


@pytest.mark.parametrize("which", ["box", "mask", "commitment", "signature"])
def test_swapped_keys_are_refused(folder, tmp_path, which):
    made = Federation(folder, tmp_path)
    made.begin()
    made.phase()

    def swap(roll: Roll) -> Roll:
        own, other = (getattr(roll.keys[k], which) for k in (1, 2))
        return Roll(
            roll.keys
            | {1: replace(roll.keys[1], **{which: other}), 2: replace(roll.keys[2], **{which: own})}
        )

    made.attempt.down = {k: swap(roll) for k, roll in made.attempt.down.items()}
    with pytest.raises(Refused):
        made.phase()
    for name, e in made.refused.items():
        told = (
            "other keys of this client" if name in ("south", "east") else "has not signed its keys"
        )
        assert told in str(e) and e.kind not in HARMLESS


def test_a_certificate_that_does_not_hold_is_refused(folder, tmp_path):
    from fedtorch.sites import letters

    other = (folder / "again/south/cert.pem").read_bytes()

    def lie(phase, to, message):
        if phase != "shares":
            return message
        return Message(
            "phase", message.facts, message.groups | {"certificates": letters._rows({1: other})}
        )

    made = Federation(folder, tmp_path, lie=lie)
    made.begin()
    made.phase()
    with pytest.raises(Refused):
        made.phase()
    assert all("certificate of 'south' does not hold" in str(e) for e in made.refused.values())


def to_open(folder, state, lie=lambda phase, to, message: message) -> Federation:
    """As far as the last phase."""
    made = Federation(folder, state, lie=lie)
    made.begin()
    for _ in PHASES[:-2]:
        made.phase()
    return made


def test_a_second_list_of_survivors_in_one_attempt_is_refused(folder, tmp_path):
    # with a second list the other share of whoever is not in it would be sent: both open an update
    made = to_open(folder, tmp_path)
    party = made.parties["north"]
    again = {"secure": {"places": torch.tensor([0, 1, 2], dtype=torch.int32)}}
    message = Message("phase", {"visit": party.visit, "phase": "confirm"}, again)
    with pytest.raises(MessageError, match="'confirm' where open is due: each is given once"):
        party.go_on(message)
    assert Openings(tmp_path / "north").runs == {"r": [(4, frozenset(NAMES))]}


def test_nothing_is_opened_twice(folder, tmp_path):
    made = to_open(folder, tmp_path)
    party = made.parties["north"]
    message = made.attempt.message(Visit("north", party.visit))
    opened = party.go_on(message)
    # of each peer one share, and never both
    assert opened.groups["secure/seeds"]["places"].tolist() == [0, 1, 2, 3]
    assert opened.groups["secure/masks"]["places"].tolist() == []
    with pytest.raises(MessageError, match="'open' where done is due"):
        party.go_on(message)


def test_two_lists_for_two_halves_of_the_sites_open_nothing(folder, tmp_path):
    made = Federation(folder, tmp_path)
    made.begin()
    for _ in range(3):
        made.phase()
    half = made.attempt.half
    made.attempt.down = {k: Survivors((0, 1, 2, 3) if k < 2 else (0, 2, 3)) for k in range(4)}
    # the server looks away
    half.take = lambda place, message: (
        half._signed.update({place: message.signature}) or half.waiting.discard(place)
    )
    made.phase()
    del half.take
    with pytest.raises(Refused):
        made.phase()
    for name, e in made.refused.items():
        whole = name in ("north", "south")
        told = (
            "not signed the list of survivors that came here"
            if whole
            else "nobody who is in the sum"
        )
        assert told in str(e) and e.kind not in HARMLESS


@pytest.mark.parametrize(
    "places, why",
    [
        ((0, 1), "2 sent a masked vector"),
        ((1, 2, 3), "leaves this client out"),
        ((0, 1, 2, 7), "no places"),
        ((0, 2, 1), "no places"),
    ],
    ids=str,
)
def test_a_list_of_survivors_that_is_none_is_refused(folder, tmp_path, places, why):
    made = Federation(folder, tmp_path)
    made.begin()
    for _ in range(3):
        made.phase()
    party = made.parties["north"]
    groups = {"secure": {"places": torch.tensor(places, dtype=torch.int32)}}
    with pytest.raises(Refused, match=why):
        party.go_on(Message("phase", {"visit": party.visit, "phase": "confirm"}, groups))
    assert Openings(tmp_path / "north").runs == {}


def test_a_round_done_again_with_one_site_less_is_declined(folder, tmp_path):
    made = Federation(folder, tmp_path)
    made.begin()
    made.run()
    again = Federation(folder, tmp_path)  # every process has been started again
    again.begin(attempt=b"\x02" * 16)
    with pytest.raises(Refused):
        again.run(masked=["west"])
    assert {*again.refused} == {"north", "south", "east"}
    for e in again.refused.values():
        assert e.kind == "replay" in HARMLESS and "round 5 was opened before" in str(e)
    # all four may do it again, and whatever the model is by now
    third = Federation(folder, tmp_path)
    third.begin(attempt=b"\x03" * 16, lr=0.2)
    assert third.run().ids == tuple(NAMES)


def test_noise_of_its_own_in_every_visit_lets_a_round_be_done_again(folder, tmp_path):
    private = sums(privacy=SampleLevel(noise_multiplier=1.0, rounds=3, steps=2, batch_size=4.0))
    assert private.noised and not private.tells
    first = Federation(folder, tmp_path, private)
    first.begin()
    assert first.run().metrics.keys() == {"clamped"}  # no figure of a site rides along
    again = Federation(folder, tmp_path, private)
    again.begin(attempt=b"\x02" * 16)
    assert again.run(masked=["west"]).ids == tuple(NAMES[:3])
    central = sums(privacy=ClientLevel(noise_multiplier=1.0, rounds=3, rate=1.0))
    assert not central.noised and central.tells


def test_a_sum_that_no_clipped_updates_have_is_refused(folder, tmp_path):
    central = sums(privacy=ClientLevel(noise_multiplier=1.0, rounds=3, rate=1.0))
    made = Federation(folder, tmp_path, central)
    made.begin(privacy={"clip": 0.1, "noise": 1.0})
    with pytest.raises(Refused, match="above the clipping norm"):
        made.run()


def test_numbers_beyond_the_range_are_clamped_and_counted_without_telling_whose(folder, tmp_path):
    narrow = sums(aggregator=Secure(width=32, range=1.0))
    made = Federation(folder, tmp_path, narrow)
    made.begin()
    total = made.run()
    each = [update(k, narrow).sent["delta"] for k in range(4)]
    beyond = sum(int((v.abs() > 1).sum()) for e in each for v in e.values())
    assert total.metrics["clamped"].sum() == beyond > 0
    wanted = torch.stack([e["1.bias"][0].clamp(-1, 1) for e in each]).mean(0)
    assert (total.sent["delta"]["1.bias"][0] - wanted).abs().max() <= 1e-8


def test_a_box_that_does_not_open_names_its_sender_and_ends_the_round_only(folder, tmp_path):
    made = Federation(folder, tmp_path)
    made.begin()
    made.phase(), made.phase()
    boxes = made.attempt.down[0].boxes
    boxes[2] = boxes[2][:-1] + bytes([boxes[2][-1] ^ 1])
    made.phase()
    (why,) = made.refused.values()
    assert "east: a box of shares does not open" in str(why) and why.kind in HARMLESS


def test_a_wrong_phase_or_visit_is_refused(folder, tmp_path):
    made = Federation(folder, tmp_path)
    made.begin()
    made.phase()
    party = made.parties["north"]
    message = made.attempt.message(Visit("north", party.visit))
    for facts in ({"visit": "0" * 32}, {"phase": "masked"}, {"phase": 7}, {"phase": None}):
        with pytest.raises(MessageError, match=r"visit|where shares is due"):
            party.go_on(Message("phase", message.facts | facts, message.groups))
    assert party.go_on(message).facts["phase"] == "shares"


def test_what_a_site_sends_tells_nothing_of_it_but_in_the_masked_vector(folder, tmp_path):
    made, sent = Federation(folder, tmp_path), []
    take = Attempt.take
    made.begin()
    made.attempt.take = lambda site, message: (
        sent.append((site, message)),
        take(made.attempt, site, message),
    )
    made.run()
    assert len(sent) == 5 * len(NAMES)
    sizes = {}
    for _, message in sent:
        assert message.facts.keys() - {"certificates"} == {"run", "visit", "round", "phase"}
        assert message.facts["run"] == "r" and message.facts["round"] == 4
        sizes.setdefault(message.facts["phase"], set()).add(
            tuple(
                sorted(
                    (g, n, tuple(t.shape))
                    for g, tree in message.groups.items()
                    for n, t in tree.items()
                    if message.facts["phase"] in ("masked", "shares", "open")
                )
            )
        )
    assert all(len(each) == 1 for each in sizes.values())  # whoever it is, as many bytes
    assert SecureServer  # the server's own half took them all


def test_statistics_that_each_site_tells_apart_are_refused():
    plan = offered(privacy=SampleLevel(rounds=3), aggregator=Secure())
    check_apart(plan)
    with pytest.raises(ConfigError, match="leave it out"):
        check_apart(replace(plan, standardize=["age=0:100"]))


def test_keys_that_cannot_sign_are_refused_with_the_fix(folder, tmp_path):
    with pytest.raises(ConfigError, match="--credentials"):
        Masks(SiteConfig(name="north", insecure=True), Openings(tmp_path))
    for changes, why in (
        ({"peers": {"south": "12:34"}}, r"peers.south is no SHA-256 fingerprint"),
        ({"peers": {"south": "ab" * 32}}, "peers name 1 other sites, and least_peers is 2"),
        ({"least_peers": 1}, "least_peers must be at least 2"),
    ):
        with pytest.raises(ConfigError, match=why):
            SiteConfig(name="north", insecure=True, **changes)
