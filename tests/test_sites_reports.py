"""A report counts as it is meant, or is refused by name; no figure, weight or update is taken on trust."""

import math

import pytest
import torch

from fedtorch import FedAvg, Recipe, Scaffold, TopK
from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.privacy import AdaptiveClip, ClientLevel, LocalDP, SampleLevel
from fedtorch.sites.reports import Reader
from fedtorch.types import Failure, Released, Task

FIGURES = {"train_loss": 0.5, "examples": 20.0, "visited": 40.0, "steps": 4.0, "update_norm": 1.0}
TASK = Task({}, {}, 3, 0, 0.1, {"clip": 1.0, "noise": 1.0})


def net() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def honest(recipe, weight, value=0.1):
    """What a site of 20 examples sends, as facts and groups."""
    reader = Reader.of(recipe, net(), 1000)
    sent = {
        g: {k: torch.full((1, *shape), value).double() for k, (shape, _) in names.items()}
        for g, names in reader.expected.sent.items()
    }
    metrics = {k: torch.tensor([v]) for k, v in FIGURES.items()}
    update = Released.received(("north",), sent, {}, torch.tensor([weight]), metrics)
    message = messages.outcome_message(messages.Outcome(update, [], {}), ["north"], round=3)
    return reader, dict(message.facts), {g: dict(t) for g, t in message.groups.items()}


def read(reader, facts, groups):
    data = wire.encode(Message("report", facts, groups))
    return reader.read("north", TASK, wire.decode(data, header_limit=reader.header_limit()))


def figure(name, value, dtype=torch.float32):
    return lambda f, g: g["metrics"].update({name: torch.tensor([value], dtype=dtype)})


def without(*names):
    return lambda f, g: [g["metrics"].pop(n) for n in names]


def weight(value):
    return lambda f, g: g[""].update(weight=torch.tensor([value], dtype=torch.float64))


def filled(value):
    return lambda f, g: [v.fill_(value) for v in g["sent/delta"].values()]


def both(*changes):
    return lambda f, g: [change(f, g) for change in changes]


WRONG = {
    "no figure": (without(*FIGURES), "figures are not those of a visit"),
    "one figure less": (without("train_loss"), "'train_loss'"),
    "another figure less": (without("update_norm"), "'update_norm'"),
    "one figure more": (figure("extra", 1.0), "'extra'"),
    "figure of two numbers": (lambda f, g: g["metrics"].update(steps=torch.ones(2)), "'steps'"),
    "figure in halves": (figure("steps", 1.0, torch.float16), "'steps'"),
    "figure in whole numbers": (figure("steps", 1, torch.int64), "'steps'"),
    "loss beyond float32": (figure("train_loss", 1.7e308, torch.float64), "'train_loss'"),
    "loss NaN": (figure("train_loss", math.nan), "not finite"),
    "negative count": (figure("examples", -20.0), "'examples' is no count"),
    "no examples": (figure("examples", 0.0), "'examples' is no count"),
    "half an example": (figure("examples", 20.5), "'examples' is no count"),
    "count beyond reason": (figure("visited", 3e38), "'visited' is no count"),
    "negative length": (figure("update_norm", -1.0), "'update_norm'"),
    "more examples than anybody": (both(figure("examples", 1001.0), weight(1001.0)), "1,000 examp"),
    "weight of a thousand million": (weight(1e9), "weight is not its number of examples"),
    "weight of one more": (weight(21.0), "weight is not its number of examples"),
    "negative weight": (weight(-20.0), "weight"),
    "weight NaN": (weight(math.nan), "weight"),
    "weight infinite": (weight(math.inf), "weight"),
    "NaN": (filled(math.nan), "not finite"),
    "infinity": (filled(-math.inf), "not finite"),
    "beyond float32": (filled(1e300), "norm inf"),
    "beyond squares": (filled(1e30), r"norm 2.83e\+30"),
    "float32": (lambda f, g: g["sent/delta"].update(bias=torch.ones(1, 2)), "float32"),
    "another shape": (lambda f, g: g["sent/delta"].update(bias=torch.ones(1, 3).double()), "bias"),
    "name too many": (lambda f, g: g["sent/delta"].update(x=torch.ones(1).double()), "'x'"),
    "name too few": (lambda f, g: g["sent/delta"].pop("bias"), "'bias'"),
    "another group": (lambda f, g: g.update({"sent/x": {"a": torch.ones(1)}}), "'sent/x'"),
    "memory": (lambda f, g: g.update({"memory/0/c": {"a": torch.ones(1)}}), "'memory/0/c'"),
    "buffers": (lambda f, g: g.update(buffers={"mean": torch.ones(1, 2)}), "'mean'"),
    "another round": (lambda f, g: f.update(round=4), "another round"),
    "a round as text": (lambda f, g: f.update(round="3"), "another round"),
    "another's id": (lambda f, g: f.update(ids=["south"]), "other clients"),
    "its id twice": (lambda f, g: f.update(ids=["north", "north"]), "other clients"),
    "a fact more": (lambda f, g: f.update(note="hello"), "'note'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_report_that_is_not_a_visits_is_refused_by_name(case):
    reader, facts, groups = honest(Recipe(), 20.0)
    assert isinstance(read(reader, facts, groups), Released)
    change, why = WRONG[case]
    change(facts, groups)
    with pytest.raises(MessageError, match=why):
        read(reader, facts, groups)


@pytest.mark.parametrize("strategy", [FedAvg(), Scaffold()], ids=str)
@pytest.mark.parametrize(
    "privacy",
    [
        None,
        SampleLevel(rounds=1),
        LocalDP(rounds=1),
        ClientLevel(rounds=1, adaptive=AdaptiveClip()),
    ],
    ids=lambda p: type(p).__name__,
)
def test_an_honest_report_is_read_whatever_the_recipe(strategy, privacy):
    recipe = Recipe(strategy, privacy=privacy)
    reader, facts, groups = honest(recipe, 20.0 if recipe.weighting == "examples" else 1.0)
    if "sent/below" in groups:
        groups["sent/below"]["bit"].fill_(-0.5)
    assert read(reader, facts, groups).ids == ("north",)


def coded(**changes):
    """A report whose update, of weights that are all .1, went through a channel; 3 numbers of 8."""
    recipe = Recipe(channel=(TopK(share=0.375),))
    _, facts, groups = honest(Recipe(), 20.0)
    code = recipe.channel[0].encode(groups["sent/delta"]) | changes
    return Reader.of(recipe, net(), 1000), facts, groups | {"sent/delta": code}


def test_a_code_is_read_as_it_was_sent():
    assert read(*coded()).sent["delta"]["value"].shape == (1, 3)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"place": torch.tensor([[15]]).byte()}, "cannot be decoded: 'other places are marked"),
        ({"place": torch.tensor([[7, 7]]).byte()}, "'place'"),
        ({"place": torch.tensor([[7]])}, "'place'"),
        ({"value": torch.tensor([[1.0, 2.0, math.nan]])}, "'value' is not finite"),
        ({"value": torch.full((1, 3), 3e38)}, "norm"),
        ({"w": torch.ones(1, 3)}, "'w'"),
    ],
    ids=["more places", "long", "wide", "nan", "huge", "more"],
)
def test_a_code_that_no_stage_makes_is_refused(changes, why):
    with pytest.raises(MessageError, match=why):
        read(*coded(**changes))


