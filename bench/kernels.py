"""Time single kernels beside the limits of this machine: one MoE layer, one GEMM, attention; and a barrier.

    python bench/kernels.py                  # every format and vector instruction set: about ten minutes
    python bench/kernels.py --ops moe --formats bf16 --rows 1,8,512 --isa avx512_bf16
    python bench/kernels.py --ops moe --rows 1,2,4 --reading far,near,ordered   # ways to read weights, by turns
    python bench/kernels.py --count-tiles    # what AMX would issue, on paper: nothing is run

The limit of a case is the slower of reading its bytes (packed weights, keys and values, each once) and multiplying, at
the rates that were measured just before and after it with the same threads and instructions. Times are those of the
ops alone, medians; a step repeats its op until more memory is read than caches hold (kernel_cases.py).
"""

from __future__ import annotations

import csv
import io
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, NamedTuple

import typer
from kernel_cases import Attention, Case, Gemm, Memory, Moe, Shape, Weights, expert_weights, gemm_weights
from tile_counts import tile_report

import cpu_kernels
from hybrid.commands import flags as f
from hybrid.commands.bench import parse_counts, to_json
from hybrid.commands.console import exit_codes, progress_bar, run_app
from hybrid.config import KV_FORMATS, EngineConfig, check_config
from hybrid.errors import ConfigError
from hybrid.formats import FORMATS
from hybrid.machine.hardware import HardwareSpec, choose_isa, probe
from hybrid.models.layers.base import Cost

PROBE_BYTES = 1 << 30
PROBE_ROUNDS = 4_000_000
BARRIERS = 20_000
OPS = ("moe", "gemm", "attention")
ROUTINGS = ("even", "random")
ALL_OPS, ALL_ROUTINGS = ",".join(OPS), ",".join(ROUTINGS)
ALL_FORMATS, ALL_KV_FORMATS = ",".join(FORMATS), ",".join(KV_FORMATS)
ROWS = "1,2,4,8,16,32,128,512"
DECODE_ROWS = 32  # sequences that decode together at most; more rows are measured as prompts
HEADS = {"gbps": "GB/s", "gops": "G(FL)OP/s", "limit_share": "share of limit", "issue_share": "share of issue limit"}
WORDS = ("op", "shape", "routing", "format", "isa", "reading")  # columns of text
READINGS = {way.name: way for way in cpu_kernels.Reading}

