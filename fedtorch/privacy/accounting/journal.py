"""A file of JSON lines that is only ever added to, each line on disk before the call returns."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedtorch import disk
from fedtorch.types import ConfigError


class Journal:
    """Open for adding; one process at a time."""

    def __init__(self, path: Path, size: int) -> None:
        """Of a file that holds ``size`` bytes; see ``create`` and ``read``."""
        self.path = path
        self.size = size

    @classmethod
    def create(cls, path: Path, header: Any) -> "Journal":
        """A new file with one line; raises ConfigError where there is one with more already."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk.regular(path).open("a+b") as file, _held(path, file):
                file.seek(0)
                if file.read().count(b"\n") > 1:
                    raise ConfigError(
                        f"privacy journal {path} is another run's; resume that run or use a new folder"
                    )
                file.truncate(0)
            journal = cls(path, 0)
            journal.append(header)
            disk.sync_folder(path.parent)
        except OSError as e:
            raise ConfigError(f"privacy journal {path} cannot be written: {e.strerror}") from e
        return journal

    @classmethod
    def read(cls, path: Path) -> tuple["Journal", list[Any]]:
        """The file and its lines, None for one that is not JSON.

        A last line that a kill cut short is dropped from the file: its call had not returned. One that
        lacks nothing but its newline counts.
        """
        try:
            data = disk.regular(path).read_bytes()
            if not data.endswith(b"\n"):
                data = _completed(path)
            lines = data.split(b"\n")[:-1]
        except OSError as e:
            raise ConfigError(
                f"privacy journal {path} cannot be read ({e.strerror}); without it what was spent is not "
                "known: put it back, or start a new run"
            ) from e
        return cls(path, len(data)), [parsed(line) for line in lines]

    def append(self, line: Any) -> None:
        """Add a line; it is on disk when this returns, or ConfigError says why not."""
        data = json.dumps(line).encode() + b"\n"
        try:
            with self.path.open("r+b") as file, _held(self.path, file):
                if file.seek(0, os.SEEK_END) != self.size:
                    raise ConfigError(
                        f"privacy journal {self.path} was changed while the run was going; only one "
                        "process may write it"
                    )
                file.write(data)
                disk.sync(file)
        except OSError as e:
            raise ConfigError(f"privacy journal {self.path} cannot be written: {e.strerror}") from e
        self.size += len(data)


@contextmanager
def _held(path: Path, file: BinaryIO) -> Iterator[None]:
    # else two processes could both find the file as they know it, and one write over the other's line
    try:
        with disk.held(file):
            yield
    except (BlockingIOError, PermissionError) as e:
        raise ConfigError(
            f"privacy journal {path} is being written by another process; only one may"
        ) from e


def _completed(path: Path) -> bytes:
    """End the last line, or drop it where it is no line yet; returns what there is then."""
    with path.open("r+b") as file, _held(path, file):
        data = file.read()
        last = data.rpartition(b"\n")[2]
        if not last:
            return data
        end = b"\n" if parsed(last) is not None else b""
        data = data + end if end else data[: -len(last)]
        file.truncate(len(data) - len(end))
        file.seek(0, os.SEEK_END)
        file.write(end)
        disk.sync(file)
    return data


def parsed(line: bytes) -> Any:
    """The entry in a line, or None."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
