"""Each turns the op list of a step into another: experts in two places, a GPU, memory nodes."""
