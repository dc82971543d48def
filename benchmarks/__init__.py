"""Measurements behind the numbers in RESULTS.md; run by hand, not by the test suite."""
