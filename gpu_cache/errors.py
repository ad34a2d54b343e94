"""What this package raises on purpose."""


class CacheError(ValueError):
    """A value is out of range or a file is not what it should be: one line, the cause, what is allowed, what to do."""
