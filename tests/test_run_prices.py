"""What several runs over the same data cost together, held to the accountant on all their charges."""

import json
import re
from pathlib import Path

import pytest

from fedtorch.__main__ import main
from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.rounds.history import History
from fedtorch.run import prices
from fedtorch.run.prices import together
from fedtorch.run.results import Saved

ONE, TWO = Event("gaussian", 1.1, 0.2, 5), Event("gaussian", 0.9, 0.2, 5)


def ledger(*charges: tuple[Event, list[str] | None], unit: str = "example") -> Ledger:
    made = Ledger(unit=unit)
    for round, (event, clients) in enumerate(charges):
        made.charge(round, event, clients)
    return made


def cost(*events: Event) -> float:
    return epsilon(events, 1e-5)


def test_the_price_is_that_of_all_charges_of_who_is_charged_most():
    a = ledger((ONE, ["x", "y"]), (ONE, ["x"]))
    b = ledger((TWO, ["y"]))
    x, y = cost(ONE, ONE), cost(ONE, TWO)
    assert together([a, b], True, 1e-5, "prv") == pytest.approx(max(x, y), rel=1e-9)
    # who is who is not known: whoever is charged most in one may be charged most in the other
    assert together([a, b], False, 1e-5, "prv") == pytest.approx(cost(ONE, ONE, TWO), rel=1e-9)


@pytest.mark.parametrize("same", [True, False])
def test_what_everybody_is_charged_counts_for_each(same):
    whole = ledger((ONE, None), unit="client")
    assert together([whole] * 3, same, 1e-5, "prv") == pytest.approx(cost(ONE, ONE, ONE), rel=1e-9)
    assert together([ledger(), ledger()], same, 1e-5, "prv") == 0.0
    mixed = together([whole, ledger((TWO, ["x"]))], same, 1e-5, "prv")
    assert mixed == pytest.approx(cost(ONE, TWO), rel=1e-9)


QUICK = ["train", "--model", "logistic", "--clients", "4", "--tracking", "none", "--rounds", "2"]
QUICK += ["--privacy", "sample", "--privacy.epsilon", "3"]


def charged(*folders: Path) -> float:
    """Of the first client, whom every round asks: straight from the journals."""
    lines = [json.loads(x) for f in folders for x in (f / "ledger.jsonl").read_text().splitlines()]
    own = [x for x in lines if "0" in x.get("clients", ())]
    return epsilon([Event(x["mechanism"], x["noise"], x["rate"], x["steps"]) for x in own], 1e-5)


def test_a_sweep_opens_and_ends_with_what_its_runs_cost_together(tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main([*QUICK, "--run-dir", str(folder), "--sweep", "lr=0.5,1,2"]) == 0
    out = capsys.readouterr().out
    want = charged(*folder.iterdir())
    assert want > 4.5
    first = out.splitlines()[0]
    assert first.startswith("privacy: 3 runs over the same data will cost epsilon")
    assert float(re.search(r"epsilon ([\d.]+) together", first)[1]) == pytest.approx(want, abs=1e-3)
    (last,) = re.findall(
        r"privacy: 3 runs .* cost epsilon ([\d.]+) together", out.split("run 3 of 3")[1]
    )
    assert float(last) == pytest.approx(want, abs=1e-3)
    one, two = str(folder / "lr=1"), str(folder / "lr=2")
    assert main(["runs", str(folder)]) == 0
    assert f"cost epsilon {want:.3f} together" in capsys.readouterr().out
    assert main(["compare", one, two]) == 0
    pair = f"2 runs over the same data (digits) cost epsilon {charged(Path(one), Path(two)):.3f}"
    assert pair in capsys.readouterr().out
    assert main(["compare", one, two, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) and pair in shown.err
    assert main(["compare", one, one]) == main(["runs", one]) == 0
    assert "together" not in capsys.readouterr().out, "one run is one run"
    (folder / "lr=1/ledger.jsonl").write_text("nothing\n")
    assert main(["runs", str(folder)]) == 0
    assert "cost together is not known" in capsys.readouterr().out


def test_runs_over_other_data_or_without_privacy_have_no_price_together(tmp_path, capsys):
    csv = "a,b,label\n" + "".join(f"{i % 9}.5,{i % 5}.5,{i % 2}\n" for i in range(80))
    (tmp_path / "t.csv").write_text(csv)
    table = ["--dataset", "csv", "--dataset.path", str(tmp_path / "t.csv")]
    for name, more in (("a", []), ("b", table), ("c", ["--privacy", "none"])):
        words = [w for w in QUICK if "none" not in more or not w.startswith("--privacy.")]
        words = [w for w in words if "none" not in more or w != "3"]
        assert main([*words, *more, "--run-dir", str(tmp_path / "runs" / name)]) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert "together" not in capsys.readouterr().out


def test_an_unnamed_sweep_that_cannot_be_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--sweep", "strategy=fedavg,fedavgg"]) == 2
    assert "unknown strategy" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


def test_the_same_examples_read_in_another_way_are_the_same_data(tmp_path, capsys):
    csv = "a,b,label\n" + "".join(f"{i % 9}.5,{i % 5}.5,{i % 2}\n" for i in range(80))
    (tmp_path / "t.csv").write_text(csv)
    quick = [*QUICK, "--dataset", "csv"]
    for swept in (
        ["--dataset.path", str(tmp_path / "t.csv"), "dataset.test_fraction=0.1,0.3"],
        [f"dataset.path={tmp_path / 't.csv'},{tmp_path / '.' / '..' / tmp_path.name / 't.csv'}"],
    ):
        folder = tmp_path / f"sweep{len(swept)}"
        words = [*quick, *swept[:-1], "--run-dir", str(folder), "--sweep", swept[-1]]
        assert main(words) == 0
        out = capsys.readouterr().out
        want = charged(*folder.iterdir()) if len(swept) == 1 else 0.0
        for when in ("will cost", "cost"):
            found = re.search(rf"2 runs over the same data.* {when} epsilon ([\d.]+) together", out)
            assert found and float(found[1]) > want - 1e-3 > -1 and float(found[1]) > 3.5


def test_a_sweep_says_what_no_sum_of_epsilons_does(tmp_path, capsys):
    few = ["train", "--model", "logistic", "--clients", "4", "--rounds", "1", "--tracking", "none"]
    swept = ["--sweep", "privacy=none,sample,local", "--run-dir", str(tmp_path / "s")]
    assert main([*few, *swept]) == 0
    out = capsys.readouterr().out
    assert "privacy: LocalDP and SampleLevel protect different things" in out
    assert "privacy: 1 of 3 runs over the same data have none" in out


def test_the_best_of_a_search_is_added_with_all_that_it_cost(tmp_path):
    def saved(name, **options):
        folder = tmp_path / name
        ledger = Ledger(folder / "ledger.jsonl")
        ledger.charge(0, Event("gaussian", 2.0, 1.0, 4))
        return Saved(folder, options, History(), {"epsilon": 6.5})

    runs = [saved("a"), saved("b", **{"privacy.search": 10})]
    (line,) = prices.spent(runs)
    alone = epsilon([Event("gaussian", 2.0, 1.0, 4)], 1e-5)
    assert f"cost epsilon {alone + 6.5:.3f} together at delta 2e-05" in line
