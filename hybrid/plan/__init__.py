"""What a model needs on a machine, computed before a byte is loaded."""
