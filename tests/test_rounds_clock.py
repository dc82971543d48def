"""Simulated time: devices of a trace, when they are there, lines."""

from dataclasses import replace

import pytest

from conftest import make_clients, mlp
from fedtorch import ConfigError, Recipe, Server
from fedtorch.rounds.buffered import Buffered
from fedtorch.rounds.clock import Clock, Trace, begins, shares
from fedtorch.rounds.synchronous import Synchronous

TEXT = """device,speed,megabyte,from,to
phone,2.5,4,10,20
phone,,,50,80
desk,1,,,
"""


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text(TEXT)
    return Trace(path=str(path), start=1.0, example=0.5, megabyte=2.0)


def test_a_device_of_the_file_has_its_speed_and_line(trace):
    # 1 second, 4 examples and 3 megabytes
    assert trace.seconds(0, 0, 4, 3_000_000, 9) == (1 + 2 + 12) * 2.5
    assert trace.seconds(1, 0, 4, 3_000_000, 9) == 1 + 2 + 6
    # devices are dealt out in turn
    assert trace.seconds(2, 0, 4, 3_000_000, 9) == trace.seconds(0, 7, 4, 3_000_000, 9)


def test_a_device_is_there_in_its_times_which_come_again(trace):
    asked = [0, 10, 15, 20, 49, 60, 80, 90, 95, 135]
    assert [trace.begins(0, t) for t in asked] == [10, 10, 15, 50, 50, 60, 90, 90, 95, 135]
    assert trace.begins(1, 33.0) == 33.0 and begins(Clock(), 0, 33.0) == 33.0
    day = replace(trace, period=100)
    assert [day.begins(0, t) for t in (85, 109, 112)] == [110, 110, 112]


def test_rounds_wait_for_who_is_away_and_others_are_asked_first(trace):
    clients = make_clients([4, 4, 4])
    server = Server(mlp(), clients, Recipe(epochs=1), pace=Synchronous(clock=trace), seed=1)
    # the phones can be asked from 10 s on, and take 2.5 x (1 + 2 + 0.01 or so)
    told = server.round()
    assert 17.5 < told["simulated_seconds"] < 18
    pace = Buffered(size=3, concurrency=1, clock=trace)
    free = Server(mlp(), clients, Recipe(epochs=1), pace=pace, seed=1)
    assert free.round()["cohort"] == ["c1", "c1", "c1"]


def test_lines_differ_beside_speeds_and_stay():
    clock = Clock(example=0.0, megabyte=1.0, line_spread=1.0)
    found = [clock.seconds(k, v, 1, 1_000_000, 3) for k in (0, 1) for v in (0, 1)]
    assert found[0] == found[1] != found[2] == found[3]
    assert replace(clock, line_spread=0.0).seconds(0, 0, 1, 1_000_000, 3) == 1.0


def test_counts_are_told_by_their_ends_and_middle():
    wanted = {"visits_min": 0.0, "visits_median": 2.5, "visits_max": 9.0}
    assert shares([9, 2, 0, 3]) == wanted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("device,pace\na,1\n", "'pace' is not of the columns"),
        ("speed\n1\n", "'device' is not of the columns"),
        ("device,speed\na,fast\n", "line 2: speed must be a number >= 0, got 'fast'"),
        ("device,from,to\na,3,1\n", "line 2: from must come before to"),
        ("device,from,to\na,3,\n", "line 2: from must come before to"),
        ("device,from\na,3\n", "from and to together"),
        ("device,speed\n", "needs a line for each device"),
    ],
    ids=["column", "nobody", "words", "backwards", "half", "no end", "empty"],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, text, why):
    path = tmp_path / "devices.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        Trace(path=str(path))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"pace.clock.path 'no.csv' cannot be read"):
        Trace(path="no.csv")
    with pytest.raises(ConfigError, match=r"trace needs pace\.clock\.path"):
        Trace()
