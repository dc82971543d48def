"""The other side: what runs inside a worker process or a Ray actor."""

import os
import signal
import threading
import warnings
from contextlib import suppress
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from fedtorch.engines import pages, wire
from fedtorch.engines.messages import asked, outcome_message
from fedtorch.engines.workers import kit
from fedtorch.engines.workers.forks import sweep
from fedtorch.types import ClientError


def work(pipe: Connection, body: bytes, block: Tensor, device: str, folder: str) -> None:
    """Work until told to end, or until the parent is gone; ``folder``: what goes with that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    torch.set_num_threads(1)
    pages.keep()
    try:
        tools = kit.unpack(body, block, device)
    except Exception as e:
        pipe.send(("broken", f"{type(e).__name__}: {e}"))
        return
    pipe.send(("ready",))
    inbox = box = torch.empty(0, dtype=torch.uint8)
    with suppress(EOFError, OSError):  # the parent has closed its end
        while (word := pipe.recv())[0] != "end":
            if word[0] == "inbox":
                inbox = word[1]
            elif word[0] == "box":
                box = word[1]
            else:
                box = _work(pipe, tools, word[1], inbox[: word[2]], box, word[3], word[4])


def _work(
    pipe: Connection,
    tools: kit.Kit,
    ids: list[str],
    task: Tensor,
    box: Tensor,
    size: int,
    of: list[int],
) -> Tensor:
    try:
        memory = kit.read_memory(wire.decode(box[:size]), ids)
        outcome = tools.run(asked(wire.decode(task)), ids, memory, of)
    except ClientError as e:
        pipe.send(("error", str(e)))
        return box
    except Exception as e:
        pipe.send(("error", f"client {ids[0]}: {type(e).__name__}: {e}"))
        return box
    packed = wire.pack(outcome_message(outcome, ids, own_types=True))  # as in one process
    if packed.size > len(box):
        pipe.send(("need", packed.size))
        _, box = pipe.recv()
    packed.write(box)
    pipe.send(("done", packed.size))
    return box


def _end_with_parent(folder: str) -> None:
    # a parent that was killed closes its end of this sentinel; without it workers would live on
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        sweep(folder)
        os._exit(1)


class Worker:
    """The same as a Ray actor: arrays come and go, and Ray does the rest."""

    def __init__(self, body: bytes, block: np.ndarray, device: str) -> None:
        """Unpack; the data stays in the store of the node, all its actors read the same copy."""
        torch.set_num_threads(1)
        pages.keep()
        self.kit = kit.unpack(body, _readable(block), device)

    def ready(self) -> bool:
        """Answer, once the kit is there."""
        return True

    def run(
        self, task: np.ndarray, ids: list[str], memory: bytes, of: list[int]
    ) -> np.ndarray | str:
        """Train a chunk; the outcome as a message, or what went wrong as text."""
        try:
            kept = kit.read_memory(wire.decode(memory), ids)
            outcome = self.kit.run(asked(wire.decode(_readable(task))), ids, kept, of)
        except ClientError as e:
            return str(e)
        return wire.pack(outcome_message(outcome, ids)).block().numpy()


def _readable(array: np.ndarray) -> Tensor:
    # Ray's arrays are read-only and torch warns of that; nothing here writes to them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
