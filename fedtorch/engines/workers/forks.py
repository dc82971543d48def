"""Where worker processes come from: a copy of this process where that is safe, else a fresh interpreter.

A server of forks that is itself a copy of this process has torch, the model's modules and all that the
trial has imported; a fresh one imports torch first, for two seconds and more. A copy has this process's one
thread alone. What another thread holds at that moment, a lock or the GPU, stays held in the copy for ever:
so there is none, or none but OpenBLAS's, which it ends before a fork and starts again after it.
"""

import gc
import inspect
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import connection, forkserver, resource_sharer, util
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

LONGEST = 70
"""Bytes of a folder's name that leave room for a socket's in the 104 and more that systems take."""

VERSIONS = ((3, 11), (3, 14))
"""Python's server of forks is started here as those from the first to before the last start it."""

SERVER = ("pid", "address", "alive_fd")
"""What their server is known by, each a name of its own that is set here."""

MAIN = ["listener_fd", "alive_r", "preload", "main_path", "sys_path"]
"""What their server takes."""

OTHERS: list[tuple[Any, str]] = [
    (connection, "arbitrary_address"),
    (util, "is_abstract_socket_namespace"),
    (util, "_finalizer_registry"),
    (resource_sharer._resource_sharer, "_thread"),  # type: ignore[attr-defined]
    (resource_sharer._resource_sharer, "_cache"),  # type: ignore[attr-defined]
]
"""What else of theirs has no public name."""

SWEEPING_SECONDS = 5.0
"""How long the last to end may wait for the process that it was a copy of."""

ENDING_SECONDS = 0.2
"""How long a thread that was joined may still be seen by the system."""


def safe() -> bool:
    """Whether a copy of this process can work: on Linux, without other threads, with no GPU in use."""
    if sys.platform != "linux" or strange() or torch.cuda.is_initialized():
        return False
    _unwatched()
    _unshared()
    return threading.active_count() == 1 and _others_at_most(_of_openblas())


def strange() -> str | None:
    """Why Python's own server of forks is none that is known here; None where it is.

    A later one has a key besides, without which it lets nobody in: a release may bring that to an old one.
    """
    own = {n for n in vars(forkserver._forkserver) if n.startswith("_forkserver_")}
    alike = own == {f"_forkserver_{n}" for n in SERVER}
    alike &= [*inspect.signature(forkserver.main).parameters] == MAIN
    alike &= all(hasattr(m, n) for m, n in OTHERS)
    if alike and VERSIONS[0] <= sys.version_info < VERSIONS[1]:
        return None
    return (
        "each worker starts an interpreter of its own, for two seconds and more, where it could be a copy "
        f"of this process: how Python {platform.python_version()} copies is not known (3.11 to 3.13 are)"
    )


def _others_at_most(most: int) -> bool:
    """Whether there are no more other threads, but for some that are just ending."""
    end = time.monotonic() + ENDING_SECONDS
    while len(os.listdir("/proc/self/task")) - 1 > most:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def _unwatched() -> None:
    """End the thread with which tqdm looks after bars, of which torch.fx makes one; the next starts it."""
    bars: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if getattr(bars, "monitor", None) is not None:
        bars.monitor.exit()
        bars.monitor = None


def _unshared() -> None:
    """End the thread that hands workers open files, once all are fetched; the next file starts it."""
    own: Any = resource_sharer._resource_sharer  # type: ignore[attr-defined]
    if own._thread is not None and not own._cache:
        resource_sharer.stop()


def _of_openblas() -> int:
    """Threads that NumPy's and SciPy's libraries have at most: they start them when they need them."""
    from threadpoolctl import threadpool_info

    known = [p["num_threads"] for p in threadpool_info() if p["internal_api"] == "openblas"]
    return sum(n - 1 for n in known)


