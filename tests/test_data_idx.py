import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtorch import ConfigError
from fedtorch.data import Idx
from fedtorch.data.idx import read_idx
from fedtorch.data.prepared import agreed, said


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


def emnist(folder: Path, name: str, labels: np.ndarray, mapping: str = "") -> np.ndarray:
    """Files as they are downloaded; returns the images upright."""
    upright = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 6, 5))
    for part in ("train", "test"):
        for kind, array in (("images-idx3", upright.transpose(0, 2, 1)), ("labels-idx1", labels)):
            path = folder / f"emnist-{name}-{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx_bytes(array)))
    if mapping:
        (folder / f"emnist-{name}-mapping.txt").write_text(mapping)
    return upright


def test_emnist_is_read_as_it_is_downloaded(tmp_path):
    letters = "".join(f"{k} {64 + k} {96 + k}\n" for k in range(1, 27))
    upright = emnist(tmp_path, "letters", 1 + np.arange(40) % 26, letters)
    data = Idx(str(tmp_path)).load(0)
    x, y = data.train.tensors
    assert torch.equal((x[:, 0] * 255).round().int(), torch.from_numpy(upright).int())
    assert data.outputs == 26 and y.tolist() == [k % 26 for k in range(40)]
    assert data.preparation.classes == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert "images of EMNIST lie on their side" in said(data)
    lying = Idx(str(tmp_path), turn=False).load(0).train.tensors[0]
    assert torch.equal(lying, x.transpose(2, 3))


def test_labels_that_count_from_one_have_outputs_from_zero(tmp_path):
    emnist(tmp_path, "letters", 1 + np.arange(9) % 3)
    data = Idx(str(tmp_path)).load(0)
    assert (data.outputs, data.preparation.classes) == (3, (1, 2, 3))
    assert "labels count from 1, outputs from 0" in said(data)
    with pytest.raises(ConfigError, match=r"sites must agree: .* --dataset.classes, such as 1,2,3"):
        agreed(data, Idx(str(tmp_path)))
    fixed = Idx(str(tmp_path), classes=["3", "2", "1", "4"])
    again = fixed.load(0)
    agreed(again, fixed)
    assert again.outputs == 4 and again.train.tensors[1].tolist() == [2, 1, 0] * 3
    for classes, why in (
        (["1", "2"], "hold 3, which dataset.classes does"),
        (["1", "b"], "not 'b'"),
    ):
        with pytest.raises(ConfigError, match=why):
            Idx(str(tmp_path), classes=classes).load(0)


def test_one_of_several_sets_in_a_folder_is_chosen(tmp_path):
    emnist(tmp_path, "digits", np.arange(7), "".join(f"{k} {48 + k}\n" for k in range(10)))
    emnist(tmp_path, "letters", 1 + np.arange(5))
    with pytest.raises(ConfigError, match=r"--dataset.subset emnist-digits or emnist-letters"):
        Idx(str(tmp_path)).load(0)
    digits = Idx(str(tmp_path), subset="emnist-digits").load(0)
    # ten, as the mapping says, though these files hold seven
    assert (digits.outputs, digits.preparation.classes, digits.name) == (
        10,
        tuple("0123456789"),
        "emnist-digits",
    )
    with pytest.raises(ConfigError, match="no IDX files that begin with 'emnist-balanced'"):
        Idx(str(tmp_path), subset="emnist-balanced").load(0)
    (tmp_path / "emnist-letters-mapping.txt").write_text("1 65\ntwo 66\n")
    with pytest.raises(ConfigError, match=r"mapping\.txt must hold lines of a label"):
        Idx(str(tmp_path), subset="emnist-letters").load(0)
