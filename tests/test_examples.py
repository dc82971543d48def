"""Every example runs, and shows what it says."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import weights

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ALONE = {"lora_shakespeare"}
"""Those that take minutes, whose tests run a part of them."""
QUICK = [p for p in sorted(EXAMPLES.glob("*.py")) if p.stem not in ALONE]


@pytest.mark.parametrize("path", QUICK, ids=lambda p: p.stem)
def test_every_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if path.stem == "two_sites":  # which leaves its folder to be looked at
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with torch.random.fork_rng():
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as e:
            assert not e.code
    assert capsys.readouterr().out.strip()


def test_where_one_of_the_demos_processes_fails_the_others_end_with_it():
    started = [
        [sys.executable, "-c", f"import time; {what}"] for what in ("exit(3)", "time.sleep(60)")
    ]
    assert load("two_sites").run(started) == 3


def test_the_article_is_five_clients_of_100_rows_and_10_columns_over_ten_rounds(capsys):
    article = load("article")
    clients = article.make_clients()
    assert [tuple(c.data.tensors[0].shape) for c in clients] == [(100, 10)] * 5
    article.main()
    assert capsys.readouterr().out.count("\nround ") == 10


def test_the_articles_mix_is_fedprox_with_mu_one_ninth():
    article = load("article")
    assert pytest.approx(1 / 9) == article.MU
    clients = article.make_clients()
    # by hand, one number at a time: 0.9 of each client's mean, 0.1 of the global model, then the mean
    means = [[sum(col) / 100 for col in c.data.tensors[0].T.tolist()] for c in clients]
    model = [0.0] * 10
    for ours in article.rounds(clients, 10):
        model = [sum(0.9 * m[j] + 0.1 * model[j] for m in means) / 5 for j in range(10)]
        assert ours.tolist() == pytest.approx(model, abs=1e-12)


def test_with_another_weight_it_is_not_the_articles_mix(monkeypatch):
    article = load("article")
    clients = article.make_clients()
    monkeypatch.setattr(article, "MU", 0.0)  # plain FedAvg: each client runs on to its own mean
    first = next(article.rounds(clients))
    assert not torch.allclose(first, next(article.recurrence(clients)), atol=1e-3)


def test_augmentation_repeats_bit_for_bit():
    own = load("own_data")
    (one, accuracy), (two, _) = own.train(rounds=2), own.train(rounds=2)
    assert all(torch.equal(v, weights(two)[k]) for k, v in weights(one).items())
    assert accuracy > 0.5


def test_cox_finds_the_effects_and_agrees_with_its_definition():
    survival = load("survival")
    x, y = survival.patients(30, seed=1)
    risk = x[:, :1]
    time, event = y.T
    by_hand = 0.0
    for i in range(30):
        at_risk = risk[time >= time[i], 0].exp().sum().log()
        by_hand += float((at_risk - risk[i, 0]) * event[i])
    assert float(survival.cox(risk, y)) == pytest.approx(by_hand / float(event.sum()), rel=1e-5)
    model, c = survival.train()
    assert torch.allclose(model.weight[0], torch.tensor([1.0, -0.5, 0.0]), atol=0.3)
    assert c > 0.68


def test_adapters_are_compared_with_the_whole_model_on_the_roles_of_a_play(tmp_path, capsys):
    example = load("lora_shakespeare")
    lines = (f"{k} says {'words ' * 70}" for k in range(8))
    roles = "".join(f"ROLE {'ABCDEFGH'[k]}:\n{line}\n\n" for k, line in enumerate(lines))
    (tmp_path / "play.txt").write_text(roles)
    with torch.random.fork_rng():
        example.main(str(tmp_path / "play.txt"), 1, 2, ["LoRA ffa"])
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in capsys.readouterr().out.splitlines()]
    assert [r[0] for r in rows[2:]] == ["before", "LoRA ffa"]
    assert float(rows[3][1]) == float(rows[3][2]) == 14.3


def test_without_a_play_it_says_so(tmp_path, capsys):
    load("lora_shakespeare").main(str(tmp_path / "none.txt"))
    assert capsys.readouterr().out.startswith("skipped: ")
