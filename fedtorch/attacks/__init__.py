"""Attacks on a run, by the owner of its data: what somebody who sees updates or models can find out."""
