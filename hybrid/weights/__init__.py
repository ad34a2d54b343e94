"""From a checkpoint to a packed store that is mapped into memory."""
