"""Sums of what clients send that show no single one: masks that cancel (Bonawitz et al. 2017).

Nothing here reads or writes: ``protocol.py`` has two state machines, and ``sites/`` carries their messages.
"""
