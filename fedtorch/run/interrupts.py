"""Ctrl-C while a command reads torch, which takes seconds: one line, and no error to trace.

What it imports is read before it can help: so it takes little.
"""

import os
import signal

from fedtorch.process import Unsearched, command


class Reading(Unsearched):
    """In here Ctrl-C ends a command at once: nothing is open yet, and no exception could be lost.

    Compiled code that imports NumPy drops an exception and fails later with one of its own. It stays so
    until ``begun``, as more is read then.
    """

    def __enter__(self) -> None:
        """Take the signal over, where it is ours to take."""
        self.ours = command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            if self.ours:
                signal.signal(signal.SIGINT, _stop)
        except ValueError:  # a thread that is not the main one: Python lets nobody do so there
            self.ours = False
        super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """An interrupt that came as an exception ends it as well."""
        super().__exit__(kind)
        if self.ours and kind is KeyboardInterrupt:
            _stop()


def begun() -> None:
    """A command begins: from here on an interrupt is an exception, and what is open is closed."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> None:
    os.write(2, b"fedtorch: stopped\n")
    os._exit(130)
