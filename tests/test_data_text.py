import unicodedata
from types import SimpleNamespace

import pytest
import torch

from fedtorch import ConfigError
from fedtorch.commands.use import write_on
from fedtorch.data import Text, partition
from fedtorch.data.text import BYTES, by_speaker

PLAY = (
    "ROMEO:\n"
    + "but soft what light " * 20
    + "\nJULIET:\n"
    + "o romeo romeo " * 30
    + "\nROMEO:\nay me\n"
)


def test_speakers_own_their_lines_in_order():
    said = by_speaker(PLAY)
    assert list(said) == ["ROMEO", "JULIET"]
    assert said["ROMEO"].endswith("ay me\n")
    assert by_speaker("just words") == {"text": "just words"}


@pytest.mark.parametrize(
    "name",
    ["HAMLET", "\u00c9LISE", "JOS\u00c9", "First Lord", "3RD WITCH", "O'Neill", "D\u2019Artagnan",
     "Mr. Hyde", "Jean-Paul", "\u0418\u0412\u0410\u041d", "\u592a\u90ce", "E\u0301LISE", "R2 & D2"],
)  # fmt: skip
def test_speakers_of_any_language_own_their_lines(name):
    said = by_speaker(f"{name}:\nto be\n\nANNA: \nor not\n{name}:\nat all\n")
    first, second = said
    assert second == "ANNA" and said["ANNA"] == "or not\n"
    assert said[first] == "to be\n\nat all\n"
    assert unicodedata.normalize("NFC", name) == first


@pytest.mark.parametrize(
    "line",
    ["he said:", "A:", "12:", "http://x:", "Note (1):", "x" * 70 + ":", "-- AND:", "What? No:"],
)
def test_other_lines_with_a_colon_start_nobodys_lines(line):
    assert by_speaker(f"ANNA:\nfirst\n{line}\nmore\n") == {"ANNA": f"first\n{line}\nmore\n"}


def test_a_mark_of_byte_order_is_no_character_and_hides_no_speaker(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(PLAY.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    data = Text(str(path), length=10).load(0)
    assert set(data.keys) == {"ROMEO", "JULIET"}
    assert data.facts["vocabulary"] == "".join(sorted(set(PLAY)))


def test_each_position_predicts_the_next_character(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY, encoding="utf-8")
    data = Text(str(tmp_path / "play.txt"), length=10).load(0)
    x, y = data.train.tensors
    assert x.shape == y.shape
    assert x.shape[1] == 10
    assert torch.equal(x[0, 1:], y[0, :-1])
    vocabulary = data.facts["vocabulary"]
    assert all("".join(vocabulary[i] for i in row) in PLAY for row in x)
    assert data.facts["vocab_size"] == len(set(PLAY))
    ids, _ = partition(data, None, None, 0)
    assert sorted(ids) == ["JULIET", "ROMEO"]


def test_a_speaker_who_says_nothing_changes_nothing(tmp_path):
    (tmp_path / "play.txt").write_text("MUTE:\n" + PLAY, encoding="utf-8")
    data = Text(str(tmp_path / "play.txt"), length=10).load(0)
    assert data.train.tensors[0].dtype == torch.int64
    assert set(data.keys) == {"ROMEO", "JULIET"}


def test_a_text_without_speakers_has_no_owners(tmp_path):
    (tmp_path / "plain.txt").write_text("abc " * 500, encoding="utf-8")
    data = Text(str(tmp_path / "plain.txt"), length=20).load(0)
    assert data.keys is None
    assert len(partition(data, None, 5, 0)[1]) == 5


def test_train_and_test_windows_do_not_overlap(tmp_path):
    text = "".join(chr(33 + i % 90) for i in range(3000))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    data = Text(str(tmp_path / "t.txt"), length=30, test_fraction=0.2).load(0)
    n = len(data.train) + len(data.test)
    assert n == (3000 - 1) // 30
    assert 0.1 * n < len(data.test) < 0.3 * n
    starts = torch.cat([data.train.tensors[0], data.test.tensors[0]])[:, 0]
    assert len(starts) == n


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"", {}, "too short"),
        (b"short", {}, "too short"),
        (b"\xff\xfe\x00", {}, "must be a text file"),
        (b"words " * 99, {"length": 0}, r"dataset\.length must be at least 1"),
        (b"words " * 99, {"test_fraction": 1.0}, "test_fraction must be in"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(tmp_path, content, options, message):
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Text(str(path), **options).load(0)


def test_the_shared_shakespeare(shared):
    data = Text(str(shared / "tinyshakespeare.txt")).load(0)
    assert data.facts["vocab_size"] == 65
    assert data.train.tensors[0].dtype == torch.int64
    assert len(set(data.keys)) > 100


def test_bytes_are_a_vocabulary_that_tells_nothing_of_the_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(
        "\u00c9LISE:\n" + "\u00e9t\u00e9 " * 40 + "\nBOB:\n" + "no " * 60, encoding="utf-8"
    )
    data = Text(str(path), length=10, vocabulary="bytes", test_fraction=0).load(0)
    assert (
        data.outputs == 256
        and data.facts["vocabulary"] == BYTES
        and {*data.keys} == {"\u00c9LISE", "BOB"}
    )
    x, y = data.train.tensors
    assert (
        bytes(x[0].tolist()) + bytes([int(y[0, -1])])
        == "\u00e9t\u00e9 \u00e9t\u00e9 ".encode()[:11]
    )
    assert data.preparation.notes == ("the vocabulary is all bytes",)
    assert "characters of this text" in Text(str(path), length=10).load(0).preparation.notes[0]


class Next(torch.nn.Module):
    """After each byte the one of "\u00e9 " that follows it."""

    def forward(self, x):
        after = torch.zeros(256, dtype=torch.int64)
        after[0xC3], after[0xA9], after[0x20] = 0xA9, 0x20, 0xC3
        return torch.nn.functional.one_hot(after[x], 256).float().transpose(1, 2)


def test_a_model_of_bytes_writes_on_in_characters():
    known = SimpleNamespace(facts={"vocabulary": BYTES, "input_shape": (4,)})
    assert write_on(SimpleNamespace(known=known, model=Next()), "\u00e9 ", 6) == "\u00e9 \u00e9 "
