"""`hybrid simulate`: what expert caches of many shapes and policies would have done with a recorded trace."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hybrid.commands.console import progress_bar, say, show
from hybrid.commands.flags import command, new_app
from hybrid.commands.simulate_curve import curve_policies, curves_to_table, run_curves
from hybrid.commands.simulate_output import to_csv, to_json, to_table
from hybrid.errors import ConfigError, cache_errors
from hybrid.files import FileKind, Reading, check_output, read_json_object
from hybrid.files.traces import check_trace_output, kind_of_format, read_trace, write_trace
from hybrid.lab.kept_results import KeptResults
from hybrid.settings import check_settings, setting

if TYPE_CHECKING:
    from gpu_cache.costs import Machine
    from gpu_cache.simulator import Setting
    from gpu_cache.trace import Calls, Trace

app = new_app()

OUTPUTS = ("table", "csv", "json")
POLICY = "LRU,LFU,Belady,bypass-Belady"
NO_CURVE = (
    *("nways", "admission", "prefetch", "quota", "copy_delay", "pcie_gbps", "device_gbps", "cpu_gbps", "expert_mb"),
    *("other_ms", "layer_ms", "profile", "results", "libcachesim", "convert", "train", "train_fraction"),
)
OF_REPLAYS = (
    *("nblocks", "policy", "mapping", "nways", "admission", "prefetch", "quota", "copy_delay", "pcie_gbps"),
    *("device_gbps", "cpu_gbps", "expert_mb", "other_ms", "layer_ms", "profile", "results", "train", "train_fraction"),
)
PROFILES = Reading(64 << 20, "make it with `hybrid bench --output json > FILE`", prefix="--profile")


@dataclass(frozen=True)
class SimulateOptions:
    """A trace, the caches that it is replayed through, and the machine whose speed is predicted."""

    COMMAND: ClassVar[str] = "simulate"

    trace: tuple[str, ...] = setting(
        (), "A trace of `hybrid run --trace`, or of others: see hybrid trace formats.", metavar="PATH", group="traces"
    )
    nblocks: str | None = setting(
        None, "Indexes, as 14,16.", shown="the number of layers", metavar="LIST", group="caches"
    )
    nways: str | None = setting(
        None, "Slots of each.", shown="a quarter and half of the experts", metavar="LIST", group="caches"
    )
    policy: str | None = setting(
        None,
        "LRU,LFU,Belady,..., all, FILE.py:CLASS; a wrong one lists them.",
        shown=f"{POLICY}; of --curve those that have one",
        metavar="LIST",
        group="caches",
    )
    admission: str = setting(
        "always", "always, second-touch, break-even, FILE.py:CLASS.", metavar="LIST", group="caches"
    )
    prefetch: str = setting(
        "none", "none, frequency, transition, next-gate, perfect, FILE.py:CLASS.", metavar="LIST", group="caches"
    )
    mapping: str = setting("modulo", "modulo, prefix, hash.", metavar="LIST", group="caches")
    quota: str = setting("none", "Copies in a step at most; none for no limit.", metavar="LIST", group="caches")
    copy_delay: str = setting("0", "Lookups that a copy takes beyond the next one.", metavar="LIST", group="caches")
    curve: bool = setting(False, "Hits of every number of ways, from one pass for each policy.", group="caches")
    train: Path | None = setting(
        None, "A trace that prefetches learn from, instead of those replayed.", metavar="PATH", group="traces"
    )
    train_fraction: float | None = setting(
        None, "Share of the steps that prefetches learn from; the others are replayed.", group="traces"
    )
    layers: int | None = setting(
        None, "MoE layers of the model.", shown="what the trace has", minimum=1, group="traces"
    )
    experts: int | None = setting(None, "Experts of a layer.", shown="what the trace has", minimum=1, group="traces")
    seed: int = setting(0, "Of policies that draw lots.", group="caches")
    pcie_gbps: float | None = setting(None, "GB/s of copies to the device.", group="rates")
    device_gbps: float | None = setting(None, "GB/s with which the device reads experts.", group="rates")
    cpu_gbps: float | None = setting(None, "GB/s with which the CPU reads experts.", group="rates")
    expert_mb: float | None = setting(None, "MB of an expert.", group="rates")
    other_ms: float = setting(0.0, "Time of a step besides its experts.", group="rates")
    layer_ms: float = setting(0.0, "Time to begin and join a layer on the device.", group="rates")
    profile: Path | None = setting(
        None, "JSON of `hybrid bench`: its read bandwidth is that of the CPU.", group="rates"
    )
    workers: int | None = setting(None, "Processes.", minimum=1, shown="one for each processor", group="output")
    results: Path | None = setting(None, "Keep results here, and do not replay again what is there.", group="files")
    libcachesim: Path | None = setting(None, "Write the calls as CSV for libCacheSim, replay nothing.", group="files")
    convert: Path | None = setting(None, "Write the trace as CSV or parquet, replay nothing.", group="files")
    output: str = setting("table", "table, csv or json.", choices=OUTPUTS, group="output")


@command(app, "what was replayed is in the file of --results, if there is one")
def simulate(options: SimulateOptions) -> None:
    """Replay traces through every combination of the given shapes and policies; count hits, copies and evictions.

    With several traces, which are given one by one, every figure is their mean with its standard deviation.
    Belady and bypass-Belady know the future, static-best and static-layers never copy. With the rates of a machine,
    hits become predicted tokens a second.
    """
    check_settings(options)
    with cache_errors():
        if options.curve:
            return show(CURVE_FORMATS[options.output](curve_all(options)))
        check_output("--libcachesim", options.libcachesim, _libcachesim_kind())
        check_trace_output("--convert", options.convert)
        if options.libcachesim is not None or options.convert is not None:
            if wrong := given(options, OF_REPLAYS):
                flag = "--convert" if options.libcachesim is None else "--libcachesim"
                raise ConfigError(f"{flag} writes the whole trace and replays nothing: drop it, or {', '.join(wrong)}")
            return _convert(read_traces(options), options.libcachesim, options.convert)
        show(FORMATS[options.output](replay_all(options)))


def given(options: SimulateOptions, names: Sequence[str]) -> list[str]:
    """The flags of those settings that are not what they are by default."""
    usual = {field.name: field.default for field in fields(SimulateOptions)}
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != usual[name]]


def curve_all(options: SimulateOptions) -> dict[str, Any]:
    """What `run_curves` makes of the traces and caches of these options. Raises ConfigError and CacheError."""
    from gpu_cache.trace import calls

    if wrong := given(options, NO_CURVE):
        raise ConfigError(
            "--curve has the hits of every number of ways, of copies after every miss, at once and without a limit: "
            f"drop {', '.join(wrong)}, or drop --curve"
        )
    policies = curve_policies(None if options.policy is None else _words("--policy", options.policy))
    grouped = {name: calls(trace) for name, trace in read_traces(options).items()}
    nblocks = dict.fromkeys(_nblocks(next(iter(grouped.values())), options))
    mappings = dict.fromkeys(word.lower() for word in _words("--mapping", options.mapping))
    return run_curves(grouped, policies, list(nblocks), list(mappings))


def replay_all(options: SimulateOptions) -> dict[str, Any]:
    """What `run` makes of the traces, caches and rates of these options. Raises ConfigError and CacheError."""
    machine = make_machine(options)
    kept = KeptResults(options.results, "--results")
    grouped = read_calls(options)
    settings = make_settings(next(iter(grouped.values())), options)
    warn_of_few_ways(grouped.values(), settings)
    warn_of_few_named(grouped, settings)
    return run(grouped, settings, machine, options.workers or len(os.sched_getaffinity(0)), kept)


def read_calls(options: SimulateOptions) -> dict[str, Calls]:
    """Of every trace, by its path, with what teaches prefetches. Raises ConfigError and CacheError."""
    from gpu_cache.teaching import taught_by, taught_by_first
    from gpu_cache.trace import calls

    if options.train is not None and options.train_fraction is not None:
        raise ConfigError("--train and --train-fraction both say what prefetches learn from; give one of them")
    grouped = {name: calls(trace) for name, trace in read_traces(options).items()}
    if options.train_fraction is not None:
        return {name: taught_by_first(each, options.train_fraction) for name, each in grouped.items()}
    if options.train is None:
        return grouped
    layers, experts = next((each.layers, each.experts) for each in grouped.values())
    teacher = calls(read_trace(options.train.expanduser(), layers, experts, "--train"))
    return {name: taught_by(each, teacher) for name, each in grouped.items()}


def read_traces(options: SimulateOptions) -> dict[str, Trace]:
    """Every trace by its path, each once. Raises ConfigError unless they can be of one model."""
    paths = list(dict.fromkeys(options.trace))
    if not paths:
        raise ConfigError("Missing option '--trace'; give a file that `hybrid run --trace FILE` records")
    traces = {path: read_trace(Path(path).expanduser(), options.layers, options.experts, "--trace") for path in paths}
    for what in ("layers", "experts"):
        found = {path: getattr(trace, what) for path, trace in traces.items()}
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"the traces have {', '.join(map(str, found.values()))} {what}; if they are of one model, say how many "
                f"it has: --{what} {max(found.values())}"
            )
    return traces


def _convert(traces: Mapping[str, Trace], libcachesim: Path | None, convert: Path | None) -> None:
    from gpu_cache.traces import known_format

    if len(traces) > 1:
        raise ConfigError(f"{len(traces)} traces cannot be converted into one file; give one --trace")
    (trace,) = traces.values()
    if libcachesim is not None:
        write_trace(libcachesim, trace, known_format("libcachesim"))
    if convert is not None:
        write_trace(convert, trace)


def _libcachesim_kind() -> FileKind:
    from gpu_cache.traces import known_format

    return kind_of_format(known_format("libcachesim"))


def make_settings(calls: Calls, options: SimulateOptions) -> list[Setting]:
    """Every combination, each once. Raises ConfigError for a list that is none."""
    from gpu_cache.admission import known_admission
    from gpu_cache.policies import known_policy
    from gpu_cache.prefetch import known_prefetch
    from gpu_cache.simulator import SCHEDULES, Setting, policy_names

    ways = sorted({max(1, calls.experts // 4), max(1, calls.experts // 2)})
    words = _words("--policy", options.policy or POLICY)
    named = [name for word in words for name in (policy_names() if word.lower() == "all" else (word,))]
    policies = [known_policy(name, policy_names()) for name in named]
    grid = product(
        _nblocks(calls, options),
        ways if options.nways is None else _counts("--nways", options.nways),
        _words("--mapping", options.mapping),
        [None if word == "none" else _count("--quota", word) for word in _words("--quota", options.quota)],
        policies,
        [known_admission(word) for word in _words("--admission", options.admission)],
        _counts("--copy-delay", options.copy_delay),
        [known_prefetch(word) for word in _words("--prefetch", options.prefetch)],
    )
    settings = [
        Setting(n, m, p, a, g.lower(), q, d, options.seed, f)
        if p not in SCHEDULES
        else Setting(n, m, p, mapping=g.lower(), quota=q, delay=d, seed=options.seed)
        for n, m, g, q, p, a, d, f in grid
    ]
    return list(dict.fromkeys(settings))


def warn_of_few_ways(traces: Iterable[Calls], settings: list[Setting]) -> None:
    largest = max(calls.largest for calls in traces)
    few = sorted({setting.nways for setting in settings if setting.nways < largest})
    if few:
        say(
            f"warning: a layer asks for up to {largest} experts in a step, which an index of "
            f"{', '.join(map(str, few))} ways cannot hold together: what it lacks goes to the CPU"
        )


def warn_of_few_named(traces: Mapping[str, Calls], settings: list[Setting]) -> None:
    from gpu_cache.prefetch import NEXT_GATE

    if not any(setting.prefetch == NEXT_GATE for setting in settings):
        return
    for path, calls in traces.items():
        if 0 < calls.named_share < 1:
            say(
                f"warning: {path} holds what routers say one layer early for {calls.named_share:.1%} of the calls "
                f"before the last layer: {NEXT_GATE} copies nothing ahead for the others"
            )


def make_machine(options: SimulateOptions) -> Machine | None:
    """The machine of the cost model, None if no rate is given. Raises ConfigError when some are missing."""
    from gpu_cache.costs import Machine

    rates = {name: getattr(options, name) for name in ("pcie_gbps", "device_gbps", "cpu_gbps", "expert_mb")}
    if options.profile is not None and rates["cpu_gbps"] is None:
        rates["cpu_gbps"] = _read_bandwidth(options.profile)
    given = {name: rate for name, rate in rates.items() if rate is not None}
    if not given:
        return None
    missing = [f"--{name.replace('_', '-')}" for name in rates if name not in given]
    if missing:
        raise ConfigError(f"predicting speed also needs {', '.join(missing)}; give all four rates or none")
    expert_bytes = given.pop("expert_mb") * 1e6
    return Machine(**given, expert_bytes=expert_bytes, other_ms=options.other_ms, layer_ms=options.layer_ms)


def _read_bandwidth(profile: Path) -> float:
    found = read_json_object(profile, PROFILES)
    try:
        return float(found["machine"]["read_gbps"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise PROFILES.refuse(profile, "has no read bandwidth") from None


def run(
    traces: Mapping[str, Calls], settings: list[Setting], machine: Machine | None, workers: int, kept: KeptResults
) -> dict[str, Any]:
    """Replay and describe: {"provenance": ..., "cost_model": ..., "results": [...]}. With several traces, "results" has
    the mean of each setting, and "replays" what it is the mean of.
    """
    from gpu_cache.sweep import describe_trace, provenance, sweep
    from hybrid import __version__

    replays: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for path, calls in traces.items():
            name = "replays" if len(traces) == 1 else f"replays of {path}"
            rows = sweep(calls, settings, machine, workers, kept, partial(progress, name))
            replays += [{"trace": path, **row} for row in rows]
    described = [{"file": path, **describe_trace(calls)} for path, calls in traces.items()]
    about = {**provenance(__version__), "trace": described[0]}
    model = None if machine is None else asdict(machine)
    if len(traces) == 1:
        return {"provenance": about, "cost_model": model, "results": replays}
    from hybrid.commands.spread import mean_rows

    results = mean_rows(replays, len(settings))
    return {"provenance": {**about, "traces": described}, "cost_model": model, "results": results, "replays": replays}


FORMATS: dict[str, Callable[[dict[str, Any]], str]] = dict(zip(OUTPUTS, (to_table, to_csv, to_json), strict=True))
CURVE_FORMATS = {**FORMATS, "table": curves_to_table}


def _nblocks(calls: Calls, options: SimulateOptions) -> list[int]:
    return [calls.layers] if options.nblocks is None else _counts("--nblocks", options.nblocks)


def _words(flag: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{flag} {text!r} is not a list; write words with commas between them")
    return words


def _counts(flag: str, text: str) -> list[int]:
    return [_count(flag, word) for word in _words(flag, text)]


def _count(flag: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ConfigError(f"{flag} has {word!r:.80}, which is not a whole number; write a list as 14,16") from None
