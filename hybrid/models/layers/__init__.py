"""Kinds of layers: one file each, which answers all that is asked of such a layer; `base.py` says what that is."""
