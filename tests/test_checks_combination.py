"""Every pair of parts either trains a round or is refused with one sentence, before anybody trains."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR

from conftest import make_clients, mlp
from fedtorch import (
    HE,
    QSGD,
    ConfigError,
    Everyone,
    FedAvg,
    FedProx,
    Mean,
    Median,
    Poisson,
    PowerSGD,
    RandomK,
    Recipe,
    Scaffold,
    Secure,
    Server,
    Sign,
    Stage,
    Strategy,
    TopK,
    Uniform,
)
from fedtorch.aggregation.vectors import Krum
from fedtorch.checks import combination
from fedtorch.options import find
from fedtorch.privacy import ClientLevel, DistributedDP, LocalDP, Nothing, SampleLevel
from fedtorch.rounds.buffered import Asynchronous, Buffered
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.synchronous import OverSelected, Synchronous
from fedtorch.run.names import CHOICES
from fedtorch.run.objects import choose
from fedtorch.strategies import (
    APFL,
    IFCA,
    MOON,
    ClientMomentum,
    Ditto,
    FedBABU,
    FedDyn,
    FedExP,
    FedNova,
    FedPer,
    FedRep,
    PFedMe,
    QFedAvg,
)

NOISE = dict(noise_multiplier=0.5, rounds=1, insecure_seed=1)
SIZED = "voids the privacy claim: it releases how many examples"
DRAWN = "client-level privacy draws the cohort itself"
SUMMED = "median voids the claim of client-level privacy"
ONCE = "median counts every client once"
HELD = "channel.feedback is of no use under client-level privacy"
LAST = "channel longer comes last"
SEEN = "looks at each client's own update"
TURNS = "sends other weights from round to round"
HELD_BACK = "strategy feddyn needs the mean of what clients send"
PASSES = "sends steps that start from what another pass"
OBJECTIVE = "has an objective of its own"
ASKED = "sends what it makes of losses or gradients that it asks"
LENGTHS = "strategy fedexp compares the lengths"
CURIOUS = "strategy qfedavg sets its rate by the lengths"
MEMBERS = "strategy ifca divides what the members"
SENT = "sends numbers that no noise is made for"
MEASURED = "aggregator median takes of clients what it trusts"
VARIATES = "strategy scaffold needs the mean of what clients send"
KEPT = "privacy.strict keeps to itself how many examples a client has"
OVERLAPPED = "pace buffered takes changes of weights alone: strategy scaffold also needs c"
ADDED = "pace buffered adds up changes of one list of weights"
FREE = "pace buffered asks whoever is free"
AGED = "pace buffered weighs each change by its age"
SHARED = "aggregator secure weighs clients by a share of a public number"
CODES = "adds numbers that it cannot read, and codes of a channel cannot be added"
NOBODY = "shows nobody a client's own update"
TOGETHER = "opens one sum of all that were asked"
ONE_SIZE = "privacy distributed makes each client's share of the noise for rounds of one size"
UNMASKED = "privacy distributed adds a share of the noise at each client"
FIRST_IN = "pace buffered voids the claim of client-level privacy"


@dataclass(frozen=True, kw_only=True)
class Longer(Stage):
    """Numbers rounded up to the next quarter."""

    feedback: bool = False

    def encode(self, sent):
        return {name: (4 * v).ceil().to(torch.int32) for name, v in sent.items()}

    def decode(self, code, like):
        return {name: v.double() / 4 for name, v in code.items()}


@dataclass(frozen=True, kw_only=True)
class Turns(Strategy):
    """Weights that rest by turns, of which there are none."""

    def rests(self, names, extras):
        return set()


@dataclass(frozen=True, kw_only=True)
class Seen(Strategy):
    """Each client's update is looked at, and no more."""

    def arrived(self, sent):
        return dict(sent)


