"""A random search keeps its best run, prices the whole of it, and leaves nothing of the others."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedtorch import disk
from fedtorch.__main__ import main
from fedtorch.privacy import SampleLevel
from fedtorch.privacy.accounting.events import epsilon
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.run import search, sweep
from fedtorch.types import ClaimRefuted, ConfigError, NothingLearned

WORDS = ["train", "--clients", "2", "--rounds", "1", "--privacy.steps", "2", "--tracking", "none"]


def test_words():
    rest, mean = search.asked(["--a", "1", "--sweep.random", "10", "--sweep", "lr=1,2"])
    assert (rest, mean) == (["--a", "1", "--sweep", "lr=1,2"], 10)
    assert search.asked(["--sweep", "lr=1", "--sweep.random=3"])[1] == 3
    assert search.asked(["--sweep", "lr=1"]) == (["--sweep", "lr=1"], None)
    for words in (["--sweep.random", "1"], ["--sweep.random", "x"], ["--sweep.random"]):
        with pytest.raises(ConfigError, match="how many runs are expected"):
            search.asked([*words, "--sweep"] if len(words) > 1 else words)
    with pytest.raises(ConfigError, match="add --sweep lr="):
        search.asked(["--sweep.random", "10"])


def test_the_number_of_runs_is_geometric():
    draws = [search.drawn(4) for _ in range(4000)]
    assert min(draws) == 1
    assert sum(draws) / 4000 == pytest.approx(4, abs=5 * math.sqrt(12 / 4000))
    assert draws.count(1) / 4000 == pytest.approx(0.25, abs=5 * math.sqrt(0.1875 / 4000))


def test_only_the_best_is_kept_and_the_price_is_of_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "drawn", lambda mean: 3)
    where = tmp_path / "s"
    words = [*WORDS, "--sweep.random", "5", "--sweep", "lr=0.01,1", "--run-dir", str(where)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "5 expected; only the best is kept" in said
    assert "epsilon 8.000 for the search (5 runs expected)" in said
    assert sorted(p.name for p in where.iterdir()) == ["best", "search.json"]
    private = json.loads((where / "best" / "privacy.json").read_text())
    assert private["epsilon_spent"] == pytest.approx(8, abs=1e-3)
    assert private["search"]["epsilon_of_the_released_run_alone"] < 6
    assert private["epsilon_spent_per_client"] is None
    assert "who ran the search" in private["trusted"]
    rounds = [json.loads(x) for x in (where / "best" / "metrics.jsonl").read_text().splitlines()]
    assert rounds[-1]["privacy_epsilon"] == private["epsilon_spent"]
    summary = json.loads((where / "best" / "summary.json").read_text())
    assert summary["epsilon"] == private["epsilon_spent"]
    about = json.loads((where / "search.json").read_text())
    assert about["best"]["lr"] in ("0.01", "1") and about["runs_expected"] == 5
    assert main(words) == 2
    assert "already holds a search" in capsys.readouterr().err


def played(tmp_path, scores, monkeypatch):
    """The best of trials with these scores, an error in place of one, and what is left in the folder."""
    left = iter(scores)

    def train(config):
        Path(config["run_dir"]).mkdir()
        if isinstance(found := next(left), BaseException):
            raise found
        return {"test_loss": 1.0, "test_accuracy": found}

    monkeypatch.setattr(search, "replace", lambda config, **new: config | new)
    best = search._best([{}], len(scores), tmp_path, train)
    return best and best[2][1], len(list(tmp_path.iterdir()))


def test_without_public_data_the_score_is_one_that_the_budget_pays_for(tmp_path):
    where = tmp_path / "run"
    where.mkdir()
    (where / "config.toml").write_text("rounds = 20")
    lines = [{"round": 10, "noised_loss": 2.0, "noised_accuracy": 0.4}, {"round": 11}]
    lines.append({"round": 20, "noised_loss": 1.0, "noised_accuracy": 0.7})
    (where / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    assert search._score({"test_loss": None}, where) == ("noised_accuracy", 0.7)
    assert search._score({"test_accuracy": 0.2}, where) == ("test_accuracy", 0.2)
    (where / "metrics.jsonl").write_text('{"round": 10, "noised_loss": 2.0}\n')
    assert search._score({}, where) == ("noised_loss", 2.0)
    (where / "metrics.jsonl").write_text('{"round": 10}\n')
    assert math.isnan(search._score({}, where)[1])


def test_what_a_killed_search_had_cost_is_said_before_it_is_removed(tmp_path, capsys):
    plan = SampleLevel(noise_multiplier=2.0, rounds=2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ledger = Ledger(tmp_path / name / "ledger.jsonl")
        ledger.charge(0, plan.event(2.0), ["a"])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "ledger.jsonl").write_text("nothing\n")
    search._empty(tmp_path, plan)
    said = capsys.readouterr().out
    cost = epsilon([plan.event(2.0)] * 2, plan.delta)
    assert f"who watched its 2 runs has seen epsilon {cost:.3f} at delta 1e-05" in said
    assert not [*tmp_path.iterdir()]


def test_a_sweep_goes_on_after_a_claim_is_refuted_and_fails_in_the_end(
    tmp_path, monkeypatch, capsys
):
    trained = []

    def train(config):
        trained.append(config.run_dir)
        if len(trained) == 1:
            raise ClaimRefuted("the privacy claim is refuted: noise 0.5")

    for name in ("planned", "spent"):
        monkeypatch.setattr(sweep.prices, name, lambda runs: [])
    monkeypatch.setattr(sweep.results, "load", lambda path: path)
    monkeypatch.setattr(sweep.results, "summary_rows", lambda runs: runs)
    monkeypatch.setattr(sweep, "show_table", lambda rows: None)
    configs = iter([SimpleNamespace(run_dir=str(tmp_path / n), tracking=None) for n in "ab"])
    with pytest.raises(ClaimRefuted, match="refuted in 1 of 2 runs: a"):
        sweep.run_sweep(
            ["--run-dir", str(tmp_path)],
            [{"lr": "1"}, {"lr": "2"}],
            lambda words: next(configs),
            lambda config: None,
            train,
        )
    out = capsys.readouterr().out
    assert len(trained) == 2 and "noise 0.5" in out
    assert "tensorboard" not in out  # where there is nothing to look at


def test_a_sweep_does_not_begin_in_the_folder_of_a_run(tmp_path):
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match="holds a run, and a sweep makes a folder of runs"):
        sweep.run_sweep(["--run-dir", str(tmp_path)], [], *[None] * 3)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.2, 0.9, 0.5], 0.9),
        ([0.9, math.nan, 0.1], 0.9),
        ([NothingLearned("x"), 0.3], 0.3),
        ([NothingLearned("x")], None),
        ([math.nan], None),
    ],
)
def test_what_is_worse_is_removed_at_once(tmp_path, monkeypatch, scores, best):
    assert played(tmp_path, scores, monkeypatch) == (best, 0 if best is None else 1)


def test_a_search_that_breaks_off_leaves_nothing(tmp_path, monkeypatch, capsys):
    def broken(config, held):
        Path(config.run_dir).mkdir()
        raise KeyboardInterrupt

    from fedtorch.commands.train import train_module

    monkeypatch.setattr(train_module(), "run", broken)
    where = tmp_path / "s"
    words = [*WORDS, "--sweep.random", "5", "--sweep", "lr=0.01,1", "--run-dir", str(where)]
    assert main(words) == 130
    assert list(where.iterdir()) == []


def test_what_a_killed_search_has_left_the_next_one_removes_unseen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known, seen = [tmp_path / "runs" / f"search-{k}" / ".trials" for k in range(2)], []

    def learns(config, held):
        seen.extend(p.name for p in Path(config.run_dir).parent.iterdir() if p.is_dir())
        Path(config.run_dir).mkdir()
        raise NothingLearned("x")

    from fedtorch.commands.train import train_module

    monkeypatch.setattr(train_module(), "run", learns)
    words = [*WORDS, "--sweep.random", "2", "--sweep", "lr=0.01,1"]
    for where in ([], ["--run-dir", str(known[0].parent)]):
        for hidden in known:
            (hidden / "old" / "deep").mkdir(parents=True, exist_ok=True)
        with disk.locked(known[1]):  # at work
            assert main([*words, *where]) == 1
        said = capsys.readouterr()
        assert f"what a search that was killed has left in {known[0].relative_to(tmp_path)}" in (
            said.out.replace(f"{tmp_path}/", "")
        )
        assert not known[0].exists() and (known[1] / "old").exists() and seen == []
    with disk.locked(known[1]):
        assert main([*words, "--run-dir", str(known[1].parent)]) == 2
    assert "in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--privacy", "none"], "is for private runs"),
        (["--sweep", "privacy.steps=1,2"], "settings of one price"),
        (["--privacy", "local"], "who is not trusted sees every run"),
        (["--tracking", "mlflow"], "use tensorboard or none"),
    ],
)
def test_what_would_not_hold_is_refused_before_any_training(tmp_path, capsys, more, said):
    words = [*WORDS[:5], "--sweep.random", "5", "--run-dir", str(tmp_path / "s"), *more]
    assert main(words if "--sweep" in more else [*words, "--sweep", "lr=0.01,1"]) == 2
    assert said in capsys.readouterr().err


def test_a_sweep_that_breaks_off_says_what_it_has_cost(tmp_path, monkeypatch, capsys):
    from fedtorch.commands.train import train_module

    module, done = train_module(), []
    real = module.train

    def train(config):
        done.append(config)
        if len(done) == 3:
            raise NothingLearned("broken")
        return real(config)

    monkeypatch.setattr(module, "train", train)
    words = [*WORDS, "--sweep", "lr=0.01,1,2", "--run-dir", str(tmp_path / "s")]
    assert main(words) == 1
    assert "2 runs over the same data (digits) cost epsilon" in capsys.readouterr().out
