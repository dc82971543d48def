"""The commands that price a run without training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedtorch.__main__ import main
from fedtorch.privacy.accounting.events import Event, calibrate, epsilon, over_rounds
from fedtorch.types import ConfigError


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        "--noise-multiplier",
        "1.1",
        "--sample-rate",
        "0.01",
        "--steps",
        "100",
        "--delta",
        "1e-5",
    ]
    out = json.loads(answer(capsys, "epsilon", *run, "--json"))
    event = Event("gaussian", 1.1, 0.01, 100)
    assert out == {
        "epsilon": epsilon([event], 1e-5),
        "epsilon_rdp": epsilon([event], 1e-5, "rdp"),
        "delta": 1e-5,
        "accountant": "prv",
        "noise_multiplier": 1.1,
        "sample_rate": 0.01,
        "steps": 100,
    }
    assert out["epsilon"] < out["epsilon_rdp"]
    text = answer(capsys, "epsilon", *run)
    assert f"epsilon {out['epsilon'] + 5e-5:.4f} at" in text
    assert "one example (or client) added or removed" in text
    by_rdp = json.loads(answer(capsys, "epsilon", *run, "--accountant", "rdp", "--json"))
    assert by_rdp["epsilon"] == by_rdp["epsilon_rdp"] == out["epsilon_rdp"]


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    run = "--noise-multiplier 1.1 --sample-rate 0.00426666666 --steps 14062 --delta 1e-5 --json"
    out = json.loads(answer(capsys, "epsilon", *run.split()))
    assert out["epsilon"] == pytest.approx(2.39174, abs=1e-3)
    assert out["epsilon_rdp"] == pytest.approx(2.596556, abs=1e-4)


def test_no_noise_is_said_to_be_no_privacy(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--noise-multiplier", "0", "--steps", "3"]
    assert "epsilon inf" in answer(capsys, "epsilon", *run)
    assert json.loads(answer(capsys, "epsilon", *run, "--json"))["epsilon"] is None


def test_noise(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--epsilon", "3", "--sample-rate", "0.05", "--steps", "200", "--delta", "1e-4"]
    out = json.loads(answer(capsys, "noise", *run, "--json"))
    assert out["noise_multiplier"] == calibrate(3, 1e-4, 0.05, 200)
    assert 2.98 < out["epsilon"] <= 3 == out["target_epsilon"]
    assert "x clip norm, 200 steps, rate 0.05" in answer(capsys, "noise", *run)


def test_what_is_printed_is_rounded_up(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "noise", "--epsilon", "1", "--steps", "1")
    assert "noise 3.7307 x" in out  # 3.730632...


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    run = [
        "plan",
        "--noise-multipliers",
        "2,4",
        "--rounds",
        "20",
        "--steps-per-round",
        "5",
        "--sample-rate",
        "1",
    ]
    out = json.loads(answer(capsys, *run, "--plot", str(picture), "--json"))
    assert out["rounds"] == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert [c["noise_multiplier"] for c in out["curves"]] == [2, 4]
    assert out["curves"][0]["epsilon"][-1] == epsilon([Event("gaussian", 2, 1, 100)], 1e-5)
    assert out["curves"] == [
        {"noise_multiplier": z, "epsilon": e}
        for z, e in over_rounds([2, 4], out["rounds"], 5, 1.0, 1e-5).items()
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = answer(capsys, *run).splitlines()
    assert text[1].split() == ["rounds", "noise", "2", "noise", "4"]
    assert [line.split()[0] for line in text[2:]] == [str(r) for r in out["rounds"]]


def test_a_plan_with_figures_inside_the_budget_costs_what_the_run_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = ["plan", "--noise-multipliers", "2", "--rounds", "20", "--json"]
    figures = ["--figures-every", "8", "--figures-noise", "5"]
    (curve,) = json.loads(answer(capsys, *run, *figures))["curves"]
    figured = [[], [Event("gaussian", 5, 1, 1)], [Event("gaussian", 5, 1, 2)]]
    own = [
        epsilon([Event("gaussian", 2, 1, r), *some], 1e-5)
        for r, some in zip([7, 8, 20], figured, strict=True)
    ]
    (found,) = over_rounds([2], [7, 8, 20], 1, 1.0, 1e-5, figures=(8, 5.0)).values()
    assert found == own and curve["epsilon"][-1] == own[-1]
    for wrong in (figures[:2], figures[2:], [*figures, "--search", "3"]):
        assert main([*run, *wrong]) == 2
        assert "figures" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["epsilon", "noise", "plan"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = answer(capsys, command, "--help")
    assert text.startswith(f"usage: fedtorch {command} [options]")
    assert "--delta" in text
    assert max(map(len, text.splitlines())) < 110


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("epsilon --steps 3", "needs --noise-multiplier"),
        ("epsilon --noise-multiplier 1", "needs --steps"),
        ("epsilon --noise-multiplier x --steps 3", "--noise-multiplier must be a number, got 'x'"),
        (
            "epsilon --noise-multiplier -1 --steps 3",
            "noise-multiplier must be a finite number >= 0",
        ),
        ("epsilon --noise-multiplier nan --steps 3", "noise-multiplier must be"),
        ("epsilon --noise-multiplier 1 --steps 0", "steps must be a positive whole number, got 0"),
        ("epsilon --noise-multiplier 1 --steps 2.5", "--steps must be a whole number, got '2.5'"),
        ("epsilon --noise-multiplier 1 --steps 3 --delta 1", "delta must be in (0, 1)"),
        ("epsilon --noise-multiplier 1 --steps 3 --sample-rate 2", "sample-rate must be in (0, 1]"),
        (
            "epsilon --noise-multiplier 1 --steps 3 --accountant gdp",
            "accountant 'gdp' is an approximation",
        ),
        (
            "epsilon --noise-multiplier 1 --steps 3 --sigma 1",
            "has no option --sigma; it has --noise-mult",
        ),
        ("epsilon 3", "takes no argument, but got '3'"),
        ("noise --epsilon 0 --steps 3", "target_epsilon must be a finite number > 0"),
        (
            "noise --epsilon 0.001 --steps 10 --sample-rate 0.01 --accountant rdp",
            "0.003501 is the smallest",
        ),
        ("plan --rounds 0", "--rounds must be a positive whole number"),
        ("plan --noise-multipliers 1;2", "--noise-multipliers must be numbers with commas"),
        ("plan --steps-per-round 0", "steps must be a positive whole number"),
        ("plan --sample-rate 1 --plot plan.xyz", "--plot plan.xyz: cannot be drawn"),
    ],
)
def test_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: str, message: str
) -> None:
    assert main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_over_rounds_refuses_bad_rounds() -> None:
    with pytest.raises(ConfigError, match="rounds must be a positive whole number, got 0"):
        over_rounds([1.0], [0], 1, 1.0, 1e-5)


def test_as_a_module_and_without_opacus_where_it_is_not_needed() -> None:
    run = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "fedtorch",
        "noise",
        "--epsilon",
        "1",
        "--steps",
        "1",
    ]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "noise 3.7307 x clip norm" in done.stdout
    assert "fedtorch.privacy.accounting.events" in done.stderr  # what was imported
    assert "opacus" not in done.stderr


def test_the_whole_claim(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["epsilon", "--noise-multiplier", "1", "--steps", "1", "--curve", "--group", "3"]
    out = json.loads(answer(capsys, *run, "--json"))
    assert out["gaussian_mu"] == pytest.approx(1)
    assert out["epsilon_replace_one"] == pytest.approx(9.997256, abs=1e-5)
    assert out["trade_off_curve"][1]["true_positive_rate"] == pytest.approx(0.092361, abs=2e-6)
    picture, numbers = tmp_path / "curve.png", tmp_path / "curve.csv"
    text = answer(capsys, *run, "--plot", str(picture))
    assert "Gaussian: mu 1.0000" in text
    assert "epsilon 9.9973 if one is replaced, 16.6755 for 3 together" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    answer(capsys, *run, "--plot", str(numbers))
    head, *rows = numbers.read_text().splitlines()
    assert head == "false_positive_rate,true_positive_rate_at_most"
    assert rows[-1] == "1,1"
    bare = json.loads(answer(capsys, *run[:2], "0", *run[3:], "--json"))
    assert bare["epsilon_replace_one"] is None and bare["membership_advantage"] == 1
    for words, said in (
        (["epsilon", "--noise-multiplier", "1", "--steps", "1", "--plot", "x.png"], "add --curve"),
        ([*run[:-1], "0"], "--group must be a positive whole number"),
        ([*run, "--plot", str(tmp_path / "no" / "x.csv")], "cannot be drawn"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_the_price_of_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    run = "plan --search 10 --noise-multipliers 1.682 --sample-rate 0.2 --rounds 150"
    (row,) = json.loads(answer(capsys, *run.split(), "--json"))["search"]
    known = {"one_run": 7.9963, "geometric": 13.8829, "logarithmic": 12.6160, "poisson": 16.7950}
    assert {k: row[k] for k in known} == pytest.approx(known, abs=2e-3)
    assert row["all_charged"] == pytest.approx(33.0067, abs=0.03)
    shown = answer(capsys, *run.split()).splitlines()
    assert shown[1].split() == [
        "noise",
        "one",
        "run",
        "geometric",
        "logarithmic",
        "poisson",
        "all",
        "charged",
    ]
    assert shown[2].split()[2] == "13.8830"
    for more, said in (
        (["--plot", "x.png"], "leave out --search"),
        (["--search", "1"], "more than 1"),
    ):
        assert main([*run.split(), *more]) == 2
        assert said in capsys.readouterr().err
