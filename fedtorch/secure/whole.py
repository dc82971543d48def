"""What masks cancel in, without the masks: each client's whole numbers, added."""

import numpy as np
import torch

from fedtorch.secure.encode import RIDERS, Coding, Figures, Layout, riders, shortened, unseal
from fedtorch.tree import row
from fedtorch.types import CLIP_BIT, Params, Released


class WholeSum:
    """Clients of a simulation, each as the whole numbers that it would put masks on."""

    def __init__(self, coding: Coding, cap: int | None, norm: float | None = None) -> None:
        """Nobody yet; ``norm``: rounding makes none of what they send longer, if noise is made for it."""
        self.came = 0
        self._coding, self._cap, self._norm = coding, cap, norm
        self._layout: Layout | None = None
        self._total = np.zeros(0, np.int64)
        self._riders = np.zeros(len(RIDERS), np.int64)
        self._buffers: list[tuple[float, Params]] = []
        """Of each client: its share of the weight cap, and what its visit left of float buffers."""

    def add(self, update: Released) -> None:
        """Each client of a chunk."""
        if self._layout is None:
            shapes = {
                g: {n: tuple(v.shape[1:]) for n, v in s.items()} for g, s in update.sent.items()
            }
            self._layout = Layout.of(shapes, {})
            self._total = np.zeros(self._layout.values, np.int64)
        self.came += len(update.ids)
        for k in range(len(update.ids)):
            sent = {g: row(s, k) for g, s in update.sent.items()}
            share = float(update.weight[k]) / (self._cap or 1)
            flat = self._layout.flat(sent, {})
            if self._norm is not None:
                bits = self._layout.places(CLIP_BIT)
                flat = shortened(self._coding, flat, self._norm, bits)
            coded, beyond = self._coding.encode(flat, share)
            self._total += coded
            told = {n: float(update.metrics[n][k]) for n in ("examples",) if n in update.metrics}
            loss = float(update.metrics["train_loss"][k]) if "train_loss" in update.metrics else 0.0
            figures = Figures(share, told.get("examples", 0.0), loss)
            self._riders += riders(self._coding, figures, beyond)
            own = {
                n: v[k].detach().to("cpu", torch.float64, copy=True)
                for n, v in update.buffers.items()
            }
            self._buffers.append((share, own))

    def sums(self) -> dict[str, Params]:
        """Of each sent group."""
        assert self._layout is not None
        return self._layout.unflat(self._coding.decode(self._total))[0]

    def result(self, start: Params) -> tuple[dict[str, Params], Params, int]:
        """Mean of each sent group and of the float buffers, and how many numbers were clamped."""
        assert self._layout is not None
        names = sorted({n for _, own in self._buffers for n in own})
        at = {n: start[n].double().cpu() for n in names}
        beside = Layout.of({}, {n: tuple(v.shape) for n, v in at.items()})
        changes, all_riders = np.zeros(beside.values, np.int64), self._riders.copy()
        for share, own in self._buffers:
            changed = {n: v - at[n] for n, v in own.items()}
            coded, beyond = self._coding.encode(beside.flat({}, changed), share)
            changes += coded
            all_riders[RIDERS.index("clamped")] += beyond
        sums = np.concatenate([self._total, changes, all_riders])
        mean, figures = unseal(self._coding, sums, self.came)
        sent, _ = self._layout.unflat(mean[: len(self._total)])
        _, moved = beside.unflat(mean[len(self._total) :])
        return sent, {n: at[n] + v for n, v in moved.items()}, figures.clamped
