"""Experts in two places: the cache, the devices that hold experts, and what both cost."""
