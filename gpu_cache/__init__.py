"""The expert cache: which experts lie on a device, which are copied there, and what it is worth. Knows no models."""
