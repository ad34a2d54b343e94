"""`hybrid simulate`: what expert caches of many shapes and policies would have done with a recorded trace."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.commands import flags as f
from hybrid.commands.console import exit_codes, progress_bar, say
from hybrid.errors import ConfigError, cache_errors

if TYPE_CHECKING:
    from gpu_cache.costs import Machine
    from gpu_cache.simulator import Setting
    from gpu_cache.trace import Calls, Trace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _list(name: str, text: str, **more: Any) -> Any:
    return f.flag(name, text, metavar="LIST", **more)


TracePath = Annotated[Path, f.path("--trace", "CSV or parquet of `hybrid run --trace`, or expert_choices.csv.")]
Layers = Annotated[int | None, f.whole("--layers", "MoE layers of the model.", show_default="what the trace has")]
Experts = Annotated[int | None, f.whole("--experts", "Experts of a layer.", show_default="what the trace has")]
Blocks = Annotated[str | None, _list("--nblocks", "Indexes, as 14,16.", show_default="the number of layers")]
Ways = Annotated[str | None, _list("--nways", "Slots of each.", show_default="a quarter and half of the experts")]
Policies = Annotated[str, _list("--policy", "Policies, or all: LRU,LFU,Belady,...; a wrong one lists them.")]
Admissions = Annotated[str, _list("--admission", "always, second-touch, break-even.")]
Mappings = Annotated[str, _list("--mapping", "modulo, prefix, hash.")]
Quotas = Annotated[str, _list("--quota", "Copies in a step at most; none for no limit.")]
Delays = Annotated[str, _list("--copy-delay", "Lookups that a copy takes beyond the next one.")]
Seed = Annotated[int, f.whole("--seed", "Of policies that draw lots.")]
Pcie = Annotated[float | None, f.real("--pcie-gbps", "GB/s of copies to the device.")]
DeviceRate = Annotated[float | None, f.real("--device-gbps", "GB/s with which the device reads experts.")]
CpuRate = Annotated[float | None, f.real("--cpu-gbps", "GB/s with which the CPU reads experts.")]
ExpertSize = Annotated[float | None, f.real("--expert-mb", "MB of an expert.")]
OtherTime = Annotated[float, f.real("--other-ms", "Time of a step besides its experts.")]
LayerTime = Annotated[float, f.real("--layer-ms", "Time to begin and join a layer on the device.")]
Profile = Annotated[Path | None, f.path("--profile", "JSON of `hybrid bench`: its read bandwidth is that of the CPU.")]
Workers = Annotated[int | None, f.whole("--workers", "Processes.", show_default="one for each processor")]
Kept = Annotated[Path | None, f.path("--results", "Keep results here, and do not replay again what is there.")]
LibCacheSim = Annotated[Path | None, f.path("--libcachesim", "Write the calls as CSV for libCacheSim, replay nothing.")]
Convert = Annotated[Path | None, f.path("--convert", "Write the trace as CSV or parquet, replay nothing.")]
Output = Annotated[str, f.flag("--output", "table, csv or json.")]


@app.command()
def simulate(
    trace: TracePath,
    nblocks: Blocks = None,
    nways: Ways = None,
    policy: Policies = "LRU,LFU,Belady,bypass-Belady",
    admission: Admissions = "always",
    mapping: Mappings = "modulo",
    quota: Quotas = "none",
    copy_delay: Delays = "0",
    layers: Layers = None,
    experts: Experts = None,
    seed: Seed = 0,
    pcie_gbps: Pcie = None,
    device_gbps: DeviceRate = None,
    cpu_gbps: CpuRate = None,
    expert_mb: ExpertSize = None,
    other_ms: OtherTime = 0.0,
    layer_ms: LayerTime = 0.0,
    profile: Profile = None,
    workers: Workers = None,
    results: Kept = None,
    libcachesim: LibCacheSim = None,
    convert: Convert = None,
    output: Output = "table",
) -> None:
    """Replay a trace through every combination of the given shapes and policies; count hits, copies and evictions.

    Belady and bypass-Belady know the future, static-best and static-layers never copy. With the rates of a machine,
    hits become predicted tokens a second.
    """
    with exit_codes("what was replayed is in the file of --results, if there is one"), cache_errors():
        if output not in FORMATS:
            raise ConfigError(f"--output {output!r} is unknown; allowed: {', '.join(FORMATS)}")
        rates = {"pcie_gbps": pcie_gbps, "device_gbps": device_gbps, "cpu_gbps": cpu_gbps, "expert_mb": expert_mb}
        machine = make_machine(rates, other_ms, layer_ms, profile)
        _check_files({"--results": results, "--libcachesim": libcachesim, "--convert": convert})
        recorded = load_trace(trace, layers, experts)
        if _convert(recorded, libcachesim, convert):
            return
        from gpu_cache.trace import calls

        grouped = calls(recorded)
        settings = make_settings(grouped, nblocks, nways, policy, admission, mapping, quota, copy_delay, seed)
        warn_of_few_ways(grouped, settings)
        print(FORMATS[output](run(grouped, settings, machine, worker_count(workers), results)))


def load_trace(path: Path, layers: int | None, experts: int | None) -> Trace:
    """A trace, or the seed's list of expert choices, which its first line tells apart."""
    from gpu_cache.converters import from_expert_choices, is_expert_choices
    from gpu_cache.trace import read_trace

    if is_expert_choices(path):
        return from_expert_choices(path, layers, experts)
    return read_trace(path, layers, experts)