class Forks:
    """Starts the workers of one session."""

    def __init__(self) -> None:
        """Begin a server of forks where that is safe; ``close`` ends it."""
        self.folder = own_folder()
        self.pid, self.address, self.alive = _copied(self.folder) if safe() else (0, "", -1)
        why = strange() if sys.platform == "linux" else None
        self.notes = (why,) if why else ()

    @property
    def context(self) -> Any:
        """What makes processes that inherit no open file from this one."""
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        names = ["fedtorch.engines.workers.worker"]
        # the first step of an optimizer of torch's imports it, and that of the trial has
        names += ["torch._dynamo"] if "torch._dynamo" in sys.modules else []
        context.set_forkserver_preload(names)
        return context

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Processes that start in here come from this server, where there is one."""
        with _nameless_main(), self._in_place_of_the_usual() if self.pid else nullcontext():
            yield

    @contextmanager
    def _in_place_of_the_usual(self) -> Iterator[None]:
        usual: Any = forkserver._forkserver
        ours = dict(zip(SERVER, (self.pid, self.address, self.alive), strict=True))
        before = {n: getattr(usual, f"_forkserver_{n}") for n in SERVER}
        try:
            for name in SERVER:
                setattr(usual, f"_forkserver_{name}", ours[name])
            yield
        finally:
            for name in SERVER:
                setattr(usual, f"_forkserver_{name}", before[name])

    def close(self) -> None:
        """End the server, once all that it started have ended."""
        if self.pid:
            _end(self.pid, self.alive)
            self.pid = 0


def own_folder() -> str:
    """Where this process's sockets are, which it takes away as it ends; empty where another would."""
    if os.name != "posix":
        return ""
    with _nearby():
        folder = util.get_temp_dir()
    known: Any = util._finalizer_registry  # type: ignore[attr-defined]
    own = [f for f in known.values() if getattr(f, "_pid", None) == os.getpid()]
    return folder if any(folder in getattr(f, "_args", ()) for f in own) else ""


@contextmanager
def _nearby() -> Iterator[None]:
    """Where the folder of temporary files has too long a name for a socket in it, ``/tmp`` in its place."""
    usual, near = tempfile.gettempdir(), "/tmp"
    long = len(os.fsencode(usual)) > LONGEST and os.access(near, os.W_OK)
    tempfile.tempdir = near if long else usual
    try:
        yield
    finally:
        tempfile.tempdir = usual


def sweep(folder: str) -> None:
    """Take away what a process that was killed could not."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _copied(folder: str) -> tuple[int, str, int]:
    """A copy of this process that does nothing but fork when asked: its number, address, and life line."""
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        listener.bind(address)
        if not util.is_abstract_socket_namespace(address):
            os.chmod(address, 0o600)
        listener.listen()
        reads, writes = os.pipe()
        for stream in (sys.stdout, sys.stderr):  # or both would write what is not written yet
            with suppress(Exception):
                stream.flush()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            first, pid = os.getpid(), os.fork()
        if pid == 0:
            _serve(listener.fileno(), reads, first, folder)
        os.close(reads)
    if _others_at_most(0):
        return pid, address, writes
    # OpenBLAS has ended its threads: one that is left is another's, as of a loop by torch's OpenMP
    _end(pid, writes)
    return 0, "", -1


def _end(pid: int, alive: int) -> None:
    os.close(alive)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _serve(listener: int, reads: int, first: int, folder: str) -> None:
    """What the copy does until the first process ends: it holds no file of that, and collects nothing.

    A signal to all of them ends it last, and it takes away what the first would have.
    """
    code = 1
    try:
        gc.freeze()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.register_at_fork(after_in_child=_mortal)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2 and number not in (listener, reads, nothing):
                with suppress(OSError):  # the folder that was just read
                    os.fstat(number)
                    os.dup2(nothing, number)
        forkserver.main(listener, reads, [])
    except SystemExit:
        code = 0
        end = time.monotonic() + SWEEPING_SECONDS
        while os.getppid() == first and time.monotonic() < end:
            time.sleep(0.01)  # or a session was closed: then this process is about to be killed
        if os.getppid() != first:
            sweep(folder)
    finally:
        os._exit(code)


def _mortal() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """A script that came over standard input has no file that a new process could read: there is none."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or Path(path).exists():
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path
