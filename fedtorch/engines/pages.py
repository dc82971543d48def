"""Memory of a process that is ours alone, kept between steps."""

import ctypes
import os
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""What ``mallopt`` calls them."""

MOST_MMAP = 32 << 20
"""Bytes from which on a tensor gets pages of its own: the most that glibc takes."""

MOST_KEPT = 512 << 20
"""Free bytes at the end of memory that are kept."""


def keep() -> None:
    """Let glibc keep the pages of what is freed, where there is glibc.

    By itself it gives those of large tensors back to the system, and each step faults them in again, as
    zeros: a quarter of the time of small convolutions. For a command and for workers; in a user's own
    process it is the user's to say.
    """
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MOST_MMAP)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
