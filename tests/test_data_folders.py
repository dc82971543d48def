import json
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fedtorch import ConfigError
from fedtorch.__main__ import main
from fedtorch.commands.given import pictures_in
from fedtorch.data import ImageFolder
from fedtorch.data.folders import found
from fedtorch.data.pictures import Pictures
from fedtorch.data.prepared import said
from fedtorch.training.batches import Collated


def write(root, *folders, n=6, size=(5, 4), mode="L", value=None):
    """``n`` pictures in each folder; they differ a little, so that each has a coin of its own."""
    for k, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            shade = (40 * k + 3 * i) % 256 if value is None else value
            colour = shade if mode == "L" else (shade, 0, 9)
            Image.new(mode, size, colour).save(root / folder / f"{i:02}.png")


def test_a_folder_for_each_class_and_a_share_for_the_test(tmp_path):
    write(tmp_path, "cat", "dog", "cow", n=20)
    (tmp_path / "cat" / ".DS_Store").write_text("")
    (tmp_path / "notes.txt").write_text("")
    data = ImageFolder(str(tmp_path), test_fraction=0.3).load(0)
    assert data.preparation.classes == ("cat", "cow", "dog") and data.outputs == 3
    assert data.facts["input_shape"] == (1, 4, 5) and data.name == tmp_path.name
    x, y = data.train.tensors
    assert len(x) + len(data.test) == 60 and 5 < len(data.test) < 35
    assert torch.equal(data.labels, y)
    assert {
        round(float(v.min()) * 255) // 40 for v, label in zip(x, y, strict=True) if label == 1
    } == {2, 3}
    line = said(data)
    assert "folders are class" in line and "1 files are no pictures (notes.txt)" in line
    assert "60 pictures, kept in memory" in line and "divided by 255" in line
    again = ImageFolder(str(tmp_path), test_fraction=0.3).load(1)
    assert len(again.test) != len(data.test) or not torch.equal(
        again.test.tensors[0], data.test.tensors[0]
    )
    (tmp_path / "cow" / "99.png").write_bytes((tmp_path / "cow" / "01.png").read_bytes())
    more = ImageFolder(str(tmp_path), test_fraction=0.3).load(0)  # one more moves no other
    assert len(more.train) + len(more.test) == 61
    assert abs(len(more.test) - len(data.test)) + abs(len(more.train) - len(data.train)) == 1


def test_files_that_are_read_each_time_give_what_memory_gives(tmp_path):
    write(
        tmp_path, "train/1", "train/2", "train/10", "test/2", "val/2", n=3, mode="RGB", size=(9, 7)
    )
    options = {"path": str(tmp_path), "size": 4, "resize": 5}
    kept, lazy = (ImageFolder(**options, memory=m).load(0) for m in (256, 0))
    assert type(kept.train) is TensorDataset and type(lazy.train) is Pictures
    assert kept.preparation.classes == ("1", "2", "10")
    assert (len(lazy.train), len(lazy.test)) == (9, 3)
    for part in ("train", "test"):
        for i, (x, y) in enumerate(getattr(kept, part)):
            other, label = getattr(lazy, part)[i]
            assert torch.equal(x, other) and y == label and x.shape == (3, 4, 4)
    ahead = ImageFolder(**options, memory=0, workers=2).load(0).train
    assert (
        isinstance(ahead, Collated)
        and ahead.num_workers == 2
        and torch.equal(ahead[4][0], lazy.train[4][0])
    )
    there = pickle.loads(pickle.dumps(lazy.train))
    assert torch.equal(there[4][0], lazy.train[4][0])
    assert "folders are part/class" in said(lazy) and "the validation folder is left out" in said(
        lazy
    )
    assert "shorter side 5, the middle 4 x 4" in said(lazy) and "read from their files" in said(
        lazy
    )


def test_clients_are_a_level_of_folders_where_it_is_named(tmp_path):
    wards = [f"{w}/{c}" for w in ("north", "south") for c in ("ill", "well")]
    write(tmp_path, *wards, n=8)
    with pytest.raises(
        ConfigError, match=r"lies in 2 folders: .*--dataset.levels client/class or class/cl"
    ):
        ImageFolder(str(tmp_path)).load(0)
    data = ImageFolder(str(tmp_path), levels="client/class", test_fraction=0).load(0)
    assert Counter(data.keys) == {"north": 16, "south": 16}
    assert data.preparation.classes == ("ill", "well")
    other = ImageFolder(str(tmp_path), levels="class/client", test_fraction=0).load(0)
    assert Counter(other.keys) == {"ill": 16, "well": 16}
    split = tmp_path / "split"
    write(split, "north/train/ill", "north/train/well", "south/test/ill")
    deep = ImageFolder(str(split), levels="client/part/class").load(0)
    assert (len(deep.train), len(deep.test), {*deep.keys}) == (12, 6, {"north"})


