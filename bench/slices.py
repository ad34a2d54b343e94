"""Time layers of published shapes in turn, each beside the machine's limits and what `hybrid fit` predicts.

    python bench/slices.py --models glm-4.5-air,gpt-oss-20b --format int8 --output json

Writes a checkpoint of each slice (`SLICES` in synthetic_checkpoint.py), packs it and deletes the checkpoint; the stores
stay in --work-dir. The first model is the one that others are held against: every round measures it, then each of the
others, so all meet the same minutes. Figures are medians. A predicted speed is that of `hybrid fit` at the rates that
were measured beside the very repetition; `off` is how far it lies from what was measured.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from comparison import REST_SECONDS, Ours, parse_tests, timed, tokens
from synthetic_checkpoint import SLICES, make_slice, write_checkpoint

from hybrid.commands import bench
from hybrid.commands.console import exit_codes, run_app, say
from hybrid.commands.measure import Test
from hybrid.config import EngineConfig
from hybrid.engine.engine import Engine
from hybrid.machine.hardware import probe as probe_hardware
from hybrid.machine.rates import MachineProbe, Rates
from hybrid.plan.fit import fit_model
from hybrid.weights.pack import default_cache_dir
from hybrid.weights.store import is_store

REFERENCE = "qwen3-30b-a3b"
HEADER = "| model | format | test | tokens/s | share of limit | beside the first | predicted | off |"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass
class Entry:
    """A model and a test: seconds that were taken, the limit's and those predicted, one value a round."""

    model: str
    test: Test
    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        return _median_ratio(self.limits, self.seconds)

    def to_dict(self, formats: str, first: Entry) -> dict[str, Any]:
        count = tokens(self.test)
        return {
            "model": self.model,
            "format": formats,
            "test": self.test.name + (f"@{self.test.depth}" if self.test.depth else ""),
            "tokens_per_second": round(count / statistics.median(self.seconds), 2),
            "limit_share": round(self.share, 4),
            "beside_first": round(self.share / first.share, 4),
            "predicted_tokens_per_second": round(count / statistics.median(self.predicted), 2),
            "predicted_over_measured": round(_median_ratio(self.seconds, self.predicted), 4),
        }


@app.command()
def slices(
    models: Annotated[str, typer.Option(help=f"Out of {', '.join(SLICES)}.")] = ",".join(SLICES),
    format: Annotated[str, typer.Option(help="Of the weights; auto: as published.")] = "int8",
    kv_format: Annotated[str, typer.Option(help="Of keys and values.")] = "bf16",
    tests: Annotated[str, typer.Option(help="As pp512, tg32 or tg32@4096.")] = "pp512,tg32",
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1)] = 5,
    work_dir: Annotated[Path | None, typer.Option(help="For the stores; default: user cache.")] = None,
    real_time: Annotated[bool, typer.Option("--real-time", help="Before all other processes.")] = False,
    output: Annotated[str, typer.Option(help="md or json.")] = "md",
) -> None:
    """Time slices of published models in turn; print tokens per second, shares of the limit and predictions."""
    with exit_codes(), ExitStack() as opened:
        names = [REFERENCE, *(name for name in models.split(",") if name != REFERENCE)]
        chosen, folder = parse_tests(tests), work_dir or default_cache_dir() / "slices"
        length = max(test.length for test in chosen) + 1
        stores = {name: packed_slice(name, format, folder) for name in names}
        if real_time:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        engines = {}
        for name, path in stores.items():
            config = EngineConfig(model_path=path, kv_format=kv_format, max_seq_len=length, max_batch=1)
            engines[name] = opened.enter_context(Engine.open(config))
        probe = MachineProbe(engines[REFERENCE].pool, engines[REFERENCE].plan.isa, integers=True)
        entries = _measure(engines, chosen, probe, repetitions)
        report = {
            "machine": bench.describe_machine(engines[REFERENCE], probe),
            "results": [entry.to_dict(format, entries[REFERENCE, entry.test]) for entry in entries.values()],
        }
        print(bench.to_json(report) if output == "json" else _table(report))


def packed_slice(name: str, format: str, folder: Path) -> Path:
    """The store of a slice in `folder`, made unless it is there."""
    from hybrid.formats.mix import parse_mix
    from hybrid.weights.checkpoints.huggingface import Checkpoint
    from hybrid.weights.pack import pack

    store, source = folder / f"{name}-{format}", folder / f"{name}-checkpoint"
    if not is_store(store):
        say(f"note: writing a slice of {name} to {store}; delete it when you are done")
        write_checkpoint(source, make_slice(name), seed=0)
        checkpoint = Checkpoint.open(source)
        pack(checkpoint, store, parse_mix(format, checkpoint.native))
        shutil.rmtree(source)
    return store


def _measure(
    engines: dict[str, Engine], tests: list[Test], probe: MachineProbe, repetitions: int
) -> dict[tuple[str, Test], Entry]:
    contenders = {name: Ours(engine) for name, engine in engines.items()}
    for contender in contenders.values():
        contender.touch()
    entries = {(name, test): Entry(name, test) for test in tests for name in engines}
    for _ in range(repetitions):
        for (name, _), entry in entries.items():
            _repeat(engines[name], contenders[name], probe, entry)
    return entries


def _repeat(engine: Engine, contender: Ours, probe: MachineProbe, entry: Entry) -> None:
    """Time a test once, between two probes of the machine."""
    time.sleep(REST_SECONDS)
    contender.prepare(entry.test)
    probe.measure()
    entry.seconds.append(timed(contender, entry.test))
    probe.measure()
    entry.limits.append(contender.limit(probe, entry.test))
    entry.predicted.append(_predicted(engine, entry.test, Rates(*probe.rates)))


def _predicted(engine: Engine, test: Test, rates: Rates) -> float:
    """Seconds of a test by what `hybrid fit` says. Its prompts have as many tokens as those of a bench."""
    plan = engine.plan
    hardware = replace(probe_hardware(plan.isa), memory_available=1 << 50, memory_total=1 << 50, memory_limit=None)
    config = EngineConfig(kv_format=plan.kv.format, max_seq_len=plan.max_seq_len)
    depth = test.depth + (0 if test.prompt else test.generate // 2)
    found = fit_model(engine.spec, "", plan.formats, hardware, rates, config, depth)
    speed = found.prompt_speed if test.prompt else found.decode_speed
    assert speed is not None
    return tokens(test) / speed


def _median_ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; reads {machine['read_gbps']} GB/s, "
        f"multiplies {machine['peak_gflops']}",
        "",
        HEADER,
        "|---|---|---|" + "---:|" * 5,
    ]
    for row in report["results"]:
        lines.append(
            f"| {row['model']} | {row['format']} | {row['test']} | {row['tokens_per_second']:.1f} | "
            f"{row['limit_share']:.0%} | {row['beside_first']:.0%} | {row['predicted_tokens_per_second']:.1f} | "
            f"{row['predicted_over_measured'] - 1:+.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_app(app, "slices.py")
