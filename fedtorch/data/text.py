"""Plain text for next-character prediction; in a play, speakers are the natural clients."""

import re
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from fedtorch.data.base import Data, from_tensors
from fedtorch.types import ConfigError

SPEAKER = re.compile(r"^([A-Z][A-Za-z' ]*[A-Za-z]):\n", re.MULTILINE)
"""``NAME:`` on a line of its own starts that speaker's lines."""


@dataclass(frozen=True)
class Text:
    """A text file cut into windows of characters; each position predicts the next character."""

    path: str = ""
    """The text file (UTF-8)."""
    _: KW_ONLY
    length: int = 80
    """Characters in a window."""
    test_fraction: float = 0.1
    """Share of each speaker's windows, from the end, kept for the central test."""

    def load(self, seed: int) -> Data:
        """X [N, length] characters, y [N, length] the next ones; keys are speakers if there are any."""
        if self.length < 1:
            raise ConfigError(f"dataset.length must be at least 1, got {self.length}")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(
                f"dataset.test_fraction must be between 0 and 1, got {self.test_fraction}"
            )
        try:
            text = Path(self.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"dataset.path must be a text file: {e}") from e
        vocabulary = sorted(set(text))
        number = {c: i for i, c in enumerate(vocabulary)}
        parts = by_speaker(text)
        train, test, keys = [], [], []
        for name, said in parts.items():
            codes = torch.tensor([number[c] for c in said], dtype=torch.int64)
            windows = (
                codes.unfold(0, self.length + 1, self.length)
                if len(codes) > self.length
                else codes[:0].view(0, self.length + 1)
            )
            cut = len(windows) - int(len(windows) * self.test_fraction)
            train.append(windows[:cut])
            test.append(windows[cut:])
            keys += [name] * cut
        fit, held = torch.cat(train), torch.cat(test)
        if not len(fit) or not len(held):
            raise ConfigError(
                f"{self.path!r} is too short: no training and test windows of {self.length} characters"
            )
        return from_tensors(
            Path(self.path).stem,
            (fit[:, :-1], fit[:, 1:]),
            (held[:, :-1], held[:, 1:]),
            "classification",
            len(vocabulary),
            keys if len(parts) > 1 else None,
            vocab_size=len(vocabulary),
            vocabulary="".join(vocabulary),
        )


def by_speaker(text: str) -> dict[str, str]:
    """Speaker -> everything they say, in order; one entry for a text without speakers."""
    pieces = SPEAKER.split(text)
    said: dict[str, str] = {}
    if pieces[0].strip() or len(pieces) == 1:
        said["text"] = pieces[0]
    for name, lines in zip(pieces[1::2], pieces[2::2], strict=True):
        said[name] = said.get(name, "") + lines
    return said