PARTS = {
    "strategy": {
        "fedavg": FedAvg(),
        "sized": FedAvg(weighting="examples"),
        "fedprox": FedProx(mu=0.1),
        "per": FedPer(personal=("2.*",)),
        "scaffold": Scaffold(),
        "turns": Turns(),
        "seen": Seen(),
        "nova": FedNova(),
        "dyn": FedDyn(),
        "ditto": Ditto(),
        "rep": FedRep(personal=("2.*",)),
        "apfl": APFL(),
        "pfedme": PFedMe(inner_steps=1),
        "ifca": IFCA(),
        "fair": QFedAvg(),
        "moon": MOON(tap="0"),
        "exp": FedExP(),
        "babu": FedBABU(head=("2.*",)),
        "momentum": ClientMomentum(),
    },
    "aggregator": {"mean": Mean(), "median": Median(), "krum": Krum(f=0), "secure": Secure()},
    "channel": {
        "whole": (),
        "topk": (TopK(),),
        "plain topk": (TopK(feedback=False),),
        "longer": (Longer(),),
        "randk": (RandomK(),),
        "qsgd": (QSGD(),),
        "sign": (Sign(),),
        "powersgd": (PowerSGD(),),
        "two": (TopK(), QSGD()),
        "stuck": (Longer(), TopK(feedback=False)),
    },
    "privacy": {
        "nothing": Nothing(),
        "sample": SampleLevel(steps=2, **NOISE),
        "client": ClientLevel(**NOISE),
        "local": LocalDP(**NOISE),
        "distributed": DistributedDP(**NOISE),
    },
    "participation": {
        "everyone": Everyone(),
        "uniform": Uniform(cohort_size=3),
        "poisson": Poisson(rate=0.9),
    },
    "pace": {
        "synchronous": Synchronous(),
        "buffered": Buffered(size=2, concurrency=3, clock=Clock(spread=0.5)),
        "timed": Synchronous(clock=Clock(spread=0.5)),
        "over": OverSelected(over=1.3),
        "async": Asynchronous(concurrency=3),
    },
}
FIRST = {kind: next(iter(choices)) for kind, choices in PARTS.items()}

ADDED_STAGES = ("randk", "qsgd", "sign", "powersgd", "two")

REFUSED = {
    ("sized", "median"): ONCE,
    ("scaffold", "median"): VARIATES,
    ("sized", "sample"): SIZED,
    ("sized", "client"): SIZED,
    ("sized", "local"): SIZED,
    ("median", "client"): SUMMED,
    ("krum", "client"): SUMMED.replace("median", "krum"),
    ("sized", "krum"): ONCE.replace("median", "krum"),
    ("scaffold", "krum"): VARIATES,
    ("scaffold", "topk"): VARIATES,
    ("scaffold", "plain topk"): VARIATES,
    ("scaffold", "longer"): VARIATES,
    ("seen", "client"): SEEN,
    ("rep", "sample"): PASSES,
    ("moon", "sample"): OBJECTIVE,
    ("pfedme", "sample"): ASKED,
    **{
        (name, "buffered"): OVERLAPPED.replace("scaffold also needs c", f"{name} also needs {what}")
        for name, what in [
            ("ditto", "v"),
            ("apfl", "alpha, v"),
            ("pfedme", "theta"),
            ("moon", "last"),
        ]
    },
    ("ifca", "buffered"): OVERLAPPED.replace(
        "scaffold also needs c", "ifca also needs m1, numbers, pick"
    ),
    ("fair", "buffered"): OVERLAPPED.replace("scaffold also needs c", "qfedavg also needs numbers"),
    **{(who, name): SENT for who in ("ifca", "fair") for name in ("sample", "client", "local")},
    **{
        (who, name): MEASURED.replace("median", name)
        for who in ("ifca", "fair")
        for name in ("median", "krum")
    },
    **{("fair", name): CURIOUS for name in ("topk", "plain topk", "longer")},
    **{("exp", name): LENGTHS for name in ("topk", "plain topk", "longer", *ADDED_STAGES)},
    **{("ifca", name): MEMBERS for name in ("topk", "plain topk", "longer", *ADDED_STAGES)},
    **{("fair", name): CURIOUS for name in ADDED_STAGES},
    **{("nova", name): SENT for name in ("sample", "client", "local")},
    **{("nova", name): MEASURED.replace("median", name) for name in ("median", "krum")},
    **{("exp", name): SENT for name in ("sample", "client", "local", "distributed")},
    **{("exp", name): MEASURED.replace("median", name) for name in ("median", "krum")},
    **{("dyn", name): HELD_BACK for name in ("median", "krum", "topk", "plain topk", "longer")},
    ("nova", "buffered"): OVERLAPPED.replace("scaffold also needs c", "fednova also needs numbers"),
    ("exp", "buffered"): OVERLAPPED.replace("scaffold also needs c", "fedexp also needs numbers"),
    ("momentum", "buffered"): OVERLAPPED.replace(
        "scaffold also needs c", "client-momentum also needs m"
    ),
    ("dyn", "buffered"): OVERLAPPED.replace("scaffold also needs c", "feddyn also needs g"),
    ("turns", "topk"): TURNS,
    ("turns", "plain topk"): TURNS,
    ("turns", "longer"): TURNS,
    **{(name, "stuck"): LAST for name in PARTS["strategy"] | PARTS["aggregator"]},
    **{("stuck", n): LAST for kind in ("privacy", "participation", "pace") for n in PARTS[kind]},
    **{("scaffold", c): VARIATES for c in ADDED_STAGES},
    **{("dyn", c): HELD_BACK for c in ADDED_STAGES},
    **{("turns", c): TURNS for c in ADDED_STAGES},
    ("sign", "client"): HELD,
    ("powersgd", "client"): HELD,
    **{("secure", name): CODES for name in PARTS["channel"] if name != "whole"},
    ("sized", "secure"): SHARED,
    ("seen", "secure"): NOBODY,
    ("secure", "buffered"): TOGETHER,
    **{(name, "distributed"): UNMASKED for name in ("mean", "median", "krum")},
    **{(name, "distributed"): SENT for name in ("ifca", "fair", "nova")},
    **{(name, "distributed"): CODES for name in PARTS["channel"] if name != "whole"},
    ("sized", "distributed"): SIZED,
    ("distributed", "poisson"): ONE_SIZE,
    ("seen", "distributed"): NOBODY,
    ("distributed", "buffered"): TOGETHER,
    ("topk", "client"): HELD,
    ("two", "client"): HELD,
    ("client", "uniform"): DRAWN,
    ("client", "poisson"): DRAWN,
    ("scaffold", "buffered"): OVERLAPPED,
    ("seen", "buffered"): ADDED,
    ("turns", "buffered"): ADDED,
    ("median", "buffered"): AGED,
    ("krum", "buffered"): AGED,
    ("client", "buffered"): FIRST_IN,
    ("uniform", "buffered"): FREE,
    ("poisson", "buffered"): FREE,
}
"""Of all pairs those that do not go together; every other one trains."""