def test_under_privacy_every_weight_is_one_and_a_site_may_keep_its_figures_to_itself():
    reader, facts, groups = honest(Recipe(privacy=SampleLevel(rounds=1)), 1.0)
    strict = Reader.of(Recipe(privacy=SampleLevel(rounds=1, strict=True)), net(), 1000)
    with pytest.raises(MessageError, match="not those of a visit"):  # figures nobody may have
        read(strict, facts, groups)
    without("train_loss", "examples", "visited", "steps")(facts, groups)
    for r in (reader, strict):
        assert read(r, facts, groups).metrics.keys() == {"update_norm"}
    weight(20.0)(facts, groups)
    with pytest.raises(MessageError, match="weight is not 1"):
        read(reader, facts, groups)
    plain, facts, groups = honest(Recipe(), 20.0)
    without("train_loss", "examples", "visited", "steps")(facts, groups)
    with pytest.raises(MessageError, match="not those of a visit"):
        read(plain, facts, groups)


def test_under_client_level_privacy_nobody_moves_the_sum_by_more_than_the_clip():
    recipe = Recipe(privacy=ClientLevel(rounds=1, adaptive=AdaptiveClip()))
    reader, facts, groups = honest(recipe, 1.0)
    bit = groups["sent/below"]["bit"]
    length = math.sqrt(sum(v.numel() for v in groups["sent/delta"].values()))
    bit.fill_(0.5)
    filled(1 / length)(facts, groups)
    assert isinstance(read(reader, facts, groups), Released)
    filled(1.001 / length)(facts, groups)
    with pytest.raises(MessageError, match="above the clipping norm 1"):
        read(reader, facts, groups)
    filled(0.0)(facts, groups)
    bit.fill_(5e5)
    with pytest.raises(MessageError, match="bit"):
        read(reader, facts, groups)


def test_why_a_site_failed_is_told_in_words_of_the_servers_own():
    reader, facts, groups = honest(Recipe(), 20.0)
    said = {"ids": [], "failures": [["north", "error", "\x1b[2J\nall is well"]]}
    facts, groups = facts | said, {"": {"weight": torch.zeros(0)}}
    assert read(reader, facts, groups) == Failure(
        "north", "error", "its model or data raised an error"
    )
    facts["failures"] = [["north", "\x1b[2J", "x"]]
    with pytest.raises(MessageError, match="no reason that is known"):
        read(reader, facts, groups)


def test_the_largest_honest_header_fits_and_little_more():
    for recipe in (Recipe(), Recipe(Scaffold())):
        reader, facts, groups = honest(recipe, 20.0)
        facts |= {"run": "x" * 100, "visit": "y" * 32}
        data = wire.encode(Message("report", facts, groups))
        size = int.from_bytes(data[len(wire.MAGIC) : wire.START], "little")
        assert size < reader.header_limit() < 12_000
        facts["failures"] = [[]] * 4000
        with pytest.raises(MessageError, match="a header of"):
            read(reader, facts, groups)
