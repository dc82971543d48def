"""Where clients train."""

from fedtorch.engines.base import Engine, Session
from fedtorch.engines.local import Local
from fedtorch.engines.workers.processes import Processes
from fedtorch.engines.workers.ray import Ray

__all__ = ["Engine", "Local", "Processes", "Ray", "Session"]
