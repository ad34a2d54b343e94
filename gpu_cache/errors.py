"""What this package raises on purpose."""


class CacheError(ValueError):
    """A value is out of range or a file is not what it should be: one line, the cause, what is allowed, what to do."""


class DeviceFull(MemoryError):
    """The device has no room for what was asked: one line, with both sizes. Fewer slots may fit."""


class PinningRefused(MemoryError):
    """The system pins no more memory of the host: one line, with the size that was asked."""


class DeviceLost(Exception):
    """The device does not answer any more, for the reason that is said; nothing it still owed will come."""


def first_line(error: object) -> str:
    """Of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
