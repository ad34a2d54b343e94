"""Time the GPU's part beside its limits: experts in slots, and copies of experts into them.

    python bench/device.py                        # three models, every format, 1 to 512 rows
    python bench/device.py --shapes qwen3-30b --formats bf16,int4 --rows 1,8,512 --tune
    python bench/device.py --device cpu --shapes tiny        # without a GPU: tries the program, measures nothing

The limits are measured first: reading the device's memory, bf16 products of torch, a plain copy from pinned memory. The
limit of a case is the slower of reading its active experts once and multiplying; of a copy, the plain one. Times are
medians of samples that read more than caches hold, run as CUDA graphs where they can be captured, so that launches from
Python do not count (`launched`). --tune tries other tilings, rows x blocks of 16 columns with warps and stages: some 30
for a case, and Triton compiles each once for a format, top_k and kind of step, for about a second.

Goals: 75 % of the limit for 1 to 8 rows, 60 % from 512 on, 90 % for copies. How far hits and misses overlap is another
question: `bench/placements.py --device cuda --timeline` draws it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import kernels as on_cpu
import typer
from kernel_cases import Shape

from hybrid.commands.bench import to_json
from hybrid.commands.console import exit_codes, progress_bar, run_app
from hybrid.errors import ConfigError
from hybrid.machine import gpu as usable
from hybrid.models.layers.base import Cost
from hybrid.plan.expert_cache import SLOT_FORMATS

if TYPE_CHECKING:
    from device_cases import Layer, Limits, Place, Sample

    from gpu_cache.kernels.experts import Tiling

SHAPES = {
    "mixtral": Shape(hidden=4096, experts=8, top_k=2, intermediate=14336),  # Mixtral 8x7B
    "qwen3-30b": Shape(hidden=2048, experts=128, top_k=8, intermediate=768),  # Qwen3-30B-A3B
    "phi": Shape(hidden=4096, experts=16, top_k=2, intermediate=6400),  # Phi-3.5-MoE
    "tiny": Shape(hidden=64, experts=4, top_k=2, intermediate=32),  # of no model
}
DEVICES = ("cuda", "cpu")
SHAPES_MEASURED = "mixtral,qwen3-30b,phi"
ALL_FORMATS = ",".join(SLOT_FORMATS)
ROWS = "1,2,4,8,32,128,512"
DECODE_GOAL, PROMPT_GOAL, COPY_GOAL = 0.75, 0.6, 0.9  # shares of the limit
DECODE_ROWS, PROMPT_ROWS = 8, 512  # at most, at least
OF_EXPERTS = ("shape", "format", "routing", "rows", "tiling", "launched")
OF_COPIES = ("op", "shape", "format", "microseconds", "gbps", "limit_share", "goal_share")

Progress = Callable[[str, int, int], None]
Shapes = Annotated[str, typer.Option(help=f"Out of {','.join(SHAPES)}.")]
Device = Annotated[str, typer.Option(help="cuda; or cpu, an interpreter that tries the program on --shapes tiny.")]
Tune = Annotated[bool, typer.Option(help="Try other tilings too.", show_default=False)]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Settings:
    """What is measured, where."""

    device: str
    shapes: list[str]
    formats: list[str]
    routings: list[str]
    rows: list[int]
    repetitions: int
    tune: bool

    @property
    def count(self) -> int:
        """Of cases."""
        return len(self.shapes) * len(self.formats) * len(self.routings) * len(self.rows)


@app.command()
def device(
    shapes: Shapes = SHAPES_MEASURED,
    formats: on_cpu.Formats = ALL_FORMATS,
    routing: on_cpu.Routings = "even",
    rows: on_cpu.Rows = ROWS,
    repetitions: on_cpu.Repetitions = 5,
    tune: Tune = False,
    device: Device = "cuda",
    output: on_cpu.Output = "md",
) -> None:
    """Time experts on a GPU and copies to it by model, format and rows; print speeds and share of the limit."""
    with exit_codes():
        chosen = on_cpu.chosen
        (form,), (place,) = chosen("--output", output, OUTPUTS), chosen("--device", device, DEVICES)
        settings = Settings(
            place, chosen("--shapes", shapes, SHAPES), chosen("--formats", formats, SLOT_FORMATS),
            chosen("--routing", routing, on_cpu.ROUTINGS), on_cpu.parse_rows(rows), repetitions, tune,
        )  # fmt: skip
        if repetitions < 1:
            raise ConfigError(f"--repetitions {repetitions} is out of range; it must be at least 1")
        check_device(settings)
        with progress_bar() as progress:
            report = run(settings, progress)
        print(OUTPUTS[form](report))


def check_device(settings: Settings) -> None:
    """Raise ConfigError if there is no such device, or it would take days."""
    if settings.device == "cuda":
        if problem := usable.why_unusable():
            raise ConfigError(f"--device cuda cannot be had: {problem}; --device cpu --shapes tiny tries the program")
        return
    if missing := [package for package in ("torch", "triton") if find_spec(package) is None]:
        raise ConfigError(f"{' and '.join(missing)} is not installed ({usable.INSTALL})")
    if large := [name for name in settings.shapes if name != "tiny"]:
        raise ConfigError(f"--shapes {','.join(large)} takes a GPU; --device cpu is an interpreter, for tiny alone")


def run(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Measure every case: {"machine": ..., "results": [rows], "tuning": [a case with its candidates]}."""
    if settings.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import device_cases as cases

    experts: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    tuning: list[dict[str, Any]] = []
    with cases.device_errors():
        place = cases.Place(settings.device)
        with place.queue():
            limits = cases.measure_limits(place)
            for shape, format in product(settings.shapes, settings.formats):
                layer = cases.Layer(place, SHAPES[shape], format)
                for key in keys(settings, shape, format):
                    progress("measuring", len(experts), settings.count)
                    measure = partial(measure_experts, key, layer, limits, settings.repetitions)
                    experts.append(measure("experts", cases.default_tiling(key["rows"])))
                    if settings.tune:
                        tuning.append(tune_case(key, experts[-1], partial(measure, "candidate")))
                copies += measure_copies(layer, shape, limits, settings.repetitions)
                del layer, measure  # before the next is made: both need not fit
    progress("measuring", settings.count, settings.count)
    return {"machine": machine(settings, place, limits), "results": experts + copies, "tuning": tuning}


