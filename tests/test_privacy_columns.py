"""Statistics of columns: what one record, or one client, can change; their noise; their price."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedtorch import ConfigError, Recipe, Server, divide
from fedtorch.__main__ import main
from fedtorch.data import Csv, Iid, prepared
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel, columns
from fedtorch.privacy.accounting import Event, epsilon
from fedtorch.run import checkpoint

NAN = float("nan")
KINDS = ("quartiles", "sums")


def statistics(kind: str, width: int) -> columns.Statistics:
    return columns.KINDS[kind](np.full(width, -1.0), np.full(width, 1.0))


def total(plan, vectors, ids, norm: float) -> np.ndarray:
    """What is released of the clients' vectors."""
    sent = [plan.portion(rows, id, norm) for rows, id in zip(vectors, ids, strict=True)]
    return plan.total(sent, norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_record_is_longer_than_the_norm_and_one_is_as_long(kind, width):
    corners = (-1.0, -0.5, 0.0, 0.5, 1.0, -7.0, 1e300, -math.inf, math.inf, NAN)
    records = np.array(list(itertools.product(corners, repeat=width)))
    found = statistics(kind, width)
    lengths = np.linalg.norm(found.vectors(records), axis=1)
    wanted = math.sqrt(width) if kind == "quartiles" else math.sqrt(1 + 1.25 * width)
    beyond, ends = np.full((2, width), [[-7.0], [7.0]]), np.full((2, width), [[-1.0], [1.0]])
    assert (found.vectors(beyond) == found.vectors(ends)).all()
    assert lengths.max() == pytest.approx(wanted) == pytest.approx(found.norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "plan", [SampleLevel(rounds=1, insecure_seed=3), ClientLevel(rounds=1, insecure_seed=3)]
)
def test_one_unit_more_moves_the_sum_by_the_norm_at_most(kind, plan):
    plan = type(plan)(rounds=1, statistics_noise=1e-9, insecure_seed=3)
    rng = np.random.default_rng(0)
    found = statistics(kind, 2)
    rows = [rng.normal(size=(n, 2)) for n in (5, 8, 3, 1)]
    whole = total(plan, [found.vectors(r) for r in rows], "abcd", found.norm)
    for corner in itertools.product((-1.0, 0.0, 3.0, NAN), repeat=2):
        if plan.unit == "example":
            more = [*rows[:3], np.concatenate([rows[3], [corner]])]
            other = total(plan, [found.vectors(r) for r in more], "abcd", found.norm)
        else:  # a client with any number of records
            more = [*rows, np.tile(corner, (1000, 1))]
            other = total(plan, [found.vectors(r) for r in more], "abcde", found.norm)
        assert np.linalg.norm(other - whole) <= found.norm + 1e-4
    wild = [np.full((2, 7), 1e9), np.full((2, 7), NAN)]  # whatever a vector is, its norm is bounded
    assert np.linalg.norm(total(plan, wild, "ab", 1.0)) <= 2 + 1e-6


@pytest.mark.parametrize("plan", [SampleLevel, ClientLevel])
def test_noise_has_the_claimed_size_also_where_there_is_nothing_to_hide(plan):
    one = plan(rounds=1, statistics_noise=5.0)
    empty = [np.zeros((0, 4000))] * 3
    norm = 2.0
    drawn = total(one, empty, "abc", norm), total(one, empty, "abc", norm)
    # under sample-level privacy each of the three clients adds noise of full size
    std = 5.0 * norm * (math.sqrt(3) if one.unit == "example" else 1)
    for found in drawn:
        assert found.std() == pytest.approx(std, rel=0.05) and abs(found.mean()) < std / 15
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.08  # fresh each time
    known = total(plan(rounds=1, statistics_noise=5.0, insecure_seed=1), empty, "abc", norm)
    assert known.std() == pytest.approx(std, rel=0.05)  # no two clients share a stream
    alone = total(one, empty[:1], "a", norm)
    assert alone.std() == pytest.approx(5.0 * norm, rel=0.05)


def test_without_noise_they_are_numpys():
    rng = np.random.default_rng(0)
    rows = np.clip(rng.normal(0.2, 0.3, (4000, 3)), -1, 1)
    rows[::7, 1] = NAN
    sums = statistics("sums", 3)
    center, width = sums.read(sums.vectors(rows).sum(0))
    assert center == pytest.approx(np.nanmean(rows, 0), abs=1e-12)
    assert width == pytest.approx(np.nanstd(rows, 0), abs=1e-12)
    quartiles = statistics("quartiles", 3)
    center, width = quartiles.read(quartiles.vectors(rows).sum(0))
    assert center == pytest.approx(np.nanmedian(rows, 0), abs=0.02)
    assert width == pytest.approx(np.nanstd(rows, 0), abs=0.02)
    low, high = np.array([10.0, -3.0, 0.0]), np.array([20.0, 9.0, 1.0])
    for kind in KINDS:  # the bounds only shift and stretch
        moved = columns.KINDS[kind](low, high)
        plain = statistics(kind, 3)
        units = (rows + 1) / 2 * (high - low) + low
        there, wide = moved.read(moved.vectors(units).sum(0))
        center, width = plain.read(plain.vectors(rows).sum(0))
        assert there == pytest.approx((center + 1) / 2 * (high - low) + low)
        assert wide == pytest.approx(width / 2 * (high - low))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_noise_gives_numbers_that_can_be_divided_by(kind):
    found, rng = statistics(kind, 4), np.random.default_rng(0)
    for _ in range(200):
        size = len(found.vectors(np.zeros((1, 4)))[0])
        center, width = found.read(rng.normal(size=size) * 50)
        assert (np.abs(center) <= 1).all() and (width >= 0.01).all() and (width < 2).all()
    constant = found.vectors(np.full((1000, 4), 0.3)).sum(0)
    center, width = found.read(constant)
    assert (width > 0).all() and center == pytest.approx(np.full(4, 0.3), abs=0.1)


def test_normal_columns_are_found_as_well_as_the_design_note_has_it():
    # 3,000 records, one column, noise 10, 16 bins over [0, 120]: the note's mean errors are 0.2 and 1
    rng, plan = (
        np.random.default_rng(1),
        SampleLevel(rounds=1, statistics_noise=10.0, insecure_seed=1),
    )
    errors = []
    for k in range(30):
        rows = [rng.normal(54, 9, (3000, 1))]
        *found, said = columns.released(plan, "quartiles", [(0, 120)], rows, [str(k)])
        errors.append(np.ravel(found))
        assert not said
    center, width = np.abs(np.array(errors) - (54, 9)).mean(0)
    assert center < 0.5 and width < 1.0


@pytest.mark.parametrize(
    "noise, wanted, grown",
    [(2.0, 8.3993, 1.7456), (4.0, 8.0987, 1.6966), (10.0, 8.0137, 1.6838)],
)
def test_their_price_beside_the_default_run(noise, wanted, grown):
    events = [Event("gaussian", 1.681820, 0.2, 150), Event("gaussian", noise)]
    assert epsilon(events, 1e-5) == pytest.approx(wanted, abs=0.02)
    plan = SampleLevel(statistics_noise=noise, rounds=30)
    assert plan.calibrated(30) == pytest.approx(grown, abs=0.002)
    assert 7.98 < plan.planned(plan.calibrated(30), 30) <= 8
    assert plan.once == (Event("gaussian", noise),)


def test_a_plan_without_room_for_them_is_refused():
    assert SampleLevel(rounds=3).once == ()
    closed = ClientLevel(rounds=4, statistics_noise=2.0)
    assert closed.planned(closed.calibrated(4), 4) == pytest.approx(8.0, abs=0.02)
    with pytest.raises(
        ConfigError, match=r"beside what is released before them: .* is the smallest"
    ):
        SampleLevel(epsilon=1.0, rounds=3, statistics_noise=1.0).calibrated(3)
    with pytest.raises(
        ConfigError, match=r"LocalDP releases no statistics of columns: .*dataset.bounds"
    ):
        LocalDP(rounds=1, statistics_noise=10.0)
    with pytest.raises(ConfigError, match=r"privacy.statistics_noise must be"):
        SampleLevel(rounds=1, statistics_noise=0.0)
    with pytest.raises(ConfigError, match="need a plan that pays for them"):
        columns.released(SampleLevel(rounds=1), "sums", [(0, 1)], [np.zeros((2, 1))], "a")


def test_statistics_that_are_mostly_noise_are_said_to_be():
    rng, few = (
        np.random.default_rng(1),
        ClientLevel(rounds=1, statistics_noise=9.0, insecure_seed=1),
    )
    rows = [rng.normal(54, 9, (20, 2)) for _ in range(300)]
    ids = [str(k) for k in range(300)]
    for kind in KINDS:
        said = [columns.released(few, kind, [(0, 120)] * 2, rows[:n], ids[:n])[2] for n in (3, 300)]
        assert "mostly noise" in said[0] and not said[1]


def table(folder: Path, n: int = 300) -> str:
    rng = np.random.default_rng(0)
    y, age = np.arange(n) % 2, rng.normal(54, 9, n)
    rows = (
        f"{a + 9 * t:.1f},{t + rng.normal():.3f},{'?' if i % 9 == 0 else 200 + 40 * t},{'abc'[i % 3]},{t}"
        for i, (a, t) in enumerate(zip(age, y, strict=True))
    )
    (folder / "t.csv").write_text("age,dose,chol,ward,sick\n" + "\n".join(rows) + "\n")
    return str(folder / "t.csv")


PRIVATE = {
    "client": "ward",
    "kind": "binary",
    "standardize": "private",
    "bounds": ["age=0:120", "chol=0:600"],
    "missing": "median",
}


@pytest.mark.parametrize("statistics", KINDS)
@pytest.mark.parametrize("plan", [SampleLevel, ClientLevel])
def test_clients_from_python_are_scaled_and_the_server_charges_for_it(tmp_path, plan, statistics):
    data = Csv(table(tmp_path), **PRIVATE, statistics=statistics).load(0)
    before = data.train.tensors[0]
    one = plan(rounds=2, statistics_noise=10.0, insecure_seed=7)
    many = {"partition": Iid(), "count": 40} if plan is ClientLevel else {}
    clients, test = divide(data, **many, plan=one)
    x = torch.cat([c.data.tensors[0] for c in clients])
    assert x.shape == before.shape and torch.isfinite(x).all()
    # dose is in no bounds; age is as it was but for one center and one width; test rows go along
    assert torch.equal(x[:, 1].sort()[0], before[:, 1].sort()[0])
    line = np.polyfit(before[:, 0].sort()[0], x[:, 0].sort()[0], 1)
    assert np.polyval(line, before[:, 0].sort()[0]) == pytest.approx(x[:, 0].sort()[0], abs=1e-4)
    assert np.polyval(line, data.test.tensors[0][:, 0]) == pytest.approx(
        test.tensors[0][:, 0], abs=1e-4
    )
    assert (x[:, 2] == 0).sum() >= (before[:, 2] == 0).sum() > 0  # the center fills what is missing
    server = Server(
        nn.Linear(3, 1), clients, Recipe(privacy=one, loss=lambda o, y: (o[:, 0] - y) ** 2)
    )
    assert [(e.round, e.event, e.clients) for e in server.private.ledger.entries] == [
        (-1, Event("gaussian", 10.0), None)
    ]
    alone = epsilon([Event("gaussian", 10.0)], 1e-5)
    assert server.private.spent() == pytest.approx(alone)
    for _ in server.rounds(3):  # there is room for two
        pass
    assert server.round_number == 2 and 7.9 < server.private.spent() <= 8
    assert server.private.ledger.spent(1e-5) == pytest.approx(server.private.spent(), abs=0.03)


def test_data_that_wait_are_paid_for_by_a_plan_or_refused(tmp_path):
    data = Csv(table(tmp_path), **PRIVATE).load(0)
    with pytest.raises(ConfigError, match="private needs a privacy plan, which pays for it"):
        divide(data)
    with pytest.raises(ConfigError, match="need a plan that pays for them"):
        divide(data, plan=SampleLevel(rounds=1))
    plain = Csv(table(tmp_path), client="ward", kind="binary", missing="drop").load(0)
    with pytest.raises(ConfigError, match="but the data ask for none"):
        divide(plain, plan=SampleLevel(rounds=1, statistics_noise=10.0))
    derived = Csv(table(tmp_path), client="ward", kind="binary", missing="mean").load(0)
    with pytest.raises(
        ConfigError, match=r"the mean of age, dose, chol .* voids the privacy claim"
    ):
        divide(derived, plan=SampleLevel(rounds=1))


TRAIN = [
    *("train", "--dataset", "csv", "--dataset.path", "t.csv", "--dataset.client", "ward"),
    *("--dataset.kind", "binary", "--dataset.standardize", "private", "--model", "logistic"),
    *(
        "--dataset.bounds",
        "age=0:120,chol=0:600",
        "--dataset.missing",
        "median",
        "--tracking",
        "none",
    ),
]


@pytest.mark.parametrize("plan", ["sample", "client"])
def test_a_run_pays_once_and_goes_on_with_what_it_paid_for(tmp_path, monkeypatch, capsys, plan):
    monkeypatch.chdir(tmp_path)
    table(tmp_path)
    more = ["--privacy", plan, "--privacy.rounds", "4", "--run-dir", "r"]
    assert main([*TRAIN, *more, "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert "age, chol scaled by private median and quartiles" in said
    assert "before round 0: centers and widths of columns, once, noise multiplier 10 by" in said
    lines = [json.loads(line) for line in Path("r/ledger.jsonl").read_text().splitlines()[1:]]
    assert [line["round"] for line in lines] == [-1, 0, 1] and lines[0]["noise"] == 10.0
    first = prepared.load(Path("r"))  # noise is new in every process: a second draw would show
    assert first.preparation.fill[2] == first.preparation.mean[2]
    assert main(["train", "--run-dir", "r", "--resume", "--rounds", "4"]) == 0
    lines = [json.loads(line) for line in Path("r/ledger.jsonl").read_text().splitlines()[1:]]
    assert [line["round"] for line in lines] == [-1, 0, 1, 2, 3]
    assert prepared.load(Path("r")) == first
    report = json.loads(Path("r/privacy.json").read_text())
    assert report["rounds_charged"] == 4 and 7.9 < report["epsilon_spent"] <= 8
    assert "noise multiplier 10" in report["released_before_round_0"]
    assert checkpoint.load(Path("r/checkpoints"))["privacy"]["ledger"]["count"] == 5

    capsys.readouterr()
    assert main(["eval", "r", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    summary = json.loads(Path("r/summary.json").read_text())
    assert evaluated["test_loss"] == pytest.approx(summary["test_loss"])
    Path("new.csv").write_text("age,dose,chol\n70,2,?\n40,-1,200\n")
    assert main(["predict", "r", "new.csv", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

    # what was released is in data.json alone: without it the run cannot go on, nor pay again
    Path("r/data.json").rename("r/gone.json")
    assert main(["train", "--run-dir", "r", "--resume", "--rounds", "5"]) == 2
    assert "data.json is gone, which holds the private statistics" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--privacy", "none"], "give --dataset.standardize true"),
        (["--privacy", "local"], "LocalDP releases no statistics of columns"),
        (["--dataset.standardize", "false", "--privacy.statistics-noise", "9"], "ask for none"),
        (["--dataset.bounds", "chol=0:600"], "line 2: column 'age' holds '?', not a number"),
    ],
)
def test_what_cannot_be_private_is_refused_before_training(
    tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.chdir(tmp_path)
    text = Path(table(tmp_path)).read_text().split("\n")
    if "chol=0:600" in more:
        text[1] = "?" + text[1][4:]
    else:
        text = [line.replace("?", "220") for line in text]
        more = [*more, "--dataset.missing", "drop"]
    Path("t.csv").write_text("\n".join(text))
    assert main([*TRAIN, "--run-dir", "r", *more]) == 2
    assert message in capsys.readouterr().err and not Path("r").exists()
