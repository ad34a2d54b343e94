"""Decode behind up to a million tokens: the time of a token by the length of its context, beside what reading it costs.

    python bench/long_context.py --longest 1000000 --json long_context.json --figure long_context.svg

The model has the attention of a published one (`--like`) in two layers, random weights and few experts, because keys
and values are what is measured. Reading a prompt costs the square of its length: `--read` tokens are read as a prompt,
and their keys and values copied behind each other up to the longest context. A decoded token reads all of them. Rounds
measure every length in turn; figures are medians. The line is fitted to the lengths by least squares.
Logits that are not finite end the program.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from synthetic_checkpoint import SLICE_VOCABULARY, make_config, write_checkpoint

from cpu_kernels import KEY_BLOCK
from hybrid.commands.bench import describe_machine
from hybrid.commands.console import exit_codes, run_app, say
from hybrid.commands.measure import decode_steps, probe_of, run_sequence
from hybrid.config import EngineConfig
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError, KernelError
from hybrid.files import write_json
from hybrid.lab.figures import BLACK, COLOURS, GREY, new_figure, styled
from hybrid.machine.rates import MachineProbe
from hybrid.plan.roofline import step_cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS, EXPERTS = 2, 16
SHORTEST = 1 << 10
MIB = 1 << 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass
class Length:
    """A context: seconds of a token behind so many, and those of reading all that it needs, one value a round."""

    tokens: int
    seconds: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, float]:
        share = statistics.median(b / s for b, s in zip(self.bounds, self.seconds, strict=True))
        return {
            "tokens": self.tokens,
            "milliseconds": round(1e3 * statistics.median(self.seconds), 4),
            "bound_milliseconds": round(1e3 * statistics.median(self.bounds), 4),
            "bound_share": round(share, 4),
        }


@app.command()
def long_context(
    like: Annotated[str, typer.Option(help="Whose attention the model has.")] = "qwen3-30b-a3b",
    format: Annotated[str, typer.Option(help="Of the weights.")] = "int8",
    kv_format: Annotated[str, typer.Option(help="Of keys and values.")] = "int8",
    longest: Annotated[int, typer.Option(min=2 * SHORTEST, help="Tokens of the longest context.")] = 1_000_000,
    read: Annotated[int, typer.Option(min=KEY_BLOCK, help="Tokens that are read as a prompt.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded at a length in a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Over all lengths.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw them: .svg or .png.")] = None,
) -> None:
    """Time tokens behind contexts of doubling length, up to the longest; print, and write or draw if asked to."""
    with exit_codes(), tempfile.TemporaryDirectory() as folder:
        if read % KEY_BLOCK or read > longest:
            raise ConfigError(f"--read {read} is out of range; it must be a multiple of {KEY_BLOCK} up to {longest}")
        config = EngineConfig(
            model_path=write_model(Path(folder) / "model", like, longest + steps), cache_dir=Path(folder) / "cache",
            weight_format=format, kv_format=kv_format, max_seq_len=longest + steps, max_batch=1, device="cpu",
        )  # fmt: skip
        with Engine.open(config) as engine:
            report = measure(engine, like, longest, read, steps, rounds)
        print(json.dumps(report, indent=1))
        if json_file:
            write_json(json_file, report)
        if figure:
            styled(lambda: draw(report), figure)


def write_model(path: Path, like: str, longest: int) -> Path:
    """A checkpoint with random weights, so many positions and EXPERTS experts, if the model has more."""
    config = {**make_config(like, layers=LAYERS), "vocab_size": SLICE_VOCABULARY, "max_position_embeddings": longest}
    config |= {key: EXPERTS for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config}
    write_checkpoint(path, config, seed=0)
    return path


def lengths_up_to(longest: int) -> list[int]:
    """Doubling lengths and the longest."""
    doubling = (SHORTEST << power for power in range(longest.bit_length()))
    return [*(tokens for tokens in doubling if tokens < longest), longest]


def measure(engine: Engine, like: str, longest: int, read: int, steps: int, rounds: int) -> dict[str, Any]:
    """Fill the keys and values of a sequence, then decode at each length, round after round."""
    start = time.perf_counter()
    run_sequence(engine, 0, 0, read, logits=False)
    say(f"note: read {read} tokens in {time.perf_counter() - start:.1f} s; copying their keys and values")
    engine.addresses.repeat(0, read, longest)
    filled_bytes = longest * engine.plan.kv.token_bytes
    probe = probe_of(engine)
    lengths = [Length(tokens) for tokens in lengths_up_to(longest)]
    for _ in range(rounds):
        for length in lengths:
            _repeat(engine, probe, length, steps)
    points = [length.to_dict() for length in lengths]
    return {
        "machine": describe_machine(engine, probe),
        "model": {"attention_of": like, "layers": LAYERS, "read": read, "kv_mib": round(filled_bytes / MIB, 1)},
        "fit": fitted([point["tokens"] for point in points], [point["milliseconds"] for point in points]),
        "lengths": points,
    }


def _repeat(engine: Engine, probe: MachineProbe, length: Length, steps: int) -> None:
    """Tokens at one length, each timed, between two probes of the machine. Raises KernelError for what overflows."""
    logits = decode_steps(engine, 1, length.tokens - 1, 1)  # wakes the threads
    if not np.isfinite(logits).all():
        raise KernelError(f"logits behind {length.tokens} tokens are not finite: try --format and --kv-format bf16")
    probe.measure()
    seconds = []
    for position in range(length.tokens, length.tokens + steps):
        start = time.perf_counter()
        decode_steps(engine, 1, position, 1)
        seconds.append(time.perf_counter() - start)
    probe.measure()
    cost = step_cost(engine.spec, engine.plan.formats, engine.plan.kv.format, 1, 1, length.tokens, 1)
    length.seconds.append(statistics.median(seconds))
    length.bounds.append(cost.bytes / probe.rates[0])


def fitted(tokens: Sequence[float], milliseconds: Sequence[float]) -> dict[str, float]:
    """The line of least squares through times by length, and the share of their variance that it explains."""
    slope, start = np.polyfit(tokens, milliseconds, 1)
    left = np.subtract(milliseconds, slope * np.asarray(tokens) + start)
    return {
        "milliseconds_per_1000_tokens": round(float(1000 * slope), 5),
        "start_milliseconds": round(float(start), 4),
        "r_squared": round(float(1 - np.var(left) / np.var(milliseconds)), 5),
    }


def draw(report: dict[str, Any]) -> Figure:
    """Measured times, their line, and the time of reading weights, keys and values."""
    figure, (axes,) = new_figure(6.5, 4.0)
    points, line, machine = report["lengths"], report["fit"], report["machine"]
    tokens = [point["tokens"] for point in points]
    slope = line["milliseconds_per_1000_tokens"]
    at_line = [slope * count / 1000 + line["start_milliseconds"] for count in tokens]
    axes.plot(tokens, at_line, color=GREY, linewidth=1, label=f"fitted: {slope:.3f} ms each 1000 tokens")
    bounds = [point["bound_milliseconds"] for point in points]
    axes.plot(tokens, bounds, "--", color=COLOURS[1], label=f"reading at {machine['read_gbps']:.0f} GB/s")
    axes.plot(tokens, [point["milliseconds"] for point in points], "o", color=COLOURS[0], label="measured")
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("time of a decoded token, ms")
    axes.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    axes.set_title(
        f"Decoding behind long contexts: {LAYERS} layers of {report['model']['attention_of']}, "
        f"{machine['kv_format']} keys and values,\n{machine['threads']} threads of {machine['cpu']}",
        color=BLACK, loc="left",
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    run_app(app, "long_context.py")
