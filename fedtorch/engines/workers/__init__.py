"""Engines that train in other processes."""
