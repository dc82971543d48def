"""Whatever bytes arrive, decoding gives a message or a MessageError; what was sent comes back exactly."""

import json
import math
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.types import Failure, Released, Task


def example() -> Message:
    g = torch.Generator().manual_seed(0)
    floats = {"a": torch.randn(3, 2, generator=g), "bn.x": torch.randn(5, generator=g).double()}
    rest = {"n": torch.tensor(7), "half": torch.ones(3).half(), "yes": torch.tensor([True, False])}
    return Message("example", {"round": 3, "lr": 0.1}, {"one": floats, "two": rest, "none": {}})


def same(a: Message, b: Message) -> bool:
    groups = {g: t for g, t in a.groups.items() if t}
    return (
        (a.kind, a.facts, groups.keys()) == (b.kind, b.facts, b.groups.keys())
        and all(groups[g].keys() == b.groups[g].keys() for g in groups)
        and all(
            torch.equal(groups[g][n], t) and groups[g][n].dtype == t.dtype
            for g, tree in b.groups.items()
            for n, t in tree.items()
        )
    )


def test_what_is_sent_comes_back_to_the_last_bit():
    assert same(example(), wire.decode(wire.encode(example())))
    # so that a tensor lies in memory as its type wants it
    assert all(len(wire.pack(Message("k", {"x": "y" * n})).head) % 64 == 0 for n in range(70))


shapes = st.lists(st.integers(0, 4), max_size=3)
tensors = st.tuples(st.sampled_from(sorted(wire.DTYPES)), shapes, st.integers(0, 1)).map(
    lambda t: torch.full(t[1], t[2], dtype=wire.DTYPES[t[0]])
)
groups = st.dictionaries(
    st.text(max_size=9), st.dictionaries(st.text(), tensors, max_size=4), max_size=3
)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=9)
facts = st.dictionaries(st.text(max_size=9), plain | st.lists(plain, max_size=3), max_size=4)


def test_a_complex_number_may_start_anywhere():
    numbers = {
        "a": torch.zeros(1, dtype=torch.bfloat16),
        "b": torch.tensor([1 + 2j, 3 - 4j]).to(torch.complex128),
    }
    message = Message("m", {}, {"g": numbers})
    assert same(message, wire.decode(wire.encode(message)))


@given(st.builds(Message, st.text(max_size=9), facts, groups))
def test_any_message_comes_back(message):
    assert same(message, wire.decode(wire.encode(message)))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    for raw in (data, wire.MAGIC + data, wire.MAGIC + (41).to_bytes(4, "little") + data):
        with pytest.raises(MessageError):
            wire.decode(raw)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_message_is_read_or_refused(hits):
    data = bytearray(wire.encode(example()))
    for at, value in hits:
        data[at % len(data)] = value
    with suppress(MessageError):
        wire.decode(bytes(data))


@given(st.integers(0, 10**6))
def test_a_message_cut_short_or_too_long_is_refused(at):
    data = wire.encode(example())
    for raw in (data[: at % len(data)], data + b"x" * (1 + at % 70)):
        with pytest.raises(MessageError):
            wire.decode(raw)


