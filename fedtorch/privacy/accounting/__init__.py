"""The price of a release, and the account of a run."""

from fedtorch.privacy.accounting.events import Event, calibrate, epsilon

__all__ = ["Event", "calibrate", "epsilon"]
