"""Randomness nobody can foresee, and noise made of it."""