REFUSED |= {
    (one, "async"): why.replace("pace buffered", "pace asynchronous")
    for (one, other), why in REFUSED.items()
    if other == "buffered"
} | {(one, name): LAST for one, other in REFUSED for name in ("timed", "over") if one == "stuck"}
REFUSED |= {
    ("client", "over"): FIRST_IN.replace("buffered", "over-selected"),
    ("secure", "over"): TOGETHER.replace("buffered", "over-selected"),
    ("distributed", "over"): TOGETHER.replace("buffered", "over-selected"),
}


RULES = [n for n in CHOICES["aggregator"] if n not in ("mean", "secure", "he")]


def test_every_part_that_has_a_name_is_among_those_that_are_walked():
    for kind in PARTS:
        made = PARTS[kind].values()
        here = {type(x) for part in made for x in (part if kind == "channel" else [part])}
        missing = {n for n, path in CHOICES[kind].items() if find(path) not in here}
        assert missing <= {"lg", "fedbn", "he", *RULES}, kind
    for name in ("lg", "fedbn"):
        kind = find(CHOICES["strategy"][name])
        assert kind.__mro__[1] is Strategy and {*vars(kind)} <= {*vars(FedPer)}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_refused_where_the_median_is_and_nowhere_else(name):
    rule = choose("aggregator", name)
    for kind in PARTS.keys() - {"aggregator"}:
        for part in PARTS[kind].values():
            order = {kind: part} if kind in ("participation", "pace") else {}
            given = {} if order else {kind: part}
            one, other = (
                combination.refusal(Recipe(aggregator=a, **given), **order)
                for a in (rule, Median())
            )
            assert one == (other and other.replace("aggregator median", f"aggregator {name}"))


@pytest.mark.parametrize("kind", PARTS)
def test_encryption_is_refused_where_masks_are_but_for_privacy_of_masked_shares(kind):
    for name, part in PARTS[kind].items():
        order = {kind: part} if kind in ("participation", "pace") else {}
        given = {} if order else {kind: part}
        if kind == "aggregator":
            continue
        one, other = (
            combination.refusal(Recipe(**{"aggregator": a} | given), **order)
            for a in (HE(), Secure())
        )
        if name in ("distributed", "sized", "client"):
            assert (one and "aggregator he" in one) or "--aggregator secure" in one
        else:
            assert one == (other and other.replace("aggregator secure", "aggregator he"))


def untrained(model, batches, lr):
    """A local update that leaves the model as it is."""