def keys(settings: Settings, shape: str, format: str) -> list[dict[str, Any]]:
    """The cases of a layer."""
    named = {"shape": shape, "format": format}
    return [named | {"routing": routing, "rows": rows} for routing, rows in product(settings.routings, settings.rows)]


def measure_experts(
    key: dict[str, Any], layer: Layer, limits: Limits, repetitions: int, op: str, tiling: Tiling
) -> dict[str, Any]:
    from device_cases import time_experts

    sample = time_experts(layer, key["rows"], key["routing"], tiling, repetitions)
    return expert_row({"op": op, **key}, tiling, sample, limits)


def expert_row(key: dict[str, Any], tiling: Tiling, sample: Sample, limits: Limits) -> dict[str, Any]:
    """A row of the report. gbps: of active experts, each counted once; bound: what the limit is."""
    from device_cases import label

    cost, rows = sample.cost, key["rows"]
    arithmetic = cost.flops / limits.flops > cost.bytes / limits.read
    goal = DECODE_GOAL if rows <= DECODE_ROWS else PROMPT_GOAL if rows >= PROMPT_ROWS else None
    named = {"tiling": label(tiling), "launched": "graph" if sample.captured else "calls"}
    least = cost.seconds(limits.read, limits.flops)
    return {**key, **named, **_speeds(sample.seconds, cost, "arithmetic" if arithmetic else "memory", least, goal)}


