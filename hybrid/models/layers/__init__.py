"""Kinds of layers, one file each; `base.py` has their interface."""
