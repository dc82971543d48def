"""One example more or less moves no other: central tests, validation data, every kind of file."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fedtorch import ConfigError
from fedtorch.data import Csv, Data, Idx, Npz, Text
from fedtorch.data.base import from_tensors
from fedtorch.data.content import coins, fingerprint, split
from fedtorch.run import setup

G = np.random.default_rng(3)
X, Y = G.integers(0, 200, (161, 5, 4)), np.arange(161) % 2


def csv_file(folder: Path, x: np.ndarray, y: np.ndarray) -> Data:
    rows = [",".join(map(str, [*r.ravel(), "ab"[t], t])) for r, t in zip(x / 7, y, strict=True)]
    names = [f"f{i}" for i in range(x[0].size)]
    (folder / "t.csv").write_text("\n".join([",".join([*names, "who", "y"]), *rows]) + "\n")
    return Csv(str(folder / "t.csv"), client="who").load(0)


def npz_file(folder: Path, x: np.ndarray, y: np.ndarray) -> Data:
    np.savez(folder / "t.npz", x=x / 7, y=y)
    return Npz(str(folder / "t.npz")).load(0)


def idx_files(folder: Path, x: np.ndarray, y: np.ndarray) -> Data:
    for name, array in (("images-idx3", x), ("labels-idx1", y)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        raw = gzip.compress(head + array.astype(np.uint8).tobytes())
        (folder / f"train-{name}-ubyte.gz").write_bytes(raw)
    return Idx(str(folder)).load(0)


def text_file(folder: Path, x: np.ndarray, y: np.ndarray) -> Data:
    lines = "".join("".join(chr(97 + v % 26) for v in row.ravel()) for row in x)
    (folder / "t.txt").write_text("az" + lines + "z")
    return Text(str(folder / "t.txt"), length=20).load(0)


def rows(data: Dataset) -> set[bytes]:
    return {b"".join(t.numpy().tobytes() for t in data[i]) for i in range(len(data))}


@pytest.mark.parametrize("write", [csv_file, npz_file, idx_files])
@pytest.mark.parametrize("place", [0, 60, 160])
def test_one_row_more_is_all_that_changes(tmp_path, write, place):
    keep = np.arange(161) != place
    all_, less = write(tmp_path, X, Y), write(tmp_path, X[keep], Y[keep])
    train, test = rows(all_.train) ^ rows(less.train), rows(all_.test) ^ rows(less.test)
    assert len(train) + len(test) == 1
    assert 0.1 < len(less.test) / 160 < 0.3


def test_one_window_more_is_all_that_changes(tmp_path):
    all_, less = text_file(tmp_path, X, Y), text_file(tmp_path, X[:-1], Y)
    assert len(rows(all_.train) ^ rows(less.train)) + len(rows(all_.test) ^ rows(less.test)) <= 2


@pytest.mark.parametrize("place", [0, 30, 80])
def test_validation_data_of_a_client_moves_by_one_example_too(place):
    x, y = torch.from_numpy(X[:81] / 7).float(), torch.from_numpy(Y[:81])

    def client(index: torch.Tensor) -> set[bytes]:
        data = from_tensors("d", (x[index], y[index]), (x[:2], y[:2]), "classification", 2)
        (one,) = setup.clients(data, ["a"], [torch.arange(len(index))], 0.25, seed=5)
        assert len(one.data) + len(one.validation) == len(index)
        return rows(one.data)

    index = torch.arange(81)
    assert len(client(index) ^ client(index[index != place])) <= 1


def test_a_client_that_would_keep_nothing_trains_on_all_of_it_or_is_refused():
    data = from_tensors(
        "d", (torch.ones(4, 3), torch.zeros(4)), (torch.ones(1, 3), torch.zeros(1)), "binary", 1
    )
    seed = next(s for s in range(999) if bool((coins(data.train, s, "validation") < 0.8).all()))
    asked = data, ["a"], [torch.arange(4)], 0.8, seed
    (kept,) = setup.clients(*asked)
    assert (len(kept), kept.validation) == (4, None)
    with pytest.raises(
        ConfigError, match="client a: all of its 4 examples fall into its validation"
    ):
        setup.clients(*asked, private=True)


class Drawn(Dataset):
    """Examples that a transform draws anew at each look; the table behind them may lose a row."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[object, int]:
        return {"a": torch.rand(2) + self.numbers[i], "b": np.ones(2), "c": "word"}, self.numbers[i]


