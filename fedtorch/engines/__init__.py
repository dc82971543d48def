"""Where clients train."""

from fedtorch.engines.base import Engine, Session
from fedtorch.engines.local import Local

__all__ = ["Engine", "Local", "Session"]
