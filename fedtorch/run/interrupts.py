"""Ctrl-C while a command reads torch, which takes seconds: one line, and no error to trace."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def command() -> bool:
    """Whether this process is ``fedtorch``, ``python -m fedtorch`` or ``train.py``."""
    if sys.argv[:1] == ["-m"]:  # so it stays until the module that was asked for is found
        return "fedtorch" in sys.orig_argv
    return Path(sys.argv[0]).name in ("fedtorch", "train.py")


@contextmanager
def reading() -> Iterator[None]:
    """In here Ctrl-C ends a command at once: nothing is open yet, and no exception could be lost.

    Compiled code that imports NumPy drops an exception and fails later with one of its own.
    """
    ours = (
        command()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    except KeyboardInterrupt:
        _stop()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> None:
    os.write(2, b"fedtorch: stopped\n")
    os._exit(130)
