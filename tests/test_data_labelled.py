import json
import zlib
from collections import Counter

import pytest
import torch

from fedtorch import ConfigError
from fedtorch.__main__ import main
from fedtorch.data import LabelledText
from fedtorch.data.prepared import said

GOOD, BAD = "a good, happy film", "an awful bore"


def write(path, n=30, head="text,label,site"):
    """Quoted texts with commas, from three sites."""
    rows = [
        f'"{GOOD if k % 2 else BAD} {k:02}",{"pos" if k % 2 else "neg"},s{k % 3}' for k in range(n)
    ]
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return str(path)


def test_bytes_are_numbers_from_one_and_zero_fills_up(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"Ähm, ja",yes\nno,no\n"a\nb",yes\n', encoding="utf-8")
    data = LabelledText(str(path), length=6, test_fraction=0).load(0)
    x, y = data.train.tensors
    assert x.dtype == torch.int64 and y.tolist() == [1, 0, 1]
    assert x.tolist() == [
        [1 + b for b in "Ähm, ja".encode()[:6]],
        [111, 112, 0, 0, 0, 0],
        [98, 11, 99, 0, 0, 0],
    ]
    assert data.facts["vocab_size"] == 257 and data.facts["input_shape"] == (6,)
    assert data.preparation.classes == ("no", "yes")
    assert "texts are bytes (bytes), 6 of each at most" in said(data)


def test_words_come_from_a_file_or_are_hashed(tmp_path):
    path = write(tmp_path / "t.csv", 4)
    (tmp_path / "words.txt").write_text("a 0.1 0.2\nGood\n,\nawful\ngood\n", encoding="utf-8")
    options = {"path": path, "length": 5, "test_fraction": 0}
    data = LabelledText(**options, vocabulary=str(tmp_path / "words.txt")).load(0)
    assert data.preparation.words == ("a", "good", ",", "awful") and data.facts["vocab_size"] == 6
    assert data.train.tensors[0][:2].tolist() == [[1, 5, 1, 1, 0], [2, 3, 4, 1, 1]]
    hashed = LabelledText(**options, vocabulary="hashed", buckets=50).load(0)
    row = hashed.train.tensors[0][1].tolist()
    assert row == [1 + zlib.crc32(w) % 50 for w in (b"a", b"good", b",", b"happy", b"film")]
    assert hashed.facts["vocab_size"] == 51


def test_owners_a_share_for_the_test_or_a_file_of_it(tmp_path):
    path = write(tmp_path / "t.tsv", 60)
    data = LabelledText(path, client="site", test_fraction=0.3).load(0)
    assert len(data.train) + len(data.test) == 60 and 5 < len(data.test) < 32
    assert {*Counter(data.keys)} == {"s0", "s1", "s2"} and len(data.keys) == len(data.train)
    other = write(tmp_path / "other.csv", 7)
    fixed = LabelledText(path, client="site", test=other, classes=["pos", "neg", "other"]).load(0)
    assert (len(fixed.train), len(fixed.test), fixed.outputs) == (60, 7, 3)
    assert fixed.test.tensors[1].tolist() == [1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ("words,label\nx,a\ny,b\n", {}, "no text column 'text'; it has words, label: give --dataset.text"),
        ("text,label\nx,a\n,b\n", {}, "line 3: column 'text' is empty"),
        ("text,label\nx,a\nz,\n", {}, "line 3: column 'label' is empty"),
        ("text,label\nx,a\nz,b\n", {"vocabulary": "nowhere"}, "must be bytes, hashed or a file with"),
        ("text,label\nx,a\nz,b\n", {"vocabulary": "empty"}, "empty holds no words"),
        ("text,label\nx,a\nz,b\n", {"classes": ["a", "c"]}, "does not name"),
        ("text,label\nx,1.5\nz,2\n", {}, "class labels must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, text, options, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match=why):
        LabelledText("t.csv", **options, test_fraction=0).load(0)
    with pytest.raises(ConfigError, match="length must be at least 1"):
        LabelledText("t.csv", length=0)


def test_texts_are_trained_on_and_predicted_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.csv", 60)
    words = f"""--privacy none --rounds 3 --lr 2 --dataset labelled-text --dataset.path t.csv --model bag
        --dataset.vocabulary hashed --dataset.client site --dataset.length {8} --run-dir r""".split()
    assert main(["train", *words]) == 0
    assert "3 clients" in capsys.readouterr().out
    (tmp_path / "new.txt").write_text(f"{GOOD}\n\n{BAD}\n")
    assert main(["predict", "r", "new.txt"]) == 0
    assert capsys.readouterr().out.split() == ["pos", "neg"]
    (tmp_path / "new.csv").write_text(f'id,text\n1,{BAD}\n2,"{GOOD}"\n')
    assert main(["predict", "r", "new.csv", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prediction"] for r in rows] == ["neg", "pos"]
    (tmp_path / "bad.csv").write_text("words\nx\n")
    assert main(["predict", "r", "bad.csv"]) == 2
    assert "bad.csv has no column 'text'" in capsys.readouterr().err