PLAN = {"privacy": SampleLevel(**NOISE)}
FIGURES = {"metrics_epsilon": 0.3, **NOISE}
OVERRULED = [
    (
        {"privacy": SampleLevel(**FIGURES), "strategy": FedPer(personal=("2.*",))},
        "leaves parts of it with them",
    ),
    (
        {"privacy": ClientLevel(**FIGURES), "local": lambda *a: None},
        "local tells none of an example",
    ),
    ({"privacy": SampleLevel(**FIGURES), "aggregator": Median()}, "takes what it trusts"),
    ({"privacy": SampleLevel(**FIGURES), "pace": Buffered()}, "clients have several"),
    (
        {"aggregator": HE(), "strategy": FedAvg(weighting="examples")},
        "weighs all clients alike, as none tells",
    ),
    (
        {"aggregator": HE(), "privacy": ClientLevel(**NOISE)},
        "would see it before the server adds the",
    ),
    (
        {"aggregator": Secure(), "privacy": ClientLevel(rate=0.9, **NOISE)},
        "voids amplification by secret coins",
    ),
    (
        {"aggregator": Secure(neighbours=2), "privacy": DistributedDP(**NOISE)},
        "leave neighbours out",
    ),
    (
        {"aggregator": Secure(), "privacy": SampleLevel(statistics_noise=9.0, **NOISE)},
        "in no sum of all",
    ),
    ({"aggregator": Secure(weight_cap=9), **PLAN}, "aggregator.weight_cap would do nothing"),
    ({"steps": 3, **PLAN}, "owns the steps"),
    ({"drop_last": True, **PLAN}, "drop_last has no meaning for Poisson"),
    ({"accumulate": 2, **PLAN}, "accumulate has no meaning for Poisson"),
    ({"clip_norm": 1.0, **PLAN}, "clips each example's gradient, by privacy.clip"),
    ({"accumulate": 2, "batch_size": None}, "accumulate needs a batch_size"),
    ({"local": untrained, **PLAN}, "nobody clips and noises what it learns of each example"),
    ({"local": untrained, "strategy": Scaffold()}, "scaffold changes the gradients of local steps"),
    ({"local": untrained, "strategy": Ditto()}, "takes them in several passes or"),
    ({"strategy": APFL(), "accumulate": 2}, "takes steps of its own by the gradient"),
    ({"strategy": FedPer(personal=())}, "with no name in strategy.personal is fedavg"),
    ({"strategy": FedProx(mu=20.0)}, "a step ends further off than it began"),
    ({"strategy": Ditto(lam=5.0), "lr": 0.4}, "a step ends further off than it began"),
    ({"strategy": PFedMe(lam=10.0)}, "from 1 on they overshoot"),
    ({"strategy": FedNova(), "optimizer": "Adam"}, "holds for clients that train with SGD"),
    ({"strategy": FedNova(), "scheduler": ConstantLR}, "scheduler says it to nobody"),
    ({"lr_floor": 0.1}, "lr_floor needs lr_decay linear or cosine"),
    ({"scheduler": ConstantLR, "lr_warmup": 2}, "scheduler takes the place of lr_warmup"),
    (
        {"scheduler": ConstantLR, "strategy": Scaffold()},
        "scaffold needs the sum of a visit's",
    ),
]
"""Options that do nothing, or nothing right, beside others."""

PAIRS = [
    ((a, x), (b, y))
    for a, b in itertools.combinations(PARTS, 2)
    for x, y in itertools.product(PARTS[a], PARTS[b])
]


BESIDE = {
    "scaffold": ["c"],
    "nova": ["numbers"],
    "dyn": ["g"],
    "ditto": ["v"],
    "apfl": ["v", "alpha"],
    "pfedme": ["theta"],
    "ifca": ["m1", "pick", "numbers"],
    "fair": ["numbers"],
    "moon": ["last"],
    "exp": ["numbers"],
    "momentum": ["m"],
}
"""What a strategy's clients send beside their change, or keep."""


def made(names):
    """A recipe of parts with these names, the order of its rounds, and what ``BESIDE`` has of it."""
    parts = {kind: PARTS[kind][name] for kind, name in names.items()}
    order = {kind: parts.pop(kind) for kind in ("participation", "pace")}
    return Recipe(epochs=1, **parts), order, BESIDE.get(names["strategy"], [])


def usual(one, other):
    """These two parts among those that a run has without being asked."""
    names = FIRST | dict([one, other])
    if names["privacy"] == "distributed" and "aggregator" not in (one[0], other[0]):
        names["aggregator"] = "secure"
    return names


