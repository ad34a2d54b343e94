"""What a user chooses, frozen. Every default lives here; the command line and `LLM` take theirs from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError

DEVICES = ("auto", "cpu", "simulated", "cuda")
STEPS = ("auto", "threads", "torch-cpu")
OVERLAPS = {"none": "none", "next": "next-gate"}  # what is copied while misses run: names of prefetches
WEIGHT_FORMATS = ("auto", "bf16", "int8", "int4", "fp8", "mxfp4")  # first word of --format; `weights.mix` has the rest
KV_FORMATS = ("bf16", "int8", "fp8")
LOADS = ("auto", "map", "copy")
CACHE_MODES = ("auto", "on", "off")
STREAM_MODES = ("auto", "on", "off")
MAX_NODES = 16  # memory nodes; what `cpu_kernels` can join
MAX_THREADS = 1024  # more is a mistake, and would cost minutes and gigabytes of stacks


@dataclass(frozen=True)
class CacheConfig:
    """The expert cache on a device: `nblocks` indexes of `nways` slots, `quota` copies per step (None: no limit).

    mode: "auto" takes what its verdict finds fastest after a warm-up. stream: whether steps that read prompts bring
    what a layer misses to the device instead of leaving it to the CPU; "auto" where costs say so. policy, admission,
    prefetch and mapping are names of `gpu_cache`. delay: copies end so many layers later, exactly, instead of when they
    are done: for tests and for comparisons with the simulator. poison: what is evicted becomes garbage at once.
    """

    nblocks: int | str | None = None  # "auto" and None: as many slots as fit
    nways: int | None = None
    quota: int | None = None
    policy: str = "LRU"
    admission: str = "always"
    prefetch: str = "none"
    mapping: str = "modulo"
    mode: str = "on"
    stream: str = "auto"
    warm: Path | None = None  # experts that a file of `hybrid.engine.experts.warm_start` lists are there from the start
    delay: int | None = None
    poison: bool = False
    seed: int = 0
    pin_weights: bool = False  # all weights of the experts, so that a GPU copies them from where they lie
    strict_placement: bool = False  # results depend on where each expert ran, and on nothing else of the cache

    @property
    def requested(self) -> bool:
        return self != CacheConfig()


@dataclass(frozen=True)
class DeviceConfig:
    """A simulated device; what is not said is an RTX 4090 on PCIe 4.0 x16."""

    copy_gbps: float = 25.0  # 10^9 bytes per second from the memory of the host
    latency_us: float = 10.0  # of a copy, and of starting the experts of a layer
    read_gbps: float = 1008.0  # of its own memory, which decides how fast experts of few rows are computed
    tflops: float = 165.0  # 10^12 operations per second, which decides it for many rows
    memory_gb: float = 24.0  # 10^9 bytes, for slots, and for a step's other parts if they are there
    jitter_us: float = 0.0  # up to so much later, at random, a copy begins


@dataclass(frozen=True)
class EngineConfig:
    """None means: chosen by `hybrid.plan.plan` from the model and the machine."""

    model_path: Path | None = None  # None: the embedded model
    device: str = "auto"  # what that is on a machine, `hybrid.plan.resolve` decides
    weight_format: str = "auto"  # one format, or a mix: "int4,head=int8"; `hybrid.formats.mix.parse_mix` checks it
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
    simulated: DeviceConfig = field(default_factory=DeviceConfig)
    routes: bool = False  # whether `Engine.routes` may get an observer
    route_trace: Path | None = None  # whose experts rows take, instead of those that the model's routers choose
    # Where all but the experts is computed: auto is the GPU with --device cuda, else the threads. torch-cpu is the same
    # code on torch's CPU device, in place of a GPU: for tests, and for looking at plans.
    step_on: str = "auto"
    cuda_graphs: bool = True  # steps that decode on a GPU are captured
    gpu_kv_tokens: int | None = None  # most recent tokens of every sequence that the device mirrors; None: what fits

    @property
    def cached(self) -> bool:
        """Whether experts may be computed on a device."""
        return self.device in ("simulated", "cuda") and self.cache.mode != "off"

    @property
    def step_device(self) -> str | None:
        """torch's name of the device that computes all but the experts; None: the threads do."""
        if self.step_on == "torch-cpu":
            return "cpu"
        return "cuda" if self.device == "cuda" and self.step_on == "auto" else None


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
    check_cache(config.cache)
    _check_device(config.simulated)
    if config.cached and config.numa not in ("auto", "off", "1"):
        raise ConfigError(f"--numa {config.numa} cannot be had with an expert cache; use --numa off or --cache off")
    _one_of("--step-on", config.step_on, STEPS)
    _none_or_within("--gpu-kv-tokens", config.gpu_kv_tokens, config.chunk_size)
    if config.step_device and config.numa not in ("auto", "off", "1"):
        raise ConfigError(f"--numa {config.numa} cannot be had with a step on a GPU; use --numa off")
    if config.route_trace and config.cache.prefetch != "none":
        raise ConfigError(
            "--route-trace cannot be had with the prefetch next-gate: a trace does not hold what a router says one "
            "layer early; use --cache-prefetch none and --overlap none"
        )
    if config.chunk_size < config.max_batch:
        raise ConfigError(
            f"--chunk-size {config.chunk_size} is smaller than --max-batch {config.max_batch}: "
            "a step must hold one row of every sequence; raise the one or lower the other"
        )


def check_cache(cache: CacheConfig) -> None:
    """Raise `ConfigError` naming the first value out of range. The names are known to `gpu_cache` alone."""
    if cache.nblocks != "auto":
        _none_or_within("--cache-nblocks", cache.nblocks, 1)
    _none_or_within("--cache-nways", cache.nways, 1)
    _none_or_within("--cache-quota", cache.quota, 0)
    _none_or_within("--cache-delay", cache.delay, 0)
    _one_of("--cache", cache.mode, CACHE_MODES)
    _one_of("--cache-stream", cache.stream, STREAM_MODES)
    if not cache.requested:
        return
    from gpu_cache.admission import ADMISSIONS
    from gpu_cache.geometry import MAPPINGS
    from gpu_cache.policies import POLICIES
    from gpu_cache.prefetch import PREFETCHES

    if cache.policy.lower() not in map(str.lower, POLICIES):
        _one_of("--cache-replace-policy", cache.policy, tuple(POLICIES))
    _one_of("--cache-admission", cache.admission, tuple(ADMISSIONS))
    _one_of("--cache-prefetch", cache.prefetch, PREFETCHES)
    _one_of("--cache-mapping", cache.mapping, MAPPINGS)


def _check_device(device: DeviceConfig) -> None:
    for name, value in vars(device).items():
        least = 0 if name in ("latency_us", "jitter_us") else 1e-6
        if type(value) not in (int, float) or not least <= value < math.inf:
            said = "DeviceConfig.jitter_us" if name == "jitter_us" else f"--device-{name.replace('_', '-')}"
            raise ConfigError(
                f"{said} {value!r:.80} is out of range; give a number {'from' if not least else 'above'} 0"
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
