"""Files to begin with, which a user then changes."""

from __future__ import annotations

from pathlib import Path

from hybrid.errors import ConfigError


def write_new(path: Path, content: bytes, suffix: str, rule: str) -> None:
    """Write a file that is not there yet. rule: what the suffix follows from. Raises ConfigError."""
    if path.suffix != suffix:
        raise ConfigError(f"{path}: {rule}; give a name that ends in {suffix}")
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; give another name") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another name") from None
