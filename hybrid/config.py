"""Settings of the user, frozen. Each is declared once with default, help and allowed values (`hybrid.settings`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hybrid.errors import ConfigError, cache_errors
from hybrid.settings import check_settings, complete, describe, setting

DEVICES = ("auto", "cpu", "simulated", "cuda")
STEPS = ("auto", "threads", "torch-cpu")
OVERLAPS = {"none": "none", "next": "next-gate"}  # what is copied while misses run: names of prefetches
# First word of --format; `formats.mix` has the rest.
WEIGHT_FORMATS = ("auto", "bf16", "int8", "int4", "fp8", "fp8_row", "nvfp4", "mxfp4", "q8_0", "q6_k", "q5_k", "q4_k")
KV_FORMATS = ("bf16", "int8", "fp8")
LOADS = ("auto", "map", "copy")
CACHE_MODES = ("auto", "on", "off")
STREAM_MODES = ("auto", "on", "off")
CHUNK_SIZE = 512  # by default
MAX_NODES = 16  # memory nodes; what `cpu_kernels` can join
MAX_THREADS = 1024  # more is a mistake, and would cost minutes and gigabytes of stacks
_ABOVE_0: dict[str, Any] = {"minimum": 1e-6, "allowed": "a number above 0"}


def _is_numa(numa: str) -> bool:
    """Check the text alone. The plan checks that there are no more nodes than threads."""
    number = numa.isdecimal() and len(numa) < 20
    return numa in ("auto", "off") or (number and 1 <= int(numa) <= MAX_NODES)


def _policies() -> Iterable[str]:
    from gpu_cache.policies import names_of_policies

    return names_of_policies()


def _is_policy(name: str) -> bool:
    """Raises ConfigError for a user's file that holds none."""
    from gpu_cache.outside import is_file
    from gpu_cache.policies import names_of_policies, policy_class

    if is_file(name):
        with cache_errors("--cache-replace-policy"):
            policy_class(name)
        return True
    return name.lower() in map(str.lower, names_of_policies())


def _is_admission(name: str) -> bool:
    """Raises ConfigError for a user's file that holds none."""
    from gpu_cache.admission import known_admission, names_of_admissions
    from gpu_cache.outside import is_file

    if is_file(name):
        with cache_errors("--cache-admission"):
            known_admission(name)
        return True
    return name in names_of_admissions()


def _admissions() -> Iterable[str]:
    from gpu_cache.admission import names_of_admissions

    return names_of_admissions()


def _prefetches() -> Iterable[str]:
    from gpu_cache.prefetch import names_of_prefetches

    return names_of_prefetches()


def _is_prefetch(name: str) -> bool:
    """Whether a name is a rule, which may say how far it looks ahead, as the cache spells it. Raises ConfigError for a
    user's file that holds none.
    """
    from gpu_cache.errors import CacheError
    from gpu_cache.prefetch import PREFETCHES, is_file_of_prefetch, known_prefetch

    if is_file_of_prefetch(name):
        with cache_errors("--cache-prefetch"):
            known_prefetch(name, PREFETCHES)
        return True
    try:
        return known_prefetch(name, PREFETCHES) == name
    except CacheError:
        return False


def _mappings() -> Iterable[str]:
    from gpu_cache.geometry import MAPPINGS

    return MAPPINGS


