"""The expert cache: which experts lie on a device, which are copied there, and what that is worth. Knows nothing of models."""