def _convert(trace: Trace, libcachesim: Path | None, convert: Path | None) -> bool:
    from gpu_cache.converters import to_libcachesim
    from gpu_cache.trace import calls
    from gpu_cache.trace_writer import write_trace

    if libcachesim is not None:
        to_libcachesim(calls(trace), libcachesim)
    if convert is not None:
        write_trace(convert, trace)
    return libcachesim is not None or convert is not None


def make_settings(
    calls: Calls,
    nblocks: str | None,
    nways: str | None,
    policy: str,
    admission: str,
    mapping: str,
    quota: str,
    copy_delay: str,
    seed: int,
) -> list[Setting]:
    """Every combination, each once. Raises ConfigError for a list that is none."""
    from gpu_cache.policies import known_policy
    from gpu_cache.simulator import SCHEDULES, Setting, policy_names

    ways = sorted({max(1, calls.experts // 4), max(1, calls.experts // 2)})
    words = policy_names() if policy.lower() == "all" else _words("--policy", policy)
    policies = [known_policy(word, policy_names()) for word in words]
    grid = product(
        [calls.layers] if nblocks is None else _counts("--nblocks", nblocks),
        ways if nways is None else _counts("--nways", nways),
        _words("--mapping", mapping),
        [None if word == "none" else _count("--quota", word) for word in _words("--quota", quota)],
        policies,
        _words("--admission", admission),
        _counts("--copy-delay", copy_delay),
    )
    settings = [
        Setting(n, m, p, "always" if p in SCHEDULES else a.lower(), g.lower(), q, d, seed)
        for n, m, g, q, p, a, d in grid
    ]
    return list(dict.fromkeys(settings))


def warn_of_few_ways(calls: Calls, settings: list[Setting]) -> None:
    few = sorted({setting.nways for setting in settings if setting.nways < calls.largest})
    if few:
        say(
            f"warning: a layer asks for up to {calls.largest} experts in a step, which an index of "
            f"{', '.join(map(str, few))} ways cannot hold together: what it lacks goes to the CPU"
        )


def make_machine(
    rates: dict[str, float | None], other_ms: float, layer_ms: float, profile: Path | None
) -> Machine | None:
    """The machine of the cost model, None if no rate is given. Raises ConfigError when some are missing."""
    from gpu_cache.costs import Machine

    if profile is not None and rates["cpu_gbps"] is None:
        rates = {**rates, "cpu_gbps": _read_bandwidth(profile)}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    if not given:
        return None
    missing = [f"--{name.replace('_', '-')}" for name in rates if name not in given]
    if missing:
        raise ConfigError(f"predicting speed also needs {', '.join(missing)}; give all four rates or none")
    expert_bytes = given.pop("expert_mb") * 1e6
    return Machine(**given, expert_bytes=expert_bytes, other_ms=other_ms, layer_ms=layer_ms)


def _read_bandwidth(profile: Path) -> float:
    try:
        return float(json.loads(profile.read_bytes())["machine"]["read_gbps"])
    except OSError as error:
        raise ConfigError(f"--profile {profile} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--profile {profile} has no read bandwidth; make it with `hybrid bench --output json > FILE`"
        ) from None


def worker_count(workers: int | None) -> int:
    """Processes to use. Raises ConfigError below 1."""
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} is out of range; it must be at least 1")
    return workers or len(os.sched_getaffinity(0))


def run(
    calls: Calls, settings: list[Setting], machine: Machine | None, workers: int, kept: Path | None
) -> dict[str, Any]:
    """Replay and describe: {"provenance": ..., "cost_model": ..., "results": [...]}."""
    from gpu_cache.sweep import provenance, sweep
    from hybrid import __version__

    with progress_bar() as progress:
        rows = sweep(calls, settings, machine, workers, kept, lambda done, total: progress("replays", done, total))
    model = None if machine is None else asdict(machine)
    return {"provenance": provenance(calls, __version__), "cost_model": model, "results": rows}


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def to_csv(report: dict[str, Any]) -> str:
    """One line a replay; what JSON has by layer or part is left out."""
    rows = report["results"]
    columns = [name for name, value in rows[0].items() if not isinstance(value, list | dict)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


PARAMETERS = ("nblocks", "nways", "mapping", "quota", "delay", "policy", "admission")
COUNTED = {
    "hits": lambda row: f"{row['hit_rate']:.1%}",
    "of the bound": lambda row: _share_of_bound(row),
    "copies a step": lambda row: f"{row['fills'] / row['steps']:.2f}",
    "loading": lambda row: f"{row['loading'] / row['calls']:.1%}",
}


def to_table(report: dict[str, Any]) -> str:
    """A markdown table; parameters that are the same everywhere stand above it."""
    rows, trace = report["results"], report["provenance"]["trace"]
    varied = [name for name in PARAMETERS if name == "policy" or len({str(row[name]) for row in rows}) > 1]
    fixed = ", ".join(f"{name} {_text(rows[0][name])}" for name in PARAMETERS if name not in varied)
    bounds = {_place(row): row["upper_bound"] for row in rows if row["policy"] == "bypass-Belady"}
    rows = [{**row, "steps": trace["steps"], "bound": bounds.get(_place(row))} for row in rows]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        **{name: lambda row, name=name: _text(row[name]) for name in varied},  # type: ignore[misc]
        **COUNTED,
    }
    if "tokens_per_second" in rows[0]:
        columns["tokens/s"] = lambda row: f"{row['tokens_per_second']:.2f}"
    lines = [
        f"{trace['calls']} calls of {trace['layers']} layers x {trace['experts']} experts in {trace['steps']} steps"
        + (f"; {fixed}" if fixed else ""),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "".join("---|" if name in ("policy", "admission", "mapping") else "---:|" for name in columns),
    ]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    if "cpu_tokens_per_second" in rows[0]:
        lines += ["", f"with every expert on the CPU: {rows[0]['cpu_tokens_per_second']:.2f} tokens/s"]
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a bound depends on; delays do not lower it."""
    return row["nblocks"], row["nways"], row["mapping"], row["quota"]


def _share_of_bound(row: dict[str, Any]) -> str:
    return f"{row['hits'] / row['bound']:.1%}" if row["bound"] else "-"


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {"table": to_table, "csv": to_csv, "json": to_json}


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


def _check_files(files: dict[str, Path | None]) -> None:
    for flag, path in files.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no directory {path.parent}; make it first")
        if path is not None and path.is_dir():
            raise ConfigError(f"{flag} {path} is a directory; name a file")
