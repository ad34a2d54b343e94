"""What a user chooses, frozen. Every default lives here; the command line and `LLM` take theirs from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError

DEVICES = ("auto", "cpu", "simulated", "cuda")
WEIGHT_FORMATS = ("auto", "bf16")
CACHE_POLICIES = ("FIFO", "LRU")
MAX_THREADS = 1024  # more is a mistake, and would cost minutes and gigabytes of stacks


@dataclass(frozen=True)
class CacheConfig:
    """The expert cache on a device: `nblocks` indexes of `nways` slots, `quota` uploads per step (None: no limit)."""

    nblocks: int | None = None
    nways: int | None = None
    quota: int | None = None
    policy: str = "LRU"

    @property
    def requested(self) -> bool:
        return (self.nblocks, self.nways, self.quota, self.policy) != (None, None, None, CacheConfig.policy)


@dataclass(frozen=True)
class EngineConfig:
    """None means: chosen by `hybrid.plan` from the model and the machine."""

    model_path: Path | None = None  # None: the embedded model
    device: str = "auto"
    weight_format: str = "auto"
    threads: int | None = None
    max_seq_len: int | None = None
    max_batch: int = 8  # sequences that run together
    chunk_size: int = 512  # rows of one step at most: prefill chunks and decode rows together
    isa: str | None = None  # None: HYBRID_ISA, or the best of the machine
    cache_dir: Path | None = None  # packed stores made from HF directories; None: the user's cache folder
    check: bool = False  # read and verify every tensor before the first step
    cache: CacheConfig = field(default_factory=CacheConfig)


def check_config(config: EngineConfig) -> None:
    """Raise `ConfigError` naming the first value out of range."""
    _one_of("--device", config.device, DEVICES)
    _one_of("--format", config.weight_format, WEIGHT_FORMATS)
    _within("--max-batch", config.max_batch, 1)
    _within("--chunk-size", config.chunk_size, 1)
    _none_or_within("--threads", config.threads, 1, MAX_THREADS)
    _none_or_within("--max-seq-len", config.max_seq_len, 1)
    _none_or_within("--cache-nblocks", config.cache.nblocks, 1)
    _none_or_within("--cache-nways", config.cache.nways, 1)
    _none_or_within("--cache-quota", config.cache.quota, 0)
    _one_of("--cache-replace-policy", config.cache.policy, CACHE_POLICIES)
    if config.chunk_size < config.max_batch:
        raise ConfigError(
            f"--chunk-size {config.chunk_size} is smaller than --max-batch {config.max_batch}: "
            "a step must hold one row of every sequence; raise the one or lower the other"
        )


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} {value!r} is unknown; allowed: {', '.join(allowed)}")


def _none_or_within(flag: str, value: Any, minimum: int, maximum: float = math.inf) -> None:
    if value is not None:
        _within(flag, value, minimum, maximum)


def _within(flag: str, value: Any, minimum: int, maximum: float = math.inf) -> None:
    allowed = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
    if type(value) is not int:
        raise ConfigError(f"{flag} {value!r:.80} is not an int; it must be one, {allowed}")
    if not minimum <= value <= maximum:
        raise ConfigError(f"{flag} {value} is out of range; it must be {allowed}")
