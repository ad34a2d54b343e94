"""`hybrid bench`: the speed of prompts and of decoding beside the limits of this machine."""

from __future__ import annotations

import json
import platform
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from hybrid.commands.console import progress_bar, say, show, show_json
from hybrid.commands.flags import command, new_app, only
from hybrid.commands.tables import heading, line
from hybrid.config import CHUNK_SIZE, EngineConfig
from hybrid.errors import ConfigError
from hybrid.settings import check_settings, setting

if TYPE_CHECKING:
    from hybrid.commands.measure import Measurement, Test
    from hybrid.engine.engine import Engine
    from hybrid.machine.rates import MachineProbe

app = new_app()

OUTPUTS = ("md", "csv", "json")


@dataclass(frozen=True)
class BenchOptions:
    """What is timed, and how it is printed."""

    COMMAND: ClassVar[str] = "bench"
    GROUP: ClassVar[str] = "prompts"

    prompt: str = setting("512", "Prompt lengths to time, as 512 or 128,512; 0 for none.", short="-p")
    generate: str = setting("32", "Numbers of tokens to decode; 0 for none.", short="-n")
    depth: str = setting("0", "Tokens already in the KV before each test.", short="-d")
    batch: str = setting("1", "Sequences that run together.")
    repetitions: int = setting(3, "How often to repeat every test.", short="-r", minimum=1)
    output: str = setting("md", "md, csv or json.", group="output", choices=OUTPUTS)


@command(app)
def bench(
    config: Annotated[
        EngineConfig,
        only(
            "model_path", "weight_format", "kv_format", "device", "threads", "numa", "load", "chunk_size", "cache_dir",
        ),
    ],
    options: BenchOptions,
) -> None:  # fmt: skip
    """Time prompts and decoding with random tokens; print tokens per second and the share of the machine's limit.

    The limit of a test is the slower of reading its bytes and multiplying, at the rates measured beside it: of the
    processors and their memory, whatever the device.
    """
    check_settings(options)
    counts = (parse_counts(getattr(options, name), f"--{name}") for name in ("prompt", "generate", "depth", "batch"))
    tests = make_tests(*counts)
    largest_batch = max(test.batch for test in tests)
    config = replace(
        config,
        max_seq_len=max(test.length for test in tests) + 1,
        max_batch=largest_batch,
        chunk_size=_chunk_size(config, largest_batch),
    )
    check_lengths(config, tests)
    run(config, tests, options.repetitions, WRITERS[options.output])


def _chunk_size(config: EngineConfig, batch: int) -> int | str:
    """That of the flag; the default is raised to the largest batch, one that was asked for is not."""
    size = config.chunk_size
    if isinstance(size, str) or size >= batch:
        return size
    if size == CHUNK_SIZE:
        return batch
    raise ConfigError(f"--chunk-size {size} is smaller than --batch {batch}: a step holds a row of every sequence")


def parse_counts(text: str, flag: str = "") -> list[int]:
    """'128,512' to [128, 512]. flag: that gave it. Raises ConfigError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise ConfigError(
            f"{flag} {text!r:.80} is not a list of counts; write numbers with commas between them, as 128,512".lstrip()
        )
    return [int(part) for part in parts]


def make_tests(prompts: list[int], generates: list[int], depths: list[int], batches: list[int]) -> list[Test]:
    """Every prompt and every decoding length at every depth and batch."""
    from hybrid.commands.measure import Test

    if 0 in batches:
        raise ConfigError("--batch 0 is out of range; it must be at least 1")
    kinds = [(p, 0) for p in prompts if p] + [(0, n) for n in generates if n]
    if not kinds:
        raise ConfigError("nothing to measure: --prompt and --generate are both 0")
    return [Test(p, n, d, b) for d, b, (p, n) in product(depths, batches, kinds)]


def check_lengths(config: EngineConfig, tests: list[Test]) -> None:
    """Raise ConfigError naming the first test that is longer than the model's context."""
    from hybrid.models import model_spec
    from hybrid.plan.resolve import EMBEDDED_MODEL
    from hybrid.weights.hub import with_local_model
    from hybrid.weights.pack import model_config

    path = with_local_model(config, only_config=True).model_path or EMBEDDED_MODEL
    limit = model_spec(model_config(path)).max_position
    for test in tests:
        if test.length >= limit:
            raise ConfigError(
                f"test {test.name} at depth {test.depth} takes {test.length + 1} tokens of context, "
                f"the model has {limit}: lower --depth, --prompt or --generate"
            )


def run(config: EngineConfig, tests: list[Test], repetitions: int, writer: type[Writer]) -> None:
    """Open the engine, measure, and hand every result on as soon as it is there."""
    from hybrid.commands.measure import probe_of, run_tests, touch_weights
    from hybrid.engine.engine import Engine

    with progress_bar() as progress:
        engine = Engine.open(config, progress, say)
    with engine:
        if engine.plan.chunk_note:
            say(f"chunk: {engine.plan.chunk_note}")
        probe = probe_of(engine)
        touch_weights(engine)
        probe.measure()
        written = writer(describe_machine(engine, probe), describe_model(config, engine), tests)
        for measurement in run_tests(engine, probe, tests, repetitions, progress_bar):
            written.add(_result(measurement))
        written.finish(describe_machine(engine, probe))


