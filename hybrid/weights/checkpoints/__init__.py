"""Checkpoints: the sources that weights are packed from."""