def test_examples_of_any_kind_have_coins_of_their_own():
    numbers = list(range(50))
    found = coins(Drawn(numbers), 1, "x")
    assert torch.equal(
        found[torch.arange(50) != 7], coins(Drawn(numbers[:7] + numbers[8:]), 1, "x")
    )
    assert len(found.unique()) == 50
    assert not torch.equal(found, coins(Drawn(numbers), 2, "x"))
    assert torch.equal(found, coins(Drawn(numbers), 1, "x"))


def test_coins_are_spread_evenly_and_equal_rows_do_not_all_go_one_way():
    same = TensorDataset(torch.zeros(4000, 1), torch.zeros(4000))
    for data in (same, TensorDataset(torch.randn(4000, 2), torch.zeros(4000))):
        found = coins(data, 0, "x")
        assert 0 <= float(found.min()) < float(found.max()) < 1
        assert abs(float((found < 0.3).double().mean()) - 0.3) < 0.04
    less = TensorDataset(torch.zeros(3999, 1), torch.zeros(3999))
    assert torch.equal(coins(less, 0, "x"), coins(same, 0, "x")[:-1])


def test_a_part_left_empty_is_refused_by_name_and_nothing_may_be_held_out():
    table = torch.randn(30, 2)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="sharing must be between 0"):
            split([table], share, 0, "sharing")
    with pytest.raises(ConfigError, match=r"30 examples are too few .* none is held out"):
        split([table], 1e-9, 0)
    with pytest.raises(ConfigError, match="none is left for training"):
        split([table], 1 - 1e-9, 0)
    keep, held = split([table], 0.0, 0)
    assert (len(keep), len(held)) == (30, 0)


def test_a_fingerprint_changes_with_any_row_and_with_their_number():
    x, y = torch.randn(40, 3), torch.arange(40)
    one = fingerprint(TensorDataset(x, y))
    assert one == fingerprint(TensorDataset(x.clone(), y.clone()))
    other = x.clone()
    other[17, 2] += 1
    assert (
        len({one, fingerprint(TensorDataset(other, y)), fingerprint(TensorDataset(x[1:], y[1:]))})
        == 3
    )
    numbers = list(range(30))
    assert (
        fingerprint(Drawn(numbers))
        == fingerprint(Drawn(numbers))
        != fingerprint(Drawn(numbers[1:]))
    )


def test_a_fingerprint_of_no_examples_is_one_too():
    none = TensorDataset(torch.zeros(0, 3), torch.zeros(0).long())
    assert (
        fingerprint(none)
        == fingerprint(none)
        != fingerprint(TensorDataset(torch.zeros(2, 0), torch.zeros(2)))
    )


def test_a_fingerprint_of_large_data_reads_a_bounded_part(monkeypatch):
    monkeypatch.setattr("fedtorch.data.content.MOST_BYTES", 800)
    x = torch.randn(10_000, 2)
    looked = TensorDataset(x, x)
    changed = x.clone()
    changed[-1] += 1  # the first and the last are always among those read
    assert fingerprint(looked) != fingerprint(TensorDataset(changed, x))
    monkeypatch.setattr("fedtorch.data.content.MOST_READ", 5)
    reads = []

    class Counted(Drawn):
        def __getitem__(self, i: int) -> tuple[object, int]:
            reads.append(i)
            return super().__getitem__(i)

    fingerprint(Counted(list(range(1000))))
    assert reads == [0, 249, 499, 749, 999]
