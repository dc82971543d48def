"""Terms: one digest of all that a round is about, and what nobody should accept."""

from dataclasses import replace

import pytest
import torch

from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import Member, default_threshold, ring, task_digest
from fedtorch.types import Task
from secure_rounds import terms


def test_every_part_of_the_terms_is_in_the_context():
    usual, members = terms(5), terms(5).members
    others = [
        dict(run="run2"),
        dict(round=4),
        dict(attempt=bytes(16)),
        dict(task=bytes(32)),
        dict(threshold=5),
        dict(width=64),
        dict(range=1.5),
        dict(scale=1001),
        dict(size=8),
        dict(neighbours=4),
        dict(members=members[::-1]),
        dict(members=(Member("other", members[0].certificate), *members[1:])),
        dict(members=(Member("site0", bytes(32)), *members[1:])),
        dict(run="ru", members=(Member("nsite0", members[0].certificate), *members[1:])),
    ]
    found = [replace(usual, **o).context for o in others]
    assert len({usual.context, *found}) == len(others) + 1
    assert terms(5).context == usual.context and len(usual.context) == 32


def test_the_thresholds_of_the_note():
    assert [default_threshold(n) for n in (3, 4, 5, 10, 20, 50, 100)] == [3, 3, 4, 7, 14, 34, 67]
    for n in range(3, 200):  # two lists of survivors cannot both have so many of the honest
        assert 2 * default_threshold(n) > n + n // 3 - 1


@pytest.mark.parametrize(
    "bad",
    [
        lambda: terms(2),
        lambda: terms(5, threshold=2),
        lambda: terms(5, threshold=6),
        lambda: terms(5, width=16),
        lambda: terms(5, range=float("nan")),
        lambda: terms(5, range=0.0),
        lambda: terms(5, scale=0),
        lambda: terms(5, scale=2**31),
        lambda: terms(5, size=0),
        lambda: terms(5, round=-1),
        lambda: terms(5, attempt=b""),
        lambda: terms(5, task=b""),
        lambda: terms(9, neighbours=3),
        lambda: terms(9, neighbours=0),
        lambda: terms(9, neighbours=4, threshold=6),
        lambda: terms(3, members=(terms(3).members[0],) * 3),
        lambda: terms(3, members=(*terms(3).members[:2], Member("site0", b"x" * 32))),
        lambda: terms(3, members=(*terms(3).members[:2], Member("site9", b""))),
    ],
    ids=[
        "two", "low threshold", "high threshold", "width", "nan", "no range", "no scale", "wraps", "size",
        "round", "attempt", "task", "odd", "none near", "threshold of the ring", "one thrice", "name twice",
        "no fingerprint",
    ],
)  # fmt: skip
def test_terms_that_nobody_should_accept(bad):
    with pytest.raises(Refused) as e:
        bad().check()
    assert e.value.kind == "terms"


def test_a_client_that_is_not_in_the_roster_has_no_place():
    assert terms(3).place("site2") == 2
    with pytest.raises(Refused, match="site9 is not in the roster"):
        terms(3).place("site9")


def task(**change):
    state = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(3), "n": torch.tensor(4)}
    usual = Task(state, {"c": {"w": torch.ones(1, 2)}}, 2, 7, 0.1, {"clip": 1.0, "noise": 0.5})
    return replace(usual, **change)


def test_the_digest_of_a_task_is_that_of_all_that_is_trained_on():
    usual = task()
    state, moved = usual.state, usual.state["w"].clone()
    moved[0, 1] += 2**-20
    others = [
        dict(state=state | {"w": moved}),
        dict(state=state | {"w": state["w"].double()}),
        dict(state=state | {"w": state["w"].view(2, 1)}),
        dict(state={"v": state["w"], "b": state["b"], "n": state["n"]}),
        dict(state=state | {"n": torch.tensor(5)}),
        dict(extras={}),
        dict(extras={"d": usual.extras["c"]}),
        dict(extras={"c": {"w": -torch.ones(1, 2)}}),
        dict(round=3),
        dict(seed=8),
        dict(lr=0.1 + 2**-56),
        dict(visit=1),
        dict(privacy={"clip": 1.0, "noise": 0.25}),
    ]
    found = [task_digest(task(**o)) for o in others]
    assert len({task_digest(usual), *found}) == len(others) + 1
    again = task(state=dict(reversed(state.items())), privacy=dict(reversed(usual.privacy.items())))
    assert task_digest(again) == task_digest(usual)


def test_a_ring_is_a_draw_that_keys_decide():
    usual = terms(12, neighbours=4)
    keys = {k: bytes([k]) * 96 for k in range(12) if k != 5}
    near = ring(usual, keys)
    assert sorted(near) == sorted(keys)
    for place, others in near.items():
        assert len(others) == 4 and place not in others
        assert all(place in near[j] for j in others)
    seen, more = {0}, [0]
    while more:  # one ring, not several
        more = [j for k in more for j in near[k] if j not in seen]
        seen |= {*more}
    assert seen == {*keys}
    assert ring(usual, keys | {3: b"k" * 96}) != near
    assert ring(replace(usual, round=9), keys) != near
    few = ring(usual, {k: keys[k] for k in (0, 1, 2, 3, 4)})
    assert few[2] == [0, 1, 3, 4]
    assert ring(terms(4), {k: keys[k] for k in range(4)})[1] == [0, 2, 3]
