"""Differential privacy: what a release costs, what a run has spent, and how noise is made."""
