"""What this package raises on purpose."""


class CacheError(ValueError):
    """A value is out of range or a file is not what it should be: one line, the cause, what is allowed, what to do."""


class DeviceFull(MemoryError):
    """The device has too little memory for a request: one line, with both sizes. Fewer slots may fit."""


class PinningRefused(MemoryError):
    """The system refuses to pin more host memory: one line, with the requested size."""


class DeviceLost(Exception):
    """The device no longer works, for the reason in the message; results still pending are lost."""


def first_line(error: object) -> str:
    """First line of an error's message; the error's class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