def runs():
    """Names of parts such that each pair that is not refused is in one run, with few runs in all."""
    left, found = dict.fromkeys(p for p in PAIRS if (p[0][1], p[1][1]) not in REFUSED), []
    while left:
        names = dict(next(iter(left)))
        for kind in [k for k in PARTS if k not in names]:
            names[kind] = max(PARTS[kind], key=lambda name: new(names | {kind: name}, left))
        assert new(names, left) > 0
        found.append(names)
        for pair in within(names):
            left.pop(pair, None)
    return found


FEW = {"krum", "poisson", "over"}
"""Of few that coins choose the first to come may be fewer than the three that Krum needs: no round."""


def within(names):
    given = [(kind, names[kind]) for kind in PARTS if kind in names]
    return itertools.combinations(given, 2)


def new(names, left):
    """How many pairs of ``left`` a run with these parts would have; less than none: it is refused."""
    pairs = [*within(names)]
    if {*names.values()} >= FEW or any((one[1], other[1]) in REFUSED for one, other in pairs):
        return -1
    return sum(pair in left for pair in pairs)


@pytest.mark.parametrize("names", runs(), ids=lambda names: "-".join(names[kind] for kind in PARTS))
def test_parts_of_which_each_two_go_together_train_a_round(names):
    recipe, order, groups = made(names)
    server = Server(mlp(), make_clients([9, 7, 8, 6]), recipe, **order)
    assert server.round()["round"] == 1
    assert server.moved() and all(v.isfinite().all() for v in server.model.parameters())
    assert combination.refusal(recipe, **order, groups=groups) is None


def test_a_pair_is_refused_if_the_table_here_says_so():
    for one, other in PAIRS:
        recipe, order, groups = made(usual(one, other))
        why = combination.refusal(recipe, **order, groups=groups)
        assert (why is None) is ((one[1], other[1]) not in REFUSED), (one, other, why)


@pytest.mark.parametrize(
    "one, other", [p for p in PAIRS if (p[0][1], p[1][1]) in REFUSED], ids=lambda part: part[1]
)
def test_a_pair_that_is_refused_is_told_why_before_anybody_trains(one, other):
    recipe, order, groups = made(usual(one, other))
    with pytest.raises(ConfigError, match=REFUSED[one[1], other[1]]) as refused:
        Server(mlp(), make_clients([9, 7, 8, 6]), recipe, **order)
    assert str(refused.value) == combination.refusal(recipe, **order, groups=groups)


def test_a_rule_needs_as_many_as_count_of_those_that_are_asked():
    with pytest.raises(ConfigError, match=r"needs 2f \+ 3 = 5 updates, .* a round has 2"):
        Server(
            mlp(), make_clients([9, 7, 8, 6]), Recipe(aggregator=Krum()), pace=OverSelected(over=2)
        )


def test_every_sentence_of_the_table_is_met_by_some_recipe():
    """And options that a plan or another option overrules are refused like parts."""
    for given, why in OVERRULED:
        options = dict(given)
        order = {k: options.pop(k) for k in ("participation", "pace") if k in options}
        with pytest.raises(ConfigError, match=why):
            Server(mlp(), make_clients([9, 7]), Recipe(**options), **order)
    shy = LocalDP(strict=True, **NOISE)
    with pytest.raises(ConfigError, match=KEPT):
        Server(mlp(), make_clients([9, 7]), Recipe(privacy=shy), pace=Buffered())
    found = {KEPT, *REFUSED.values(), *(why for _, why in OVERRULED)} - {
        VARIATES,
        HELD_BACK,
        CURIOUS,
        LENGTHS,
        MEMBERS,
    }
    found = {why for why in found if "also needs" not in why}
    found = {why.replace("krum", "median") for why in found}
    words = {
        "aggregator": "median",
        "participation": "poisson",
        "pace": "buffered",
        "strategy": "scaffold",
        "stage": "longer",
    }
    for _, sentence in combination.REFUSED:
        assert sum(word in sentence.format(**words) for word in found) == 1


@pytest.mark.parametrize("choice", ["aggregator", "channel"])
def test_a_class_that_a_file_names_is_imported_only_if_whoever_starts_the_run_says_so(
    choice, tmp_path, monkeypatch, fedtorch
):
    (tmp_path / "from_afar.py").write_text("raise SystemExit('imported')")
    (tmp_path / "run.toml").write_text(f'[{choice}]\nname = "from_afar.Part"\n')
    code, _, err = fedtorch("train", "--config", "run.toml")
    assert code == 2 and f"{choice} = 'from_afar.Part'; add --trust-code" in err
    code, _, err = fedtorch("train", "--config", "run.toml", "--trust-code")
    assert code == 2 and "cannot import 'from_afar.Part'" in err
