"""This process: whether it is a command, and how it reads modules."""

import gc
import os
import sys


def command() -> bool:
    """Whether this process is ``fedtorch``, ``python -m fedtorch`` or ``train.py``."""
    if sys.argv[:1] == ["-m"]:  # so it stays until the module that was asked for is found
        return "fedtorch" in sys.orig_argv
    return os.path.basename(sys.argv[0]) in ("fedtorch", "train.py")


class Unsearched:
    """In here modules are read, and memory is not searched for garbage, of which they make none.

    Afterwards they are old, without a search. Else two of them through torch's half million objects, and
    some through what was read, are a tenth of the way to a first private round.
    """

    def __enter__(self) -> None:
        """No search from here on."""
        self.collects = gc.isenabled()
        gc.disable()
        if self.collects and command():
            gc.collect()  # little, as the rest is frozen: what is garbage by now is not to stay

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is here by now is searched only where everything is; a command's, never again."""
        if self.collects:
            if command():
                gc.freeze()
            elif not gc.get_freeze_count():  # else somebody's own would be let go
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()
