"""Where clients train."""

from typing import TYPE_CHECKING

from fedtorch.lazy import offers

if TYPE_CHECKING:
    from fedtorch.engines.base import Engine, Session
    from fedtorch.engines.local import Local
    from fedtorch.engines.workers.processes import Processes
    from fedtorch.engines.workers.ray import Ray
else:
    __getattr__, __dir__ = offers(__name__, __file__)

__all__ = ["Engine", "Local", "Processes", "Ray", "Session"]
