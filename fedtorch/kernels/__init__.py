"""Compiled loops that take the place of torch where they are faster."""
