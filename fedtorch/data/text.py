"""Plain text for next-character prediction; in a play, speakers are the natural clients."""

import re
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from fedtorch.data.base import Data, from_tensors
from fedtorch.data.content import split
from fedtorch.options import COUNT, SHARE, check
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
    """Share of windows kept for the central test, each by its content; 0: none."""

    def __post_init__(self) -> None:
        """Refuse windows of nothing and shares that leave nothing."""
        check(self, "dataset", length=COUNT, test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, length] characters, y [N, length] the next ones; keys are speakers if there are any."""
        try:
            text = Path(self.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"dataset.path must be a text file: {e}") from e
        vocabulary = sorted(set(text))
        number = {c: i for i, c in enumerate(vocabulary)}
        parts = by_speaker(text)
        windows, speakers = [], []
        for name, said in parts.items():
            codes = torch.tensor([number[c] for c in said], dtype=torch.int64)
            if len(codes) > self.length:
                windows.append(codes.unfold(0, self.length + 1, self.length))
                speakers += [name] * len(windows[-1])
        if len(speakers) < 2:
            raise ConfigError(
                f"{self.path!r} is too short: no training and test windows of {self.length} characters"
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