Progress = Callable[[str, int, int], None]
_COUNT: dict[str, Any] = {"parser": f.parse_whole, "metavar": "INTEGER"}
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads that compute; default: those of the machine.", **_COUNT)
]
Ops = Annotated[str, typer.Option(help=f"Out of {ALL_OPS}.")]
Formats = Annotated[str, typer.Option(help="Of the weights.")]
KvFormats = Annotated[str, typer.Option("--kv-format", help="Of keys and values.")]
Routings = Annotated[str, typer.Option("--routing", help=f"How rows choose experts, out of {ALL_ROUTINGS}.")]
Isas = Annotated[str | None, typer.Option(help="Instruction sets; default: those of this machine but portable.")]
Readings = Annotated[
    str | None, typer.Option("--reading", help=f"How few rows read weights, out of {','.join(READINGS)}, by turns.")
]
Rows = Annotated[str, typer.Option(help="Numbers of rows.")]
Repetitions = Annotated[int, typer.Option("--repetitions", "-r", help="How often to repeat every case.", **_COUNT)]
Size = Annotated[int, typer.Option(**_COUNT)]
Depth = Annotated[int, typer.Option(help="Tokens before those that attend.", **_COUNT)]
Columns = Annotated[int, typer.Option(help="Outputs of the GEMM.", **_COUNT)]
CountTiles = Annotated[bool, typer.Option(help="Count what AMX issues, and run nothing.", show_default=False)]
Output = Annotated[str, typer.Option(help="md, csv or json.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Settings:
    """What is measured, on what shape."""

    ops: list[str]
    formats: list[str]
    kv_formats: list[str]
    routings: list[str]
    isas: list[str]
    readings: list[str]  # empty: as suits the processor
    rows: list[int]
    repetitions: int
    shape: Shape


@app.command()
def kernels(
    ops: Ops = ALL_OPS,
    formats: Formats = ALL_FORMATS,
    kv_format: KvFormats = ALL_KV_FORMATS,
    routing: Routings = ALL_ROUTINGS,
    isa: Isas = None,
    reading: Readings = None,
    rows: Rows = ROWS,
    repetitions: Repetitions = 5,
    threads: Threads = None,
    hidden: Size = Shape.hidden,
    experts: Size = Shape.experts,
    top_k: Size = Shape.top_k,
    intermediate: Size = Shape.intermediate,
    columns: Columns = Shape.columns,
    heads: Size = Shape.heads,
    kv_heads: Size = Shape.kv_heads,
    head_dim: Size = Shape.head_dim,
    depth: Depth = Shape.depth,
    count_tiles: CountTiles = False,
    output: Output = "md",
) -> None:
    """Time MoE layers, GEMMs and attention by format, instruction set and rows; print speeds and share of the limit."""
    with exit_codes():
        (form,) = chosen("--output", output, OUTPUTS)
        shape = Shape(hidden, experts, top_k, intermediate, columns, heads, kv_heads, head_dim, depth)
        check_shape(shape)
        counts, names = parse_rows(rows), chosen("--formats", formats, FORMATS)
        if count_tiles:
            print(OUTPUTS[form](tile_report(shape, names, counts)))
            return
        check_config(EngineConfig(threads=threads))
        if repetitions < 1:
            raise ConfigError(f"--repetitions {repetitions} is out of range; it must be at least 1")
        settings = Settings(
            chosen("--ops", ops, OPS), names, chosen("--kv-format", kv_format, KV_FORMATS),
            chosen("--routing", routing, ROUTINGS), choose_isas(isa),
            chosen("--reading", reading, READINGS) if reading else [], counts, repetitions, shape,
        )  # fmt: skip
        with progress_bar() as progress:
            report = run(settings, probe(settings.isas[0]), threads, progress)
        print(OUTPUTS[form](report))


def parse_rows(text: str) -> list[int]:
    """'1,8' to [1, 8]. Raises ConfigError."""
    rows = parse_counts(text, "--rows")
    if 0 in rows:
        raise ConfigError("--rows 0 is out of range; it must be at least 1")
    return rows


def choose_isas(text: str | None) -> list[str]:
    """Those asked for, or all that are meant to be fast. Raises KernelError for one that does not run here."""
    usable = tuple(cpu_kernels.available_isas())
    if text:
        return [choose_isa(name.strip(), usable) for name in text.split(",")]
    return [name for name in usable if name != "portable"] or list(usable)


def check_shape(shape: Shape) -> None:
    """Raise ConfigError naming the first size that no layer has."""
    for name, value in vars(shape).items():
        if value < (name != "depth"):
            raise ConfigError(f"--{name.replace('_', '-')} {value} is out of range; it must be at least 1")
    if shape.top_k > shape.experts:
        raise ConfigError(f"--top-k {shape.top_k} is more than the --experts {shape.experts}; lower it")
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"--heads {shape.heads} is not a multiple of --kv-heads {shape.kv_heads}; change one")


def chosen(flag: str, text: str, allowed: Iterable[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{flag} {name!r} is unknown; allowed: {', '.join(allowed)}")
    return names


class Probe:
    """What the machine reads and multiplies, in samples for each instruction set."""

    def __init__(self, pool: cpu_kernels.ThreadPool) -> None:
        self.pool = pool
        self._memory = Memory()
        self._data = self._memory.bytes(PROBE_BYTES)
        self._data[...] = 0  # of its own pages, not the one page of zeros
        self.samples: dict[tuple[str, str], list[float]] = defaultdict(list)  # (isa, what): per second

    def measure(self, isa: str, integer: bool) -> None:
        """Add one sample of reading, and of what a case multiplies."""
        read = cpu_kernels.read_bandwidth(self.pool, isa, self._data.ctypes.data, PROBE_BYTES)
        peak = cpu_kernels.peak_int_ops if integer else cpu_kernels.peak_flops
        self.samples[isa, "read"].append(read)
        self.samples[isa, "int8" if integer else "bf16"].append(peak(self.pool, isa, PROBE_ROUNDS))

    def seconds(self, isa: str, cost: Cost) -> float:
        """The shortest time of a step, by the last two samples."""
        read, peak = (
            statistics.mean(self.samples[isa, what][-2:]) for what in ("read", "int8" if cost.int_ops else "bf16")
        )
        return cost.seconds(read, peak, peak)


class Key(NamedTuple):
    """What a case is. routing: of a MoE layer, else empty; format: of the weights, or of keys and values."""

    op: str
    routing: str
    format: str
    isa: str
    rows: int


def keys(settings: Settings) -> list[Key]:
    """Every case, those that share weights side by side."""
    isas, rows, found = settings.isas, settings.rows, []
    if "moe" in settings.ops:
        found += [Key("moe", *key) for key in _ordered(settings.routings, settings.formats, isas, rows)]
    if "gemm" in settings.ops:
        found += [Key("gemm", *key) for key in _ordered([""], settings.formats, isas, rows)]
    if "attention" in settings.ops:
        few, more = [n for n in rows if n <= DECODE_ROWS], [n for n in rows if n > 1]
        found += [Key("decode", *key) for key in _ordered([""], settings.kv_formats, isas, few)]
        found += [Key("prefill", *key) for key in _ordered([""], settings.kv_formats, isas, more)]
    return found


def _ordered(routings: list[str], formats: list[str], isas: list[str], rows: list[int]) -> list[tuple[Any, ...]]:
    return [(routing, format, isa, n) for format, isa, routing, n in product(formats, isas, routings, rows)]


class Maker:
    """Makes cases; the weights of the last one are kept for the next."""

    def __init__(self, shape: Shape, pool: cpu_kernels.ThreadPool) -> None:
        self._shape, self._pool = shape, pool
        self._of: tuple[str, str] | None = None
        self._weights: Weights | None = None

    def case(self, key: Key) -> Case:
        place = (self._pool, key.isa, self._shape)
        if key.op == "moe":
            return Moe(*place, self._load(key), key.rows, key.routing)
        if key.op == "gemm":
            return Gemm(*place, self._load(key), key.rows)
        return Attention(*place, key.format, key.rows, key.op == "decode")

    def _load(self, key: Key) -> Weights:
        if self._weights is None or self._of != (key.op, key.format):
            self._weights = None  # before the next are made: both need not fit
            make = expert_weights if key.op == "moe" else gemm_weights
            self._of, self._weights = (key.op, key.format), make(self._shape, key.format)
        return self._weights


def run(settings: Settings, hardware: HardwareSpec, threads: int | None, progress: Progress) -> dict[str, Any]:
    """Measure every case, and describe: {"machine": ..., "results": [...]}."""
    count = threads or hardware.default_threads
    cpus = [hardware.cpus] if count <= len(hardware.cpus) else []
    pool = cpu_kernels.ThreadPool(count, cpus)
    limits, maker, wanted = Probe(pool), Maker(settings.shape, pool), keys(settings)
    results = []
    for done, key in enumerate(wanted):
        progress("measuring", done, len(wanted))
        results += measure(key, maker.case(key), limits, settings.repetitions, settings.readings)
    progress("measuring", len(wanted), len(wanted))
    return {"machine": _machine(settings, hardware, limits), "results": results}


def measure(key: Key, case: Case, limits: Probe, repetitions: int, readings: list[str]) -> list[dict[str, Any]]:
    """A row of the report, or one for each way of reading, which take turns."""
    ways: list[dict[str, str]] = [{"reading": name} for name in readings] or [{}]
    seconds: list[list[float]] = [[] for _ in ways]
    shares: list[list[float]] = [[] for _ in ways]
    case.run()
    before = cpu_kernels.reading()
    for _, (index, way) in product(range(repetitions), enumerate(ways)):
        limits.measure(key.isa, bool(case.cost.int_ops))
        cpu_kernels.reading(READINGS[way["reading"]] if way else before)
        seconds[index].append(case.run())
        limits.measure(key.isa, bool(case.cost.int_ops))
        shares[index].append(limits.seconds(key.isa, case.cost) / seconds[index][-1])
    cpu_kernels.reading(before)
    return [key._asdict() | way | _row(case, *times) for way, *times in zip(ways, seconds, shares, strict=True)]


def _row(case: Case, seconds: list[float], shares: list[float]) -> dict[str, Any]:
    """Medians of steps, each of which was between two probes."""
    one, cost = statistics.median(seconds), case.cost
    return {
        "microseconds": round(one / case.calls * 1e6, 2),
        "gbps": round(cost.bytes / one / 1e9, 2),
        "gops": round((cost.flops + cost.int_ops) / one / 1e9, 2),
        "limit_share": round(statistics.median(shares), 4),
    }


def _machine(settings: Settings, hardware: HardwareSpec, limits: Probe) -> dict[str, Any]:
    barriers = [cpu_kernels.phase_seconds(limits.pool, BARRIERS) for _ in range(settings.repetitions)]
    rates: dict[str, dict[str, float]] = {}
    for (isa, what), samples in limits.samples.items():
        rates.setdefault(isa, {})[what] = round(statistics.median(samples) / 1e9, 1)
    return {
        "cpu": hardware.cpu_model,
        "cores": len(hardware.cpus),
        "system": platform.platform(),
        "threads": limits.pool.size,
        "barrier_ns": round(statistics.median(barriers) * 1e9, 1),
        "huge_pages": hardware.huge_pages,
        "repetitions": settings.repetitions,
        "shape": vars(settings.shape),
        "limits": rates,
    }


def to_markdown(report: dict[str, Any]) -> str:
    lines = [*describe(report["machine"]), ""] if "machine" in report else []
    names = list(report["results"][0])
    lines += ["| " + " | ".join(HEADS.get(name, name.replace("_", " ")) for name in names) + " |"]
    lines += ["|" + "|".join("---" if name in WORDS else "---:" for name in names) + "|"]
    for row in report["results"]:
        lines.append("| " + " | ".join(_cell(name, row[name]) for name in names) + " |")
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if name.endswith("share"):
        return "-" if value is None else f"{value:.1%}"
    return str(value)


def describe(machine: dict[str, Any]) -> list[str]:
    """The machine and its limits, a line for each instruction set."""
    shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine["shape"].items())
    units = {"read": "reads {} GB/s", "bf16": "multiplies {} GFLOP/s (bf16)", "int8": "multiplies {} GOP/s (int8)"}
    limits = [
        f"- {isa}: " + ", ".join(unit.format(rates[what]) for what, unit in units.items() if what in rates)
        for isa, rates in machine["limits"].items()
    ]
    return [
        f"{machine['cpu']}, {machine['threads']} threads; a barrier takes {machine['barrier_ns']} ns; huge pages: "
        f" {machine['huge_pages']}; medians of {machine['repetitions']}",
        f"{shape}",
        "",
        *limits,
    ]


def to_csv(report: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(report["results"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["results"])
    return text.getvalue().rstrip("\n")


OUTPUTS: dict[str, Callable[[dict[str, Any]], str]] = {"md": to_markdown, "csv": to_csv, "json": to_json}

if __name__ == "__main__":
    run_app(app, "bench/kernels.py")