@describe
@dataclass(frozen=True)
class CacheConfig:
    """The expert cache on a device: `nblocks` indexes of `nways` slots, `quota` copies per step (None: no limit).

    mode: "auto" takes what its verdict finds fastest after a warm-up. stream: whether steps that read prompts bring
    what a layer misses to the device instead of leaving it to the CPU; "auto" where costs say so. policy, admission,
    prefetch and mapping are names of `gpu_cache`. delay: copies end so many layers later, exactly, instead of when they
    are done: for tests and for comparisons with the simulator. poison: what is evicted becomes garbage at once.
    """

    PREFIX: ClassVar[str] = "cache_"
    GROUP: ClassVar[str] = "cache"

    nblocks: int | str | None = setting(
        None,  # as "auto": as many slots as fit
        "Indexes of the expert cache, or auto: what fits.",
        minimum=1,
        allowed="; --cache off is no cache",
        words=("auto",),
        metavar="N|auto",
    )
    nways: int | None = setting(None, "Experts that each index holds.", minimum=1)
    quota: int | None = setting(None, "Experts copied in one step at most.", minimum=0)
    policy: str = setting(
        "LRU",
        "FIFO, LRU, LFU, LFRU, SIEVE, S3-FIFO, MRS and more, or FILE.py:CLASS.",
        name="cache_replace_policy",
        choices=_policies,
        accepts=_is_policy,
    )
    admission: str = setting(
        "always",
        "Which misses are copied: always, second-touch, break-even, or FILE.py:CLASS.",
        choices=_admissions,
        accepts=_is_admission,
    )
    prefetch: str = setting(
        "none",
        "none, next-gate (ask the next layer's router early), frequency, transition, transition:3, FILE.py:CLASS.",
        choices=_prefetches,
        accepts=_is_prefetch,
    )
    mapping: str = setting("modulo", "Experts to indexes: modulo, prefix or hash.", choices=_mappings)
    mode: str = setting(
        "on", f"One of {', '.join(CACHE_MODES)}; auto follows the verdict.", name="cache", choices=CACHE_MODES
    )
    stream: str = setting(
        "auto",
        f"Prompts bring missed experts to the device: one of {', '.join(STREAM_MODES)}, by costs.",
        choices=STREAM_MODES,
    )
    warm: Path | None = setting(None, "Begin with the experts that this file lists.")  # of `engine.experts.warm_start`
    delay: int | None = setting(
        None, "Copies end after so many layers instead of when they are done.", minimum=0, shown="as copied"
    )
    poison: bool = setting(False, "What is evicted becomes garbage at once.", flag=False)
    seed: int = setting(0, "Of policies that draw lots.", flag=False, minimum=0)
    pin_weights: bool = setting(  # so that a GPU copies them from where they lie
        False, "Pin the weights of all experts, for faster copies to a GPU.", name="pin_weights", group="gpu"
    )
    strict_placement: bool = setting(  # results depend on where each expert ran, and on nothing else of the cache
        False,
        "With a GPU: experts are added in one order wherever they ran; slower.",
        name="strict_placement",
        group="gpu",
    )

    def __post_init__(self) -> None:
        complete(self)

    @property
    def requested(self) -> bool:
        return self != CacheConfig()


@describe
@dataclass(frozen=True)
class DeviceConfig:
    """A simulated device; the defaults are an RTX 4090 on PCIe 4.0 x16. Units are those of the names, 10^9 bytes."""

    PREFIX: ClassVar[str] = "device_"
    GROUP: ClassVar[str] = "device"

    copy_gbps: float = setting(25.0, "Of the simulated device: GB/s of copies to it.", **_ABOVE_0)
    latency_us: float = setting(10.0, "Microseconds before a copy or a layer begins there.", minimum=0, maximum=1e9)
    read_gbps: float = setting(1008.0, "GB/s of its memory, for modelled times.", **_ABOVE_0)  # decides for few rows
    tflops: float = setting(  # decides for many rows
        165.0, "10^12 operations a second there, for modelled times.", **_ABOVE_0
    )
    memory_gb: float = setting(24.0, "GB of its memory: slots, and with --step-on all else.", **_ABOVE_0)
    jitter_us: float = setting(
        0.0, "Up to so much later, at random, a copy begins.", flag=False, minimum=0, maximum=1e9
    )