def test_sixteen_bits_and_sites_that_must_agree(tmp_path):
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        array = np.full((3, 3), 4000 * (k + 1) // 2, np.uint16)
        Image.fromarray(array).save(tmp_path / name / "1.png")
    options = {"path": str(tmp_path), "test_fraction": 0.0}
    data = ImageFolder(**options, classes=["c", "b", "a"]).load(0)
    assert (
        data.preparation.dtype == "uint16" and data.outputs == 3 and data.labels.tolist() == [2, 1]
    )
    assert float(data.train.tensors[0].max()) == pytest.approx(4000 / 65535)
    assert "of 12 bits? Then give --dataset.scale 4095" in said(data)
    scaled = ImageFolder(**options, scale=4095).load(0)
    assert float(scaled.train.tensors[0].max()) == pytest.approx(4000 / 4095)
    with pytest.raises(ConfigError, match="scale 255: pixels go up to 4000"):
        ImageFolder(**options, scale=255).load(0)
    with pytest.raises(ConfigError, match=r"classes does not name its class folder"):
        ImageFolder(**options, classes=["a"]).load(0)
    Image.new("L", (3, 3)).save(tmp_path / "b" / "2.png")
    with pytest.raises(ConfigError, match=r"a/1\.png has 16 bits of grey, and .*b/2\.png has not"):
        ImageFolder(**options).load(0)


def damaged(root):
    write(root, "a", "b")
    path = root / "b" / "03.png"
    path.write_bytes(path.read_bytes()[:50])


def two_sizes(root):
    write(root, "a")
    write(root, "b", size=(6, 6))


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (lambda p: None, {}, "there are no pictures in"),
        (damaged, {}, r"03\.png is damaged"),
        (two_sizes, {}, "2 sizes .4 x 5, 6 x 6, ....: give --dataset.size"),
        (lambda p: write(p, "."), {}, "must lie in a folder for each class"),
        (lambda p: write(p, "train", "test"), {}, "must lie in a folder for each class"),
        (lambda p: write(p, "a", "b/c"), {}, "different depths, .*a/00.png and .*b/c/00.png"),
        (lambda p: write(p, "a/b/c/d"), {}, "more than 3 folders deep"),
        (lambda p: write(p, "a"), {"levels": "client/class"}, r"are 2 folders, but .*00\.png lies in 1"),
        (lambda p: write(p, "a"), {"levels": "owner/class"}, "must be made of part, client and class"),
        (lambda p: write(p, "test/a"), {}, "has no folder train; it has test"),
        (lambda p: write(p, "train/a", "more/a"), {"levels": "part/class"}, "'more' is neither train nor"),
        (lambda p: write(p, "a"), {"resize": 9}, "resize must be at least dataset.size"),
        (lambda p: write(p, "a"), {"size": 0}, "size must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, make, options, why):
    make(tmp_path)
    with pytest.raises(ConfigError, match=why):
        ImageFolder(str(tmp_path), **options).load(0)


def test_a_folder_that_may_not_be_entered_is_not_left_out(tmp_path, monkeypatch):
    write(tmp_path, "cat", "dog")
    real = os.scandir

    def closed(folder):
        if str(folder).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", closed)
    for read in (found, pictures_in):
        with pytest.raises(ConfigError, match=r"folder .*cat cannot be read: Permission denied"):
            read(tmp_path)


@pytest.mark.parametrize("memory", [256, 0])
def test_a_folder_is_trained_on_and_predicted_from(tmp_path, monkeypatch, capsys, memory):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", "train/dark", "train/light", n=12, size=(8, 6), mode="RGB")
    write(tmp_path / "in", "test/dark", "test/light", n=4, size=(6, 6), mode="RGB")
    for path in (tmp_path / "in").glob("*/light/*.png"):
        Image.new("RGB", (9, 6), (200, 230, 220)).save(path)
    words = f"""--privacy none --rounds 3 --clients 2 --partition iid --dataset folder --dataset.path in
        --lr 0.5 --dataset.size 4 --dataset.memory {memory} --model logistic --run-dir r --validation 0.2"""
    assert main(["train", *words.split()]) == 0
    assert "folders are part/class" in capsys.readouterr().out
    write(tmp_path / "new", "x", n=2, size=(20, 11), mode="RGB")
    Image.new("RGB", (7, 9), (220, 220, 220)).save(tmp_path / "new" / "one.jpg")
    assert main(["predict", "r", "new", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["file"], r["prediction"]) for r in rows] == [
        ("one.jpg", "light"), ("x/00.png", "dark"), ("x/01.png", "dark")
    ]  # fmt: skip
    assert main(["predict", "r", "new/one.jpg"]) == 0
    assert capsys.readouterr().out == "light\n"
    (tmp_path / "moving").mkdir()
    (tmp_path / "moving" / "one.gif").write_bytes(b"GIF89a")
    (tmp_path / "empty").mkdir()
    assert main(["predict", "r", "empty"]) == 2
    assert "there are no pictures in empty" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no pictures in .*moving .*; it has \.gif$"):
        ImageFolder(str(tmp_path / "moving")).load(0)