def describe_model(config: EngineConfig, engine: Engine) -> dict[str, Any]:
    return {
        "path": str(config.model_path) if config.model_path else "embedded",
        "type": engine.spec.model_type,
        "weights_gb": round(engine.store.nbytes / 1e9, 2),
        "format": str(engine.plan.formats),
    }


def describe_machine(engine: Engine, probe: MachineProbe) -> dict[str, Any]:
    from hybrid.machine.hardware import probe as probe_hardware

    hardware, plan = probe_hardware(engine.plan.isa), engine.plan
    return {
        "cpu": hardware.cpu_model,
        "cores": len(hardware.cpus),
        "memory_gb": round(hardware.memory_total / 1e9, 1),
        "system": platform.platform(),
        "isa": plan.isa,
        "threads": plan.threads,
        "device": plan.device_name,
        "model": engine.spec.model_type,
        "weights_gb": round(engine.store.nbytes / 1e9, 2),
        "format": str(plan.formats),
        "kv_format": plan.kv.format,
        "chunk_size": plan.max_rows,
        "read_gbps": round(statistics.median(probe.read) / 1e9, 2),
        "peak_gflops": {kind: round(statistics.median(peak) / 1e9, 1) for kind, peak in probe.peaks.items()},
    }


def _result(measurement: Measurement) -> dict[str, Any]:
    return {
        "test": measurement.test.name,
        "depth": measurement.test.depth,
        "batch": measurement.test.batch,
        "tokens_per_second": round(measurement.median, 2),
        "samples": [round(speed, 2) for speed in measurement.tokens_per_second],
        "stddev": round(measurement.stddev, 2),
        "limit_share": round(measurement.limit_share, 4),
    }


class Writer(ABC):
    """Shows results in a form. machine: as measured at the start."""

    @abstractmethod
    def __init__(self, machine: dict[str, Any], model: dict[str, Any], tests: Sequence[Test]) -> None: ...

    @abstractmethod
    def add(self, result: dict[str, Any]) -> None: ...

    def finish(self, machine: dict[str, Any]) -> None:  # noqa: B027
        """machine: with the rates of the whole time."""


class Markdown(Writer):
    """A table whose rows are printed as they come, so that its widths are chosen before."""

    COLUMNS = ("test", "depth", "batch", "tokens/s", "share of limit")
    WORDS = (True, False, False, False, False)

    def __init__(self, machine: dict[str, Any], model: dict[str, Any], tests: Sequence[Test]) -> None:
        units = {"bf16": "GFLOP/s", "int8": "GOP/s"}
        peaks = ", ".join(f"{peak} {units[kind]} ({kind})" for kind, peak in machine["peak_gflops"].items())
        names, depths, batches = ([str(part) for part in column] for column in zip(*map(_place, tests), strict=True))
        longest = (max(map(len, names)), max(map(len, depths)), max(map(len, batches)), len("99999.99 ± 999.99"), 0)
        self._widths = [max(part, len(column)) for part, column in zip(longest, self.COLUMNS, strict=True)]
        show(
            f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, device {machine['device']}; "
            f"{model['type']}, {model['weights_gb']} GB ({model['format']}), keys and values {machine['kv_format']}, "
            f"chunks of {machine['chunk_size']}; reads {machine['read_gbps']} GB/s, multiplies {peaks}\n"
        )
        show("\n".join(heading(self.COLUMNS, self._widths, self.WORDS)))

    def add(self, result: dict[str, Any]) -> None:
        speed = f"{result['tokens_per_second']:.2f} ± {result['stddev']:.2f}"
        cells = [str(result[name]) for name in ("test", "depth", "batch")] + [speed, f"{result['limit_share']:.1%}"]
        show(line(cells, self._widths, self.WORDS))


class Csv(Writer):
    COLUMNS = ("test", "depth", "batch", "tokens_per_second", "stddev", "limit_share")

    def __init__(self, machine: dict[str, Any], model: dict[str, Any], tests: Sequence[Test]) -> None:
        show(",".join(self.COLUMNS))

    def add(self, result: dict[str, Any]) -> None:
        show(",".join(str(result[name]) for name in self.COLUMNS))


class Json(Writer):
    """One object, once all is there."""

    def __init__(self, machine: dict[str, Any], model: dict[str, Any], tests: Sequence[Test]) -> None:
        self._model = model
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._results: list[dict[str, Any]] = []

    def add(self, result: dict[str, Any]) -> None:
        self._results.append(result)

    def finish(self, machine: dict[str, Any]) -> None:
        from hybrid import __version__

        about = {"version": __version__, "date": self._date, "model": self._model}
        show_json({**about, "machine": machine, "results": self._results}, indent=2)


def _place(test: Test) -> tuple[str, int, int]:
    return test.name, test.depth, test.batch


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


WRITERS: dict[str, type[Writer]] = dict(zip(OUTPUTS, (Markdown, Csv, Json), strict=True))
