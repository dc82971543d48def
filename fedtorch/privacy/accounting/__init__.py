"""What a release costs, and what a run has spent."""

from fedtorch.privacy.accounting.events import Event, calibrate, epsilon

__all__ = ["Event", "calibrate", "epsilon"]
