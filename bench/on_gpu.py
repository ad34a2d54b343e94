"""Everything that a GPU must show, in the order of what matters most, each result written at once.

    python bench/on_gpu.py results-gpu                  # or: make gpu
    python bench/on_gpu.py results-gpu --only verify    # steps whose names hold a word
    python bench/on_gpu.py try --stand-in               # without a GPU: tries this program and the steps, small

A step is a command of this project. What it prints goes to `NAME.log`, its figures to `NAME.json` where it has any, and
how it ended to `steps.json`. A step that ended well is not run again, so an interrupted run goes on where it was. A
step that fails or takes too long does not stop the others. `machine.json` describes the machine.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.commands.console import exit_codes, say
from hybrid.errors import ConfigError
from hybrid.files import write_json
from hybrid.machine.gpu import why_unusable
from hybrid.machine.hardware import probe

ROOT = Path(__file__).parent.parent
PYTHON = (sys.executable,)
HYBRID = (*PYTHON, "-m", "hybrid.cli")
EMBEDDED = "embedded"
SLICES = {"qwen3-30b-a3b": 4, "gpt-oss-20b": 4, "mixtral-8x7b": 2}  # models, and how many of their layers are tried
SLOTS = ("--cache-nblocks", "14", "--cache-nways", "4")
DONE, FAILED, SLOW = "done", "failed", "took too long"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Step:
    """A command, and how many seconds it may take. output: the flag of the file with its figures, if it has one; what
    others print is their JSON if `prints` is set.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    output: str = ""
    prints: bool = False


@dataclass(frozen=True)
class End:
    """How a step ended: in which of DONE, FAILED, SLOW, after how many seconds, with which exit code."""

    status: str
    seconds: float
    code: int | None


def steps(folder: Path, stand_in: bool) -> Iterator[Step]:
    """In the order of what matters most: is it right, then how fast, then against others."""
    device = "simulated" if stand_in else "cuda"
    tests = ("tests/gpu", "-k", "streams") if stand_in else ("tests", "-m", "gpu")
    yield Step("tests", (*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests), 900)
    yield Step("verify-embedded", (*HYBRID, "verify", "--device", device, "--json"), 300, prints=True)
    small = ("--shapes", "tiny", "--rows", "1,8", "--formats", "bf16", "--device", "cpu", "--repetitions", "1")
    experts = small if stand_in else ("--rows", "1,8,512")
    command = (*PYTHON, "bench/device.py", *experts, "--output", "json")
    yield Step("experts", command, 600, prints=True)
    yield from _placements(EMBEDDED, None, device, stand_in)
    for name, layers in ({} if stand_in else SLICES).items():
        yield from _slice(folder, name, layers)
    yield Step("profile", _profile(folder, device), 300)
    if not stand_in:
        yield Step("tilings", (*PYTHON, "bench/device.py", "--tune", "--output", "json"), 1800, prints=True)
        peers = ("--peers", "llama.cpp", "--layers", "8", "--output", "json")
        yield Step("compare", (*PYTHON, "bench/compare.py", "--formats", "int4", *peers), 1800, prints=True)


def _slice(folder: Path, name: str, layers: int) -> Iterator[Step]:
    """A few layers with the shapes of a model: written, verified, and timed in every placement."""
    model = folder / "models" / name
    write = (*PYTHON, "bench/synthetic_checkpoint.py", str(model), "--like", name, "--layers", str(layers))
    yield Step(f"write-{name}", write, 300)
    where = ("--model-path", str(model))
    yield Step(f"verify-{name}", (*HYBRID, "verify", "--device", "cuda", *where, "--json"), 600, prints=True)
    for kind, flags in (("threads", ("--device", "cpu")), ("gpu", ("--device", "cuda"))):
        command = (*HYBRID, "bench", *where, *flags, "-p", "512,2048", "-n", "32", "-d", "0,4096", "--output", "json")
        yield Step(f"bench-{name}-{kind}", command, 600, prints=True)
    yield from _placements(name, model, "cuda", False)


