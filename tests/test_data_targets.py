import numpy as np
import pytest
import torch

from fedtorch import ConfigError
from fedtorch.data.targets import understood

N = np.arange(60)


@pytest.mark.parametrize(
    "values, kind, outputs, classes",
    [
        (N % 3, "classification", 3, ()),
        (N % 3 * 1.0, "classification", 3, ()),
        (np.where(N % 2, 1, -1), "classification", 2, (-1, 1)),
        (N % 2 == 1, "classification", 2, (False, True)),
        (np.array(["sick", "well", "dead"])[N % 3], "classification", 3, ("dead", "sick", "well")),
        (N % 7 / 7, "regression", 1, ()),
        ((N % 3)[:, None], "classification", 3, ()),
        (np.eye(4)[N % 4], "classification", 4, ()),
        (np.eye(4, dtype=bool)[N % 4], "classification", 4, ()),
        (np.eye(2)[N % 2], "classification", 2, ()),
        (np.arange(100), "classification", 100, ()),
        (np.stack([N / 7, N / 9], 1), "regression", 2, ()),
    ],
)
def test_plain_targets_are_recognised_without_asking(values, kind, outputs, classes):
    found = understood("t", values, "auto")
    assert (found.kind, found.outputs, found.classes) == (kind, outputs, classes)
    assert found.y.dtype == (torch.int64 if kind == "classification" else torch.float32)
    if classes:  # a number means the name it had
        assert [classes[k] for k in found.y.tolist()] == values.tolist()
        assert "classes are numbered in order" in found.notes[-1]
    elif kind == "classification":
        one_hot = values.ndim > 1 and values.shape[1] > 1
        wanted = values @ np.arange(values.shape[1]) if one_hot else values.ravel()
        assert found.y.tolist() == wanted.tolist()
    else:
        assert torch.equal(found.y, torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize(
    "values",
    [
        N % 3 + 1,
        np.array([0, 1, 3])[N % 3],
        N % 5 + 1.0,
        N % 2 + 1,
        np.repeat(N, 4) * 10,
        np.arange(200),
        N % 2 * 2,
    ],
)
def test_other_whole_numbers_may_be_classes_or_amounts_and_are_asked_for(values):
    with pytest.raises(ConfigError, match=r"may be classes or amounts: give --dataset\.kind"):
        understood("t", values, "auto")
    classes = understood("t", values, "classification")
    names = sorted({int(v) for v in values})
    plain = names == list(range(len(names)))
    assert classes.outputs == len(names) and classes.classes == (() if plain else tuple(names))
    assert [names[k] for k in classes.y.tolist()] == values.tolist()
    amounts = understood("t", values, "regression")
    assert (amounts.kind, amounts.outputs) == ("regression", 1)
    assert amounts.y.tolist() == values.tolist()


@pytest.mark.parametrize(
    "values", [N % 2, np.where(N % 2, 1, -1), N % 2 == 1, np.array(["b", "a"])[(N + 1) % 2 * 1 - 1]]
)
def test_two_values_can_be_yes_or_no(values):
    found = understood("t", values, "binary")
    assert (found.kind, found.outputs, found.y.dtype) == ("binary", 1, torch.float32)
    assert torch.equal(found.y == 1, torch.from_numpy(values == max(values.tolist())))


def test_names_given_decide_the_numbers_so_that_several_files_agree():
    for written, names in (
        (np.array(["B", "M"])[N % 2], ("M", "B", "U")),
        (N % 2 + 1, ("2", "1", "9")),
    ):
        found = understood("t", written, "auto", names)
        assert (found.outputs, found.classes) == (3, names)
        assert [names[k] for k in found.y.tolist()] == [str(v) for v in written.tolist()]
    assert understood("t", N % 2, "classification", ("0", "1", "2")).classes == ()
    assert understood("t", np.array(["B", "M"])[N % 2], "binary", ("M", "B")).y[:2].tolist() == [
        1.0,
        0.0,
    ]


def test_many_targets_to_an_example():
    maps = np.random.default_rng(0).integers(0, 5, (9, 4, 4))
    maps[0, 0, 0] = -100
    found = understood("t", maps, "classification")
    assert (found.kind, found.outputs, found.y.shape) == ("classification", 5, (9, 4, 4))
    marks = understood("t", maps[:, 0] % 2, "binary")
    assert (marks.kind, marks.outputs, marks.y.shape) == ("binary", 4, (9, 4))
    assert understood("t", maps, "regression").outputs == 16
    with pytest.raises(
        ConfigError, match=r"targets \[N, 4, 4\] are whole numbers: give --dataset.kind"
    ):
        understood("t", maps, "auto")
    with pytest.raises(ConfigError, match="class labels must be 0, 1"):
        understood("t", maps - 3, "classification")


def test_a_message_shows_five_values_and_says_that_there_are_more():
    for values, shown in (
        (N * 10, "0, 10, 20, 30, 40, ..., "),
        (N % 5 + 1.5, "1.5, 2.5, 3.5, 4.5, 5.5$"),
    ):
        with pytest.raises(ConfigError, match=shown):
            understood("t", values, "auto" if values.max() > 9 else "binary")


@pytest.mark.parametrize(
    "values, kind, names, message",
    [
        (N, "class", (), "dataset.kind must be auto"),
        (N % 3, "binary", (), "a binary target must be 0 or 1"),
        (N % 2 + 1, "binary", (), "a binary target must be 0 or 1"),
        (N / 7, "classification", (), "class labels must be 0, 1"),
        (np.where(N < 5, -100, N % 3), "classification", (), "leave out rows without a label"),
        (np.where(N < 5, np.nan, N), "auto", (), "NaN or infinite"),
        (np.array([f"patient {i}" for i in N]), "auto", (), "60 different names in 60 rows"),
        (np.array(["a", "b"])[N % 2], "regression", (), "regression target must hold numbers"),
        (
            np.array(["a", "b"])[N % 2],
            "auto",
            ("a", "c"),
            "the target has 'b', which dataset.classes",
        ),
        (N % 2, "regression", ("0", "1"), "dataset.kind is regression"),
        (N % 3, "auto", ("0", "0"), "each once"),
        (N / 7, "auto", ("0", "1"), "dataset.classes names classes, but"),
        (N % 3, "binary", ("0", "1", "2"), "two classes"),
        (np.array([["a", "b"]] * 4), "auto", (), "must be numbers"),
    ],
)
def test_targets_that_do_not_fit_are_refused(values, kind, names, message):
    with pytest.raises(ConfigError, match=message):
        understood("t", values, kind, names)