json_values = st.recursive(
    plain | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def with_header(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(wire.START + len(text)) % 64)
    return wire.MAGIC + len(text).to_bytes(4, "little") + text + body


@settings(max_examples=300)
@given(
    json_values
    | st.fixed_dictionaries({"kind": st.text(), "facts": json_values, "schema": json_values})
)
def test_a_strange_header_is_read_or_refused(header):
    with suppress(MessageError):
        wire.decode(with_header(header, b"12345678"))


@pytest.mark.parametrize(
    "row, why",
    [
        (["g", "n", "float32", [1 << 30]], "does not fit"),
        (["g", "n", "float32", [1 << 39, 1 << 39, 0]], "shape"),
        (["g", "n", "float32", [-1]], "shape"),
        (["g", "n", "float32", [True]], "shape"),
        (["g", "n", "float32", [1] * 99], "shape"),
        (["g", "n", "object", [1]], "no tensor"),
        (["g", "n", ["float32"], [1]], "no tensor"),
        (["g", 1, "float32", [1]], "no tensor"),
        (["g", "n", "bool", [8]], "truth"),
    ],
)
def test_a_wrong_schema_is_refused(row, why):
    with pytest.raises(MessageError, match=why):
        wire.decode(with_header({"kind": "k", "facts": {}, "schema": [row]}, b"\2" * 8))


def test_nesting_without_end_duplicates_and_size_are_refused():
    deep = b"[" * 100_000 + b" " * (-(wire.START + 100_000) % 64)
    with pytest.raises(MessageError, match="JSON"):
        wire.decode(wire.MAGIC + len(deep).to_bytes(4, "little") + deep)
    row = ["g", "n", "uint8", [1]]
    with pytest.raises(MessageError, match="twice"):
        wire.decode(with_header({"kind": "k", "facts": {}, "schema": [row, row]}, b"1" * 9))
    with pytest.raises(MessageError, match="at most 10"):
        wire.decode(wire.encode(example()), limit=10)


def task() -> Task:
    return Task({"w": torch.ones(2, 3)}, {"c": {"w": torch.zeros(2, 3)}}, 4, 2**63 - 1, 0.1)


def test_a_task_comes_back():
    sent = task()
    got = messages.read_task(wire.decode(wire.encode(messages.task_message(sent, visit="x"))))
    assert (got.round, got.seed, got.lr) == (sent.round, sent.seed, sent.lr)
    assert torch.equal(got.state["w"], sent.state["w"]) and got.extras.keys() == {"c"}


ASKED = ["a", "b/1", "c"]


def outcome(**changes) -> messages.Outcome:
    fields = {
        "ids": ("a", "c"),
        "sent": {"delta": {"w": torch.ones(2, 2, 3).double()}},
        "buffers": {},
        "weight": torch.tensor([1.0, 2.0]),
        "metrics": {"train_loss": torch.tensor([0.5, 0.25]).double()},
    } | changes
    failures = [Failure("b/1", "nonfinite", "its update is not finite")]
    return messages.Outcome(
        Released.received(**fields), failures, {"c": {"m": {"w": torch.ones(1)}}}
    )


@pytest.mark.parametrize("own_types", [False, True])
def test_a_sum_travels_in_float64_or_in_the_type_that_it_was_taken_in(own_types):
    made = outcome(sent={"delta": {"w": torch.ones(1, 2, 3)}}, summed=True)
    sent = messages.outcome_message(made, ASKED, own_types=own_types).groups["sent/delta"]["w"]
    assert sent.dtype == (torch.float32 if own_types else torch.float64)


EXPECTED = messages.Expected({"delta": {"w": (torch.Size((2, 3)), torch.float64)}}, {})


def test_an_outcome_comes_back():
    data = wire.encode(messages.outcome_message(outcome(), ASKED))
    got = messages.read_outcome(wire.decode(data), ASKED)
    assert got.update.ids == ("a", "c") and got.failures == outcome().failures
    assert torch.equal(got.memory["c"]["m"]["w"], torch.ones(1))
    messages.check(got.update, EXPECTED)
    for others in (["a", "b/1"], ["a", "b/1", "d"], [*ASKED, "d"]):
        with pytest.raises(MessageError, match="other clients"):
            messages.read_outcome(wire.decode(data), others)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"sent": {}}, "sends nothing"),
        ({"sent": {"delta": {"v": torch.ones(2, 2, 3).double()}}}, "'v'"),
        ({"sent": {"delta": {"w": torch.ones(2, 3, 2).double()}}}, "'w' is"),
        ({"sent": {"delta": {"w": torch.ones(2, 2, 3)}}}, "float32"),
        ({"sent": {"delta": {"w": torch.full((2, 2, 3), math.nan).double()}}}, "not finite"),
        ({"buffers": {"mean": torch.ones(2)}}, "'mean'"),
        ({"weight": torch.tensor([1.0, -2.0])}, "weight"),
        ({"weight": torch.tensor([1.0, math.nan])}, "weight"),
        ({"weight": torch.tensor([1.0, math.inf])}, "weight"),
        ({"weight": torch.tensor([1.0])}, "weight"),
        ({"metrics": {"train_loss": torch.tensor([math.inf, 0.0])}}, "not finite"),
        ({"metrics": {"rows": torch.ones(2, 50)}}, "figure"),
    ],
)
def test_a_wrong_update_is_refused_by_name(changes, why):
    data = wire.encode(messages.outcome_message(outcome(**changes), ASKED))
    with pytest.raises(MessageError, match=why):
        messages.check(messages.read_outcome(wire.decode(data), ASKED).update, EXPECTED)


@settings(max_examples=200)
@given(facts, groups)
def test_any_facts_and_groups_are_read_or_refused(facts, groups):
    for kind in ("task", "outcome"):
        message = Message(kind, facts, groups)
        with suppress(MessageError):
            if kind == "task":
                messages.read_task(message)
            else:
                messages.check(messages.read_outcome(message, ASKED).update, EXPECTED)


def test_what_others_wrote_is_told_short_and_in_ascii():
    assert wire.short("weight") == "'weight'"
    for cut, most, quotes in ((wire.short, 60, 2), (wire.printable, 300, 0)):
        assert len(cut("x" * most)) == most + quotes
        assert cut("x" * (most + 1)) == cut("x" * most) + "..."
    told = wire.short("\x1b[2J\u0430\n" + "x" * (1 << 20))
    assert len(told) < 100 and told.isascii() and told.isprintable()
    name = "\0" * (1 << 20)
    with pytest.raises(MessageError) as e:
        wire.decode(with_header({"kind": "k", "facts": {}, "schema": [["g", name, "uint8", [9]]]}))
    assert len(str(e.value)) < 400


def test_facts_nested_too_deep_and_a_header_too_large_are_refused():
    deep: list = []
    for _ in range(wire.DEPTH):
        deep = [deep, {}]
    with pytest.raises(MessageError, match="nested more than 16 deep"):
        wire.decode(with_header({"kind": "k", "facts": {"x": deep}, "schema": []}))
    bomb = {"kind": "k", "facts": {"x": [[]] * 2000}, "schema": []}
    assert wire.decode(with_header(bomb)).kind == "k"
    with pytest.raises(MessageError, match="at most 4096"):
        wire.decode(with_header(bomb), header_limit=4096)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 10**400},
        {"lr": True},
        {"privacy": {"clip": 10**400}},
        {"privacy": {"clip": True}},
        {"privacy": {"clip": [1.0]}},
        {"privacy": {str(k): 1.0 for k in range(9)}},
        {"round": 2**70},
        {"round": -1},
        {"round": 1.0},
        {"seed": 2**200},
    ],
    ids=str,
)
def test_numbers_no_task_has_are_refused(changes):
    message = messages.task_message(task())
    assert messages.read_task(message).round == 4
    with pytest.raises(MessageError):
        messages.read_task(Message("task", message.facts | changes, message.groups))
