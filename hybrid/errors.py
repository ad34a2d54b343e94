"""Named errors. Each message is one line: the cause, the value, what is allowed, what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hybrid.printable import printable


class HybridError(Exception):
    """Base of everything this library raises on purpose; the command line turns it into exit code 2.

    Its text is safe to show, whatever a file or a flag put into it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(HybridError):
    """A flag, parameter or model configuration is missing, contradictory or out of range."""


class WeightsError(HybridError):
    """A checkpoint or packed store is missing, damaged or does not match its configuration."""


class CapacityError(HybridError):
    """Something does not fit: memory, disk, sequence length."""


class RequestError(HybridError):
    """One request cannot be served as asked; others are not affected."""


class KernelError(HybridError):
    """The compiled kernels refuse: an instruction set that this machine lacks, a step out of the planned extents."""


class DeviceFailed(KernelError):
    """A device failed in the middle of a step, which is lost; the next ones run on the CPU alone."""


class StepCancelled(HybridError):
    """The running step was cancelled between two of its operations; what it wrote must be discarded."""


def forked_error() -> KernelError:
    """What a child of a process says of the models that its parent has opened."""
    return KernelError("this model was opened before a fork, which its threads do not survive: open it again")


@contextmanager
def cache_errors(flag: str = "") -> Iterator[None]:
    """What `gpu_cache` refuses is a ConfigError of ours, which names the flag if there is one."""
    from gpu_cache.errors import CacheError

    try:
        yield
    except CacheError as error:
        raise ConfigError(f"{flag} {error}".strip()) from None
