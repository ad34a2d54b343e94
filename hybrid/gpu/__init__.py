"""The torch half of a step on a GPU. Nothing here is imported unless a device computes steps."""
