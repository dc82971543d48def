import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedtorch import ConfigError
from fedtorch.data import Digits, Idx
from fedtorch.data.images import _digits, inputs, read_idx


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_pair(folder: Path, prefix: str, n: int = 20, packed: bool = True) -> None:
    rng = np.random.default_rng(n)
    for kind, array in (
        ("images-idx3-ubyte", rng.integers(0, 256, (n, 6, 5))),
        ("labels-idx1-ubyte", np.arange(n) % 10),
    ):
        raw = idx_bytes(array)
        name = f"{prefix}-{kind}" + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(raw) if packed else raw)


def test_digits_are_real_and_split_by_the_seed():
    a, b, c = (Digits().load(s) for s in (0, 0, 1))
    assert len(a.train) + len(a.test) == 1797
    assert a.facts["input_shape"] == (1, 8, 8)
    assert a.outputs == 10
    x, y = a.train.tensors
    assert float(x.min()) == 0.0
    assert float(x.max()) == 1.0
    assert sorted(y.unique().tolist()) == list(range(10))
    assert torch.equal(x, b.train.tensors[0])
    assert not torch.equal(x, c.train.tensors[0])


def test_digits_are_scikit_learns_whether_its_table_is_found_or_asked_for(monkeypatch):
    images, target = load_digits(return_X_y=True)
    found = _digits()
    assert np.array_equal(found[:, :-1], images)
    assert np.array_equal(found[:, -1], target)
    monkeypatch.setattr("fedtorch.data.images.find_spec", lambda name: None)
    assert np.array_equal(_digits(), found)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_own_split(tmp_path, packed):
    write_pair(tmp_path, "train", 20, packed)
    write_pair(tmp_path, "t10k", 10, packed)
    data = Idx(str(tmp_path)).load(0)
    assert (len(data.train), len(data.test)) == (20, 10)
    assert data.facts["input_shape"] == (1, 6, 5)
    assert float(data.train.tensors[0].max()) <= 1.0


def test_one_pair_alone_is_cut_by_content_and_stays_in_order(tmp_path):
    write_pair(tmp_path, "t10k", 200)
    data = Idx(str(tmp_path), test_fraction=0.25).load(0)
    x, _ = read_idx(tmp_path / "t10k-images-idx3-ubyte.gz"), None
    assert len(data.train) + len(data.test) == 200 and 30 <= len(data.test) <= 70
    at = [
        int((x.float() / 255 == row[0]).flatten(1).all(1).nonzero())
        for row in data.train.tensors[0]
    ]
    assert at == sorted(set(at))
    assert data.train.tensors[1].tolist() == [i % 10 for i in at]


def test_the_shared_mnist_slice(shared):
    data = Idx(str(shared / "mnist")).load(0)
    assert len(data.train) + len(data.test) == 10_000
    assert 1900 < len(data.test) < 2100
    assert data.facts["input_shape"] == (1, 28, 28)


@pytest.mark.parametrize("keep", [0, 2, 7, 15, 40, -1])
def test_files_cut_short_are_named(tmp_path, keep):
    raw = idx_bytes(np.random.default_rng(0).integers(0, 256, (5, 4, 4)))
    for name, content in (("a", raw[:keep]), ("b.gz", gzip.compress(raw)[:keep])):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            read_idx(path)


def test_damaged_gzip_is_named(tmp_path):
    raw = bytearray(gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (9, 9)))))
    for at in range(10, len(raw), 7):
        damaged = raw.copy()
        damaged[at] ^= 0xFF
        (tmp_path / "x.gz").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"x\.gz"):
            read_idx(tmp_path / "x.gz")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no IDX files"),
        (lambda p: (p / "train-images-idx3-ubyte").write_bytes(b""), "both an images and a labels"),
        (lambda p: [write_pair(p, "train", 5), _other_labels(p)], "5 images but .* 6 labels"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Idx(str(tmp_path)).load(0)


def _other_labels(folder: Path) -> None:
    raw = gzip.compress(idx_bytes(np.arange(6)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(raw)


@pytest.mark.parametrize("path", ["", "nowhere", __file__])
def test_no_folder_is_refused(path):
    with pytest.raises(ConfigError, match=r"dataset\.path must be a folder"):
        Idx(path).load(0)


def test_numbers_are_divided_by_the_scale_that_is_given():
    for scale in (1.0, 2.0, 255.0):
        x, done = inputs("t", np.array([[4, 2], [0, 255]], np.uint8), scale, None)
        assert done.scale == scale
        assert torch.equal(x, torch.tensor([[4.0, 2.0], [0.0, 255.0]]) / scale)


def test_no_test_at_all_can_be_asked_for():
    data = Digits(test_fraction=0).load(0)
    assert (len(data.train), len(data.test)) == (1797, 0)


def test_fractions_that_leave_nothing_are_refused():
    for share in (1.0, float("nan"), -0.1):
        with pytest.raises(ConfigError, match="test_fraction"):
            Digits(test_fraction=share).load(0)