def _placements(name: str, model: Path | None, device: str, stand_in: bool) -> Iterator[Step]:
    """The CPU alone, static placements and the cache in turn, and a picture of one token."""
    where = () if model is None else ("--model-path", str(model))
    size = ("--rounds", "1", "--max-tokens", "12", "--policies", "LRU") if stand_in else SLOTS
    command = (*PYTHON, "bench/placements.py", "--device", device, *where, *size)
    yield Step(f"placements-{name}", command, 900, output="--output")


def _profile(folder: Path, device: str) -> tuple[str, ...]:
    """Of a prompt and some tokens: by nsys where it is installed, else the times of every part of every step."""
    prompt = "Once upon a time, there was a little fox named"
    run = (*HYBRID, "run", "--device", device, *SLOTS, "--prompt", prompt, "--max-tokens", "32", "--hide-resp")
    if device == "cuda" and shutil.which("nsys"):
        target = str(folder / "profile")
        return ("nsys", "profile", "--trace", "cuda,nvtx,osrt", "--force-overwrite", "true", "--output", target, *run)
    return (*run, "--breakdown-csv", str(folder / "profile.csv"))


def run_steps(folder: Path, chosen: Sequence[Step]) -> dict[str, End]:
    """Run what has not ended well yet; returns how every step of the folder ended."""
    ended = _read(folder)
    for number, step in enumerate(chosen, start=1):
        if step.name in ended and ended[step.name].status == DONE:
            say(f"{number} of {len(chosen)}: {step.name}: done before")
            continue
        say(f"{number} of {len(chosen)}: {step.name}: {' '.join(step.command[1:])}")
        ended[step.name] = end = _run(folder, step)
        write_json(folder / "steps.json", {name: asdict(value) for name, value in ended.items()})
        say(f"    {end.status} after {end.seconds:.0f} s")
    return ended


def _run(folder: Path, step: Step) -> End:
    figures, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
    command = [*step.command, *((step.output, str(figures)) if step.output else ())]
    start = time.monotonic()
    with open(log, "wb") as said, open(figures if step.prints else os.devnull, "wb") as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=printed if step.prints else said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # Ctrl-C, too: the step is tried again the next time
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = SLOW if code is None else DONE if code == 0 else FAILED
    return End(status, round(time.monotonic() - start, 1), code)


def _read(folder: Path) -> dict[str, End]:
    path = folder / "steps.json"
    return {name: End(**end) for name, end in json.loads(path.read_text()).items()} if path.is_file() else {}


def describe_machine() -> dict[str, Any]:
    """The processors, and what the GPU's own tools say of it and of its link."""
    hardware = probe()
    return {
        "cpu": hardware.cpu_model,
        "cores": len(hardware.cpus),
        "isas": hardware.isas,
        "memory_gb": round(hardware.memory_total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpu": _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max",
                     "--format=csv"),
        "links": _said("nvidia-smi", "topo", "-m"),
        "lscpu": _said("lscpu"),
        "packages": _said(*PYTHON, "-m", "pip", "freeze"),
    }  # fmt: skip


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be had: {error}"
    return done.stdout


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Where results go; what is there already is not measured again.")],
    only: Annotated[str, typer.Option(help="A word in the names of the steps to run.")] = "",
    stand_in: Annotated[bool, typer.Option("--stand-in", help="Small, without a GPU: to try it.")] = False,
) -> None:
    """Run tests, checks and benchmarks of the GPU's half, the most important first."""
    with exit_codes("what ended is in the folder; the same command goes on"):
        problem = None if stand_in else why_unusable()
        if problem:
            raise ConfigError(f"no GPU can be used: {problem}; --stand-in tries the program without one")
        folder = folder.resolve()
        chosen = [step for step in steps(folder, stand_in) if only in step.name]
        if not chosen:
            raise ConfigError(
                f"--only {only!r} is in the name of no step: {', '.join(s.name for s in steps(folder, stand_in))}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["HYBRID_DEVICE"] = "simulated" if stand_in else "cuda"
        write_json(folder / "machine.json", describe_machine())
        ended = run_steps(folder, chosen)
        for step in chosen:
            print(f"{step.name:<28}{ended[step.name].status:<16}{ended[step.name].seconds:>8.0f} s")
    raise SystemExit(any(ended[step.name].status != DONE for step in chosen))


if __name__ == "__main__":
    app()
