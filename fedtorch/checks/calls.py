"""Who hears every call that torch dispatches, as trials do that follow numbers through a model."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Hears them while it is entered; compiled models run as they were before they were compiled.

    For torch's own modes each call reads torch's compiler first, so that it leaves them alone: a second or
    two, and 60 MiB. Where it is read already, compiled models would have the mode itself compiled.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not by reading it."""
        return False

    def __enter__(self) -> Self:
        """From here on."""
        there = "torch._dynamo" in sys.modules
        self._plain: AbstractContextManager[object] = (
            torch.compiler.set_stance("force_eager") if there else nullcontext()
        )
        self._plain.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Until here."""
        super().__exit__(*raised)
        self._plain.__exit__(*raised)
