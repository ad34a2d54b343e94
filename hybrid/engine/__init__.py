"""Runs the steps of one model: addresses bound to a plan, keys and values, routes."""
