"""What a user chooses, frozen. Every default lives here; the command line and `LLM` take theirs from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError

DEVICES = ("auto", "cpu", "simulated", "cuda")
WEIGHT_FORMATS = ("auto", "bf16", "int8", "int4", "fp8", "mxfp4")  # first word of --format; `weights.mix` has the rest
KV_FORMATS = ("bf16", "int8", "fp8")
LOADS = ("auto", "map", "copy")
CACHE_POLICIES = ("FIFO", "LRU")
MAX_NODES = 16  # memory nodes; what `cpu_kernels` can join
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
    weight_format: str = "auto"  # one format, or a mix: "int4,head=int8"; `hybrid.weights.mix.parse_mix` checks it
    kv_format: str = "bf16"
    threads: int | None = None
    numa: str = "auto"  # "off", or a number of memory nodes as text: more than the machine has are simulated
    load: str = "auto"  # weights mapped from the file, or copied to memory; auto copies to several nodes
    max_seq_len: int | None = None
    max_batch: int = 8  # sequences that run together
    chunk_size: int = 512  # rows of one step at most: prefill chunks and decode rows together
    batch_invariant: bool | None = None  # logits independent of the rest of the batch; None: where that is free
    isa: str | None = None  # None: HYBRID_ISA, or the best of the machine
    cache_dir: Path | None = None  # packed stores made from HF directories; None: the user's cache folder
    check: bool = False  # read and verify every tensor before the first step
    cache: CacheConfig = field(default_factory=CacheConfig)


def check_config(config: EngineConfig) -> None:
    """Raise `ConfigError` naming the first value out of range."""
    _one_of("--device", config.device, DEVICES)
    if not isinstance(config.weight_format, str):
        raise ConfigError(f"--format {config.weight_format!r:.80} is not a text; write 'auto', 'int8' or a mix")
    _one_of("--kv-format", config.kv_format, KV_FORMATS)
    if not isinstance(config.batch_invariant, bool | None):
        raise ConfigError(
            f"--batch-invariant {config.batch_invariant!r:.80} is not a truth value; use True, False or None"
        )
    _within("--max-batch", config.max_batch, 1)
    _within("--chunk-size", config.chunk_size, 1)
    _none_or_within("--threads", config.threads, 1, MAX_THREADS)
    _check_numa(config.numa)
    _one_of("--load", config.load, LOADS)
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


def _check_numa(numa: Any) -> None:
    """The number of threads, which it may not exceed either, is known to the plan alone."""
    number = isinstance(numa, str) and numa.isdecimal() and len(numa) < 20
    if numa not in ("auto", "off") and not (number and 1 <= int(numa) <= MAX_NODES):
        raise ConfigError(
            f"--numa {numa!r:.80} is unknown; allowed: auto, off, or a number of nodes from 1 to {MAX_NODES}"
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
