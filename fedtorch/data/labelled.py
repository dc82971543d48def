"""Texts with a class each, from a CSV file, as numbers of a vocabulary that is public."""

import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.data import separated, sheet, tokens
from fedtorch.data.base import Data, Preparation, from_tensors
from fedtorch.data.content import split
from fedtorch.data.sheet import Sheet
from fedtorch.data.targets import understood
from fedtorch.options import COUNT, SHARE, check
from fedtorch.types import ConfigError

WORD = re.compile(r"\w+|[^\w\s]")
"""Words, and each mark between them."""


@dataclass(frozen=True)
class LabelledText:
    """A CSV file with a column of texts and one of classes; 0 fills up short texts.

    The vocabulary says nothing of the texts: bytes, words of a file, or words hashed to so many numbers.
    """

    path: str = ""
    """The file, with a line that names its columns."""
    _: KW_ONLY
    test: str = ""
    """A file with the central test; empty: a share of the texts."""
    text: str = "text"
    """Column with the texts."""
    target: str = "label"
    """Column with the class."""
    client: str = ""
    """Column that names each text's owner; empty: none."""
    vocabulary: str = "bytes"
    """bytes; hashed (words, of which some share a number); or a file with a word a line (others are 1);
    or hf:FOLDER, the tokens of a model of Hugging Face."""
    buckets: int = 4096
    """Numbers that words are hashed to."""
    length: int = 128
    """Bytes or words of a text that are read; the rest is cut."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in order, where files of several sites must agree; none: sorted."""
    test_fraction: float = 0.2
    """Share of texts kept for the central test, each by its content; 0: none."""

    def __post_init__(self) -> None:
        """Refuse texts of nothing and shares that leave nothing."""
        check(self, "dataset", length=COUNT, buckets=COUNT, test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, length] int64, y [N]."""
        words = words_of(self.vocabulary)
        kind = f"hashed:{self.buckets}" if self.vocabulary == "hashed" else self.vocabulary
        what = {"bytes": "bytes", "hf": "tokens"}.get(self.vocabulary.partition(":")[0], "words")
        done = Preparation(
            target=self.target,
            client=self.client,
            text=self.text,
            vocabulary="words" if words else kind,
            words=words,
            dtype="int64",
            notes=(f"texts are {what} ({Path(kind).name}), {self.length} of each at most",),
        )
        files = [self._file(path, done) for path in filter(None, (self.path or " ", self.test))]
        labels = np.array([label for _, some, _ in files for label in some])
        if all(sheet.NUMBER.fullmatch(label) for label in labels.tolist()):
            labels = labels.astype(float)
        y = understood(self.path, labels, "classification", self.classes)
        x, keys = torch.cat([x for x, _, _ in files]), files[0][2]
        n = len(files[0][0])
        keep, held = torch.arange(n), torch.arange(n, len(x))
        if not self.test:
            columns: list[Tensor | Sequence[str]] = [x, y.y, *([keys] if keys else [])]
            keep, held = split(columns, self.test_fraction, seed)
        done = replace(done, classes=y.classes, notes=(*done.notes, *y.notes))
        return from_tensors(
            Path(self.path).stem,
            (x[keep], y.y[keep]),
            (x[held], y.y[held]),
            "classification",
            y.outputs,
            [keys[i] for i in keep.tolist()] if keys else None,
            done,
            **(
                tokens.facts(kind, False)
                if what == "tokens"
                else {"vocab_size": vocabulary_size(done)}
            ),
        )

    def _file(self, path: str, done: Preparation) -> tuple[Tensor, list[str], list[str]]:
        table = separated.read(Path(path))
        columns = {"text": self.text, "target": self.target, "client": self.client}
        for role, column in columns.items():
            if column and column not in table.header:
                raise ConfigError(
                    f"{path} has no {role} column {column!r}; it has {', '.join(table.header)}: give "
                    f"--dataset.{role}"
                )
            if column and "" in (values := table.column(column)):
                line = table.lines[values.index("")]
                raise ConfigError(f"{path}, line {line}: column {column!r} is empty")
        owners = table.column(self.client) if self.client else []
        return (
            encoded(texts(table, self.text), done, self.length),
            table.column(self.target),
            owners,
        )


def words_of(vocabulary: str) -> tuple[str, ...]:
    """The words of a vocabulary that is a file; none of one that is a name."""
    if vocabulary in ("bytes", "hashed") or vocabulary.startswith(tokens.PREFIX):
        return ()
    try:
        lines = disk.regular(Path(vocabulary)).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"dataset.vocabulary must be bytes, hashed or a file with a word a line (or hf:FOLDER): {e}"
        ) from e
    found = tuple(dict.fromkeys(_folded(line.split()[0]) for line in lines if line.strip()))
    if not found:
        raise ConfigError(f"{vocabulary} holds no words")
    return found


def texts(table: Sheet, column: str) -> list[str]:
    """A column of a table; raises ConfigError where there is none of this name."""
    if column not in table.header:
        raise ConfigError(f"{table.path} has no column {column!r}, which the model was trained on")
    return table.column(column)


def vocabulary_size(done: Preparation) -> int:
    """Numbers that a text may hold, with the 0 that fills up."""
    kind, _, buckets = done.vocabulary.partition(":")
    return {"bytes": 257, "words": len(done.words) + 2}.get(kind) or int(buckets) + 1


def encoded(texts: Sequence[str], done: Preparation, length: int) -> Tensor:
    """Numbers of the vocabulary, [N, length] int64, with 0 after the end of a short text."""
    if done.vocabulary.startswith(tokens.PREFIX):
        return tokens.tokenized(tokens.tokenizer(done.vocabulary), texts, length)
    codes = torch.zeros(len(texts), length, dtype=torch.int64)
    encode = _encoder(done)
    for row, text in zip(codes, texts, strict=True):
        found = encode(text)[:length]
        row[: len(found)] = torch.tensor(found, dtype=torch.int64)
    return codes


def _encoder(done: Preparation) -> Callable[[str], list[int]]:
    kind, _, buckets = done.vocabulary.partition(":")
    if kind == "bytes":
        return lambda text: [1 + b for b in text.encode()]
    if kind == "hashed":
        return lambda text: [
            1 + zlib.crc32(w.encode()) % int(buckets) for w in WORD.findall(_folded(text))
        ]
    number = {word: k for k, word in enumerate(done.words, 2)}
    return lambda text: [number.get(w, 1) for w in WORD.findall(_folded(text))]


def _folded(text: str) -> str:
    """Small letters, and one way to write an accent."""
    return unicodedata.normalize("NFC", text).casefold()