def measure_copies(layer: Layer, shape: str, limits: Limits, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the report, of one expert each; what does not concern copies is empty."""
    from device_cases import time_copies

    size, rows = layer.layout.nbytes, []
    for op, seconds in time_copies(layer, repetitions).items():
        key = {"op": op} | dict.fromkeys(OF_EXPERTS, "") | {"shape": shape, "format": layer.layout.format, "rows": 0}
        rows.append(key | _speeds(seconds, Cost(size), "link", size / limits.copy, COPY_GOAL))
    return rows


def _speeds(seconds: float, cost: Cost, bound: str, least: float, goal: float | None) -> dict[str, Any]:
    """least: seconds that the limit allows."""
    return {
        "microseconds": round(seconds * 1e6, 2),
        "gbps": round(cost.bytes / seconds / 1e9, 2),
        "tflops": round(cost.flops / seconds / 1e12, 3),
        "bound": bound,
        "limit_share": round(least / seconds, 4),
        "goal_share": goal,
    }


def tune_case(key: dict[str, Any], default: dict[str, Any], measure: Callable[[Tiling], dict[str, Any]]) -> Any:
    """The fastest tiling beside the default one, whose row is `default`, and rows of all; why others do not run."""
    from device_cases import default_tiling, label, tilings
    from triton.errors import TritonError

    from gpu_cache.errors import first_line

    rows, refused = [], {}
    for tiling in tilings(key["rows"]):
        if tiling == default_tiling(key["rows"]):
            continue
        try:
            rows.append(measure(tiling))
        except (TritonError, RuntimeError) as error:  # more registers or shared memory than there are
            refused[label(tiling)] = first_line(error)
    best = min([default, *rows], key=lambda row: float(row["microseconds"]))
    return key | {
        "default": default["tiling"],
        "microseconds": default["microseconds"],
        "best": best["tiling"],
        "best_microseconds": best["microseconds"],
        "best_limit_share": best["limit_share"],
        "candidates": rows,
        "refused": refused,
    }


def machine(settings: Settings, place: Place, limits: Limits) -> dict[str, Any]:
    return {
        **place.describe(),
        "repetitions": settings.repetitions,
        "shapes": {name: _sizes(SHAPES[name]) for name in settings.shapes},
        "limits": {
            "read_gbps": round(limits.read / 1e9, 2),
            "bf16_tflops": round(limits.flops / 1e12, 4),
            "copy_gbps": round(limits.copy / 1e9, 2),
        },
        "notes": place.notes,
    }


def _sizes(shape: Shape) -> dict[str, int]:
    return {name: getattr(shape, name) for name in ("hidden", "intermediate", "experts", "top_k")}


def to_markdown(report: dict[str, Any]) -> str:
    """The machine, then a table of experts, of copies, and of the best tilings."""
    experts = [row for row in report["results"] if row["op"] == "experts"]
    copies = [row for row in report["results"] if row["op"] != "experts"]
    best = [{name: case[name] for name in case if name not in ("candidates", "refused")} for case in report["tuning"]]
    tables = [
        [{name: row[name] for name in row if name != "op"} for row in experts],
        [{name: row[name] for name in OF_COPIES} for row in copies],
        best,
    ]
    parts = [
        "\n".join(describe(report["machine"])),
        *(on_cpu.to_markdown({"results": rows}) for rows in tables if rows),
    ]
    return "\n\n".join(parts)


def describe(machine: dict[str, Any]) -> list[str]:
    limits = machine["limits"]
    name = machine["device"]
    if machine["gpu"]:
        name = f"{machine['gpu']}, {machine['gpu_memory'] / 1e9:.0f} GB, CUDA {machine['cuda']}"
    return [
        f"{name}; torch {machine['torch']}, triton {machine['triton']}; {machine['cpu']}; medians of "
        f"{machine['repetitions']}",
        "",
        f"- reads {limits['read_gbps']} GB/s, multiplies {limits['bf16_tflops']} TFLOP/s (bf16), copies "
        f"{limits['copy_gbps']} GB/s from pinned memory",
        *(f"- {note}" for note in machine["notes"]),
    ]


def to_csv(report: dict[str, Any]) -> str:
    """All rows, then those of candidates."""
    candidates = [row for case in report["tuning"] for row in case["candidates"]]
    return on_cpu.to_csv({"results": report["results"] + candidates})


OUTPUTS: dict[str, Callable[[dict[str, Any]], str]] = {"md": to_markdown, "csv": to_csv, "json": to_json}

if __name__ == "__main__":
    run_app(app, "bench/device.py")
