"""Plain text for next-character prediction; in a play, speakers are the natural clients."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedtorch import disk
from fedtorch.data import tokens
from fedtorch.data.base import Data, Preparation, from_tensors
from fedtorch.data.content import split
from fedtorch.options import COUNT, SHARE, check
from fedtorch.types import ConfigError

SPEAKER = re.compile(r"^([^\n:]{1,60}):[ \t]*\n", re.MULTILINE)
"""``NAME:`` on a line of its own may start that speaker's lines; see ``is_speaker``."""

BYTES = "".join(map(chr, range(256)))
"""The vocabulary of bytes, each as the character of its number."""

BETWEEN = set(" '\u2019.-&")
"""Characters of a speaker's name beside letters, their accents and digits."""


@dataclass(frozen=True)
class Text:
    """A text file cut into windows of characters; each position predicts the next character."""

    path: str = ""
    """The text file (UTF-8)."""
    _: KW_ONLY
    length: int = 80
    """Characters, bytes or tokens in a window."""
    vocabulary: str = "characters"
    """characters: those that the text holds; bytes: all 256, which tells nothing of the text; or hf:FOLDER,
    the tokens of a model of Hugging Face."""
    test_fraction: float = 0.1
    """Share of windows kept for the central test, each by its content; 0: none."""

    def __post_init__(self) -> None:
        """Refuse windows of nothing and shares that leave nothing."""
        check(self, "dataset", length=COUNT, test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, length] characters, y [N, length] the next ones; keys are speakers if there are any."""
        text = read(Path(self.path))
        encode, size, facts, note = self._encoder(text)
        parts = by_speaker(text)
        windows, speakers = [], []
        for name, said in parts.items():
            codes = torch.tensor(encode(said), dtype=torch.int64)
            if len(codes) > self.length:
                windows.append(codes.unfold(0, self.length + 1, self.length))
                speakers += [name] * len(windows[-1])
        if len(speakers) < 2:
            raise ConfigError(
                f"{self.path!r} is too short: no training and test windows of {self.length} "
                f"{'characters' if 'vocabulary' in facts else 'tokens'}: give more text, or a smaller "
                "dataset.length"
            )
        cut = torch.cat(windows)
        keep, out = split((cut, speakers), self.test_fraction, seed)
        fit, held = cut[keep], cut[out]
        keys = [speakers[i] for i in keep.tolist()]
        return from_tensors(
            Path(self.path).stem,
            (fit[:, :-1], fit[:, 1:]),
            (held[:, :-1], held[:, 1:]),
            "classification",
            size,
            keys if len(parts) > 1 else None,
            Preparation(notes=(note,)),
            **facts,
        )

    def _encoder(self, text: str) -> tuple[Callable[[str], list[int]], int, dict[str, Any], str]:
        """What makes numbers of a text, how many there are, facts for a model, and a note."""
        if self.vocabulary.startswith(tokens.PREFIX):
            known = tokens.tokenizer(self.vocabulary)
            facts = tokens.facts(self.vocabulary, language=True)
            numbers = partial(known.encode, add_special_tokens=False, verbose=False)
            return numbers, len(known), facts, f"tokens of {self.vocabulary}"
        if self.vocabulary not in ("characters", "bytes"):
            raise ConfigError(
                f"dataset.vocabulary must be characters, bytes or hf:FOLDER, not {self.vocabulary!r}"
            )
        letters, note = (
            sorted(set(text)),
            "the characters of this text (public: --dataset.vocabulary bytes)",
        )
        plain = self.vocabulary == "characters"
        if not plain:
            letters, note = [*BYTES], "all bytes"
        number = {c: i for i, c in enumerate(letters)}
        facts = {"vocab_size": len(letters), "vocabulary": "".join(letters)}

        def encode(said: str) -> list[int]:
            return [number[c] for c in (said if plain else as_bytes(said))]

        return encode, len(letters), facts, f"the vocabulary is {note}"


def read(path: Path) -> str:
    """A UTF-8 file without the mark of byte order that Windows writes first, which is no character."""
    try:
        return disk.regular(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ConfigError(f"dataset.path must be a text file: {e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"dataset.path must be a text file in UTF-8: {path} is not (byte {e.start}): save it as UTF-8"
        ) from e


def as_bytes(text: str) -> str:
    """A text in UTF-8, each byte as the character of its number."""
    return text.encode().decode("latin-1")


def is_speaker(name: str) -> bool:
    """A name of two characters or more, in any script, that starts with a digit or no small letter."""
    first, last = name[0], name[-1]
    fits = all(c in BETWEEN or unicodedata.category(c)[0] in "LMN" for c in name)
    starts = unicodedata.category(first)[0] in "LN" and not first.islower()
    return (
        fits and starts and len(name) > 1 and last not in " -&" and any(c.isalpha() for c in name)
    )


def by_speaker(text: str) -> dict[str, str]:
    """Speaker -> everything they say, in order; one entry for a text without speakers."""
    found = [m for m in SPEAKER.finditer(text) if is_speaker(m[1])]
    said: dict[str, str] = {}
    before = text[: found[0].start()] if found else text
    if before.strip() or not found:
        said["text"] = before
    starts = [m.start() for m in found] + [len(text)]
    for match, end in zip(found, starts[1:], strict=True):
        # one way to write an accent, so that nobody is two
        name = unicodedata.normalize("NFC", match[1])
        said[name] = said.get(name, "") + text[match.end() : end]
    return said
