"""Clients, classes and sites of run folders, and two of them side by side."""

from pathlib import Path

from fedtorch.rounds.history import History
from fedtorch.run.compared import last_scores, matrix, of_counts, sides
from fedtorch.run.results import Saved


def run(name, scores, confusion=None, **options):
    rounds = [{"round": k + 1, "validation_by_client": s} for k, s in enumerate(scores)]
    shown = {"confusion": confusion} if confusion else {}
    return Saved(Path(name), options, History(rounds), {}, (), shown)


def test_clients_that_both_have_are_held_against_each_other_the_most_different_first():
    a = run("a", [{"x": {"loss": 1.0}, "y": {"loss": 2.0}, "z": {"loss": 3.0}}], lr=1, seed=3)
    b = run(
        "b",
        [{"y": {"loss": 2.5, "f1": 1.0}, "x": {"loss": 1.25}, "w": {"loss": 0.0}}],
        lr=2,
        seed=3,
    )
    found = sides(a, b)
    assert found.options == {"lr": [1, 2]} and [*found.clients] == ["loss"]
    assert [*found.clients["loss"].items()] == [("y", [2.0, 2.5]), ("x", [1.0, 1.25])]
    assert found.classes == {}


def test_what_a_run_has_not_at_all_is_one_line():
    a = run(
        "a",
        [],
        privacy="sample",
        **{"privacy.clip": 1.0, "strategy": "fedprox", "strategy.mu": 0.1},
    )
    b = run("b", [], privacy="null", strategy="fedavg")
    found = sides(a, b)
    assert found.told() == {"privacy": ["sample", "null"], "strategy": ["fedprox", "fedavg"],
                            "strategy.mu": [0.1, None]}  # fmt: skip
    assert found.options["privacy.clip"] == [1.0, None]


def test_scores_are_of_the_model_that_was_kept():
    first, last = {"x": {"loss": 1.0}}, {"x": {"loss": 9.0}}
    own = run("a", [first, last])
    assert last_scores(own) == last
    own.summary["model_of_round"] = 1
    assert last_scores(own) == first and last_scores(run("a", [])) == {}


def test_a_matrix_tells_shares_and_mistakes():
    found = of_counts([[3, 1, 0], [0, 0, 0], [2, 0, 2]], ["a", "b", "c"])
    assert found.right() == {"a": 0.75, "c": 0.5}
    assert found.mistakes(1) == [("c", "a", 2)] and len(found.mistakes(9)) == 2
    for odd in (None, 3, [], [[1, 2]], [[1, -1], [0, 0]], [[1, 0.5], [0, 0]], [[True, 0], [0, 0]]):
        assert of_counts(odd, []) is None
    assert of_counts([[1]], ["a", "b"]).names == ["0"], "names that do not fit are numbers"
    a, b = (run(n, [], [[k, 4 - k], [0, 1]]) for n, k in (("a", 1), ("b", 4)))
    assert matrix(a).counts[0] == [1, 3] and sides(a, b).classes["0"] == [0.25, 1.0]
