"""A file of JSON lines that is only ever added to, each line on disk before the call returns."""

import json
import os
from pathlib import Path
from typing import Any

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
            if path.exists() and path.read_bytes().count(b"\n") > 1:
                raise ConfigError(
                    f"privacy journal {path} is another run's; resume that run or use a new folder"
                )
            path.write_bytes(b"")
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
            data = path.read_bytes()
            *lines, last = data.split(b"\n")
            if last:
                whole = parsed(last) is not None
                data = data + b"\n" if whole else data[: -len(last)]
                lines += [last] if whole else []
                with path.open("r+b") as file:
                    file.truncate(len(data) - whole)
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n" * whole)
                    file.flush()
                    os.fsync(file.fileno())
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
            with self.path.open("r+b") as file:
                if file.seek(0, os.SEEK_END) != self.size:
                    raise ConfigError(
                        f"privacy journal {self.path} was changed while the run was going; only one "
                        "process may write it"
                    )
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise ConfigError(f"privacy journal {self.path} cannot be written: {e.strerror}") from e
        self.size += len(data)


def parsed(line: bytes) -> Any:
    """What a line holds, or None."""
    try:
        return json.loads(line)
    except ValueError:
        return None
