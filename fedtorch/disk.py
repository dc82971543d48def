"""Files that a kill or a power cut leaves whole, and folders that one process at a time may write."""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from fedtorch.types import ConfigError

PART = ".part"
"""Ends the name of a file that is not complete yet."""

EVENTS = ".fedtorch"
"""Ends the name of every event file of ours; files of others are never touched."""

LOCK = ".lock"
"""File in a folder whose lock says that the folder is in use; it stays, the lock dies with its process."""

PROBE = ".writable"
"""File that is written to a folder and taken away, to see that it can be."""


@contextmanager
def whole(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that gets its name once all of it is on disk; ``private``: for its owner alone.

    What was there before stays if anything goes wrong, and nothing half written is left.
    """
    part = path.with_name(path.name + PART)
    try:
        part.unlink(missing_ok=True)
        if private:
            part.touch(mode=0o600)
        with part.open("wb") as file:
            yield file
            sync(file)
        os.replace(part, path)
    except BaseException as e:
        # a full disk does not say which file it was
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(path)
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as file:
        file.write(text.encode())


def regular(path: Path) -> Path:
    """The path, to read there; raises OSError for what may never end, as a pipe that nobody writes to."""
    try:
        mode = path.stat().st_mode
    except OSError:  # who opens it says so
        return path
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return path
    kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
    raise OSError(errno.EINVAL, f"{path.name} is a {kind}, not a file", str(path))


def below(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Every folder from ``root`` on, as ``os.walk``; raises ConfigError for one that cannot be read."""

    def closed(error: OSError) -> None:
        raise ConfigError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    return os.walk(root, followlinks=True, onerror=closed)


def reason(error: OSError) -> str:
    """The system's error and the file it is about, for one sentence."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return where + (error.strerror or str(error) or type(error).__name__)


def sync(file: IO[Any]) -> None:
    """Have all that was written to an open file on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last: a file's name is on disk only once its folder is."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder; its file system keeps a log of names itself
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)


def try_out(folder: Path) -> None:
    """Write a byte to a new file in a folder, and take it away; raises ConfigError when that fails."""
    probe = folder / PROBE
    try:
        regular(probe).write_text("x")
        probe.unlink()
    except OSError as e:
        raise ConfigError(f"folder {folder} cannot be written: {e.strerror}") from e


@contextmanager
def locked(folder: Path, option: str = "--run-dir") -> Iterator[str | None]:
    """Hold a folder for this process until the end of the block; the lock dies with the process.

    ``option`` is what names it. Gives None, or a sentence where the file system has no locks. Raises
    ConfigError when another process holds the folder, or when nothing can be written there.
    """
    try:
        file = regular(folder / LOCK).open("ab")
    except OSError as e:
        raise ConfigError(f"folder {folder} cannot be written: {e.strerror}") from e
    with file:
        try:
            _take(file.fileno())
        except (BlockingIOError, PermissionError) as e:
            raise ConfigError(
                f"{folder} is in use by another process: wait until that one ends, or choose another "
                f"{option}"
            ) from e
        except OSError as e:
            try_out(folder)
            yield f"{folder} cannot be locked ({e.strerror}): see to it that no second process writes it"
            return
        try:
            try_out(folder)  # an old lock can be opened where nothing new can be written
            yield None
        finally:
            _let_go(file.fileno())


@contextmanager
def held(file: BinaryIO, patience: float = 0.0) -> Iterator[None]:
    """Hold an open file for a moment; raises BlockingIOError or PermissionError where another does.

    It waits so many seconds for that one to end. Where the file system has no locks it goes on without.
    """
    end = time.monotonic() + patience
    while True:
        try:
            _take(file.fileno())
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end:
                raise
            time.sleep(0.01)
        except OSError:
            yield
            return
    try:
        yield
    finally:
        _let_go(file.fileno())


if os.name == "nt":
    import msvcrt

    def _take(number: int) -> None:
        os.lseek(number, 0, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]

    def _let_go(number: int) -> None:
        os.lseek(number, 0, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]

else:
    import fcntl

    def _take(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _let_go(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_UN)