@describe
@dataclass(frozen=True)
class EngineConfig:
    """None means: chosen by `hybrid.plan.plan` from the model and the machine. Constructed directly it ignores the
    environment.
    """

    GROUP: ClassVar[str] = "engine"

    model_path: Path | None = setting(
        None,
        "Model directory, GGUF file, packed store, or a repository of the Hugging Face hub (org/name).",
        shown="embedded model",
        group="model",
    )
    device: str = setting(  # what auto is on a machine, `hybrid.plan.resolve` decides
        "auto",
        f"One of {', '.join(DEVICES)}; auto is cuda where a GPU can be used, or cpu.",
        choices=DEVICES,
        late=True,
    )
    weight_format: str = setting(  # `hybrid.formats.mix.parse_mix` checks it
        "auto",
        f"Of the weights: one of {', '.join(WEIGHT_FORMATS)}, or a mix such as int4,head=int8.",
        name="format",
        allowed="write 'auto', 'int8' or a mix",
    )
    threads: int | None = setting(
        None, "Threads that compute.", minimum=1, maximum=MAX_THREADS, shown="chosen for the machine"
    )
    max_seq_len: int | None = setting(
        None, "Tokens of one sequence at most.", minimum=1, shown="chosen for the machine"
    )
    _: KW_ONLY
    kv_format: str = setting("bf16", f"Of keys and values: one of {', '.join(KV_FORMATS)}.", choices=KV_FORMATS)
    batch_invariant: bool | None = setting(  # None: where that is free
        None,
        "Results do not depend on what else runs in a step.",
        negatable=True,
        shown="on where it costs nothing: everywhere but with amx",
    )
    numa: str = setting(  # more nodes than the machine has are simulated
        "auto",
        "Memory nodes to split the weights over: auto, off or a number.",
        accepts=_is_numa,
        allowed=f"auto, off, or a number of nodes from 1 to {MAX_NODES}",
    )
    load: str = setting(  # auto copies to several nodes
        "auto", f"Weights are used in the mapped file or in a copy: one of {', '.join(LOADS)}.", choices=LOADS
    )
    max_batch: int = setting(8, "Sequences that run together.", minimum=1)
    prefix_memory_gb: float | None = setting(
        None,
        "GB for prompts that are kept beyond the sequences; 0: none.",
        minimum=0,
        maximum=1e6,
        shown="half of what is left",
    )
    kv_idle_release: float | None = setting(
        None, "Seconds without requests after which kept prompts are given up.", minimum=0, maximum=1e9, shown="never"
    )
    prefix_dir: Path | None = setting(None, "Where prompts are kept between starts.", shown="nowhere")
    prefix_disk_gb: float = setting(10.0, "GB of prompts that are kept there.", **_ABOVE_0)
    chunk_size: int | str = setting(  # of prefill and decode together
        CHUNK_SIZE,
        "Tokens computed in one step at most; auto: as many as the speeds of this machine, measured, call for.",
        minimum=1,
        words=("auto",),
        metavar="N|auto",
    )
    max_itl_ms: float | None = setting(
        None,
        "Milliseconds between two tokens of a stream, to which prompts that are read beside it keep; 0: no limit.",
        minimum=0,
        maximum=1e9,
        shown="a fifth more than without prompts",
    )
    speculate: bool = setting(
        True, "Guess tokens that repeat the text and compute them along, where that pays.", negatable=True
    )
    isa: str | None = setting(None, "Instruction set; the best of the machine.", flag=False, late=True)
    memory_share: int = setting(1, "Engines of this machine that share its memory.", flag=False, minimum=1)
    cache_dir: Path | None = setting(None, "Where packed models are kept.", shown="user cache")
    check: bool = setting(False, "Verify every weight while loading.")
    # How answers in a chat are written; `hybrid.text.answer_format` knows the names and checks them.
    reasoning_parser: str = setting(
        "auto", "Marks around reasoning in answers; auto: what the chat template says.", group="model"
    )
    tool_parser: str = setting(
        "auto", "Dialect of tool calls in answers; auto: what the chat template says.", group="model"
    )
    cache: CacheConfig = field(default_factory=CacheConfig)
    simulated: DeviceConfig = field(default_factory=DeviceConfig)
    routes: bool = setting(False, "Whether `Engine.routes` may get an observer.", flag=False)
    route_trace: Path | None = setting(
        None, "Tokens take the experts of this trace, not of the model's routers.", group="files"
    )
    # Where all but the experts is computed: auto is the GPU with --device cuda, else the threads. torch-cpu is the same
    # code on torch's CPU device, in place of a GPU: for tests, and for looking at plans.
    step_on: str = setting(
        "auto",
        f"Where all but the experts runs: one of {', '.join(STEPS)}; torch-cpu stands in for a GPU.",
        choices=STEPS,
        group="gpu",
    )
    gpu_kv_tokens: int | None = setting(  # at least the chunk size, as `check_config` knows
        None, "Most recent tokens of a sequence that the GPU mirrors.", shown="what fits", group="gpu"
    )
    cuda_graphs: bool = setting(
        True, "Ask a GPU for a whole layer at once in steps that decode.", negatable=True, group="gpu"
    )

    def __post_init__(self) -> None:
        complete(self)

    @property
    def least_chunk(self) -> int:
        """Tokens of a step, the fewest that auto may choose."""
        return max(CHUNK_SIZE, self.max_batch) if isinstance(self.chunk_size, str) else self.chunk_size

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
    """Raise `ConfigError` naming the first value out of range, or the first two that exclude each other."""
    check_settings(config)
    if config.cached and config.numa not in ("auto", "off", "1"):
        raise ConfigError(f"--numa {config.numa} cannot be had with an expert cache; use --numa off or --cache off")
    if config.gpu_kv_tokens is not None and config.gpu_kv_tokens < config.least_chunk:
        raise ConfigError(
            f"--gpu-kv-tokens {config.gpu_kv_tokens} is out of range; it must be at least {config.least_chunk}"
        )
    if config.step_device and config.numa not in ("auto", "off", "1"):
        raise ConfigError(f"--numa {config.numa} cannot be had with a step on a GPU; use --numa off")
    if config.route_trace and config.cache.prefetch == "next-gate":
        raise ConfigError(
            "--route-trace cannot be had with the prefetch next-gate: the experts of the trace are not those of "
            "the routers, which next-gate asks; use --cache-prefetch none and --overlap none"
        )
    if config.least_chunk < config.max_batch:
        raise ConfigError(
            f"--chunk-size {config.chunk_size} is smaller than --max-batch {config.max_batch}: "
            "a step must hold one row of every sequence; raise the one or lower the other"
        )
