"""`hybrid fit`: what a model needs, whether it fits a machine, and about how fast it would run there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from hybrid.commands.console import say, show, show_json
from hybrid.commands.flags import command, new_app, only
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.settings import check_settings, setting

if TYPE_CHECKING:
    from hybrid.formats.mix import FormatMix
    from hybrid.machine.hardware import HardwareSpec
    from hybrid.machine.rates import Rates
    from hybrid.models.spec import ModelSpec
    from hybrid.plan.fit import Fit

    Fitter = Callable[[str, FormatMix], Fit]  # a model in a mix, which has a name, on a machine

app = new_app()

OTHERS = ("int8", "int4")  # what is shown beside the format that a model is published in
SMALLER = ("int8", "int8,experts=int4", "int4", "mxfp4")  # what is tried where nothing fits, the largest first
INTEGER_RATE = 2.0  # operations on 8-bit integers for each in bf16, where --tflops says only these
LEAST = 10**6  # bytes of memory, or read in a second, that a machine has
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d*)?) *([KMGT]?)(i?)B?(?:/s)?", re.IGNORECASE)


@dataclass(frozen=True)
class FitOptions:
    """The machine in question, and what is asked about it."""

    COMMAND: ClassVar[str] = "fit"
    GROUP: ClassVar[str] = "model"

    memory: str | None = setting(
        None, "Memory of the machine, as 64GB or 512GiB.", metavar="SIZE", shown="what is free here"
    )
    bandwidth: str | None = setting(
        None, "What it reads from memory in a second, as 80GB/s.", metavar="SIZE", shown="measured here"
    )
    tflops: float | None = setting(
        None,
        "Its operations in bf16, in 10^12 a second; twice as many on 8-bit integers are assumed.",
        minimum=0,
        above=True,
        shown="measured here; unknown with --bandwidth",
    )
    gpu: str | None = setting(None, "Memory of a GPU in it, as 24GB.", metavar="SIZE", shown="none")
    format: tuple[str, ...] = setting((), "A format or a mix, as --format of run takes them")
    depth: int = setting(0, "Tokens already read, for the predicted speeds.", minimum=0)
    json: bool = setting(False, "Print one JSON object.", group="output")


@command(app)
def fit(
    model: Annotated[
        Path, typer.Argument(help="A config.json, a model directory, a GGUF file, a packed store, or org/name.")
    ],
    config: Annotated[EngineConfig, only("kv_format", "max_seq_len", "max_batch", "chunk_size", "gpu_kv_tokens")],
    options: FitOptions,
) -> None:
    """Tell from a model's config.json alone what it needs, what fits a machine, and about how fast it would run.

    Speeds are predictions: the limit of the machine times the share of it that was reached in measurements.
    """
    check_settings(options)
    from hybrid.commands.fit_text import text
    from hybrid.models import model_spec
    from hybrid.weights.hub import local_model

    contents, native, notes = read_model(local_model(model, only_config=True))
    spec = model_spec(contents)
    if options.depth >= spec.max_position:
        raise ConfigError(f"--depth {options.depth} must be below the model's {spec.max_position} positions")
    hardware, rates = machine_of(options)
    fitter = fitter_of(spec, hardware, rates, replace(config, numa="off"), options.depth)
    found = fits_of(fitter, native, options.format)
    instead = instead_of(fitter, found)
    for note in notes:
        say(note)
    if options.json:
        show_json(report(spec, hardware, rates, found, instead))
    else:
        show(text(spec, hardware, rates, found, instead))


def read_model(path: Path) -> tuple[dict[str, Any], FormatMix | None, tuple[str, ...]]:
    """The contents of a config.json; the mix of formats that the model is published in, None if that cannot be told;
    and lines about it.
    """
    from hybrid.files import read_json_object
    from hybrid.files.gguf import is_gguf
    from hybrid.weights.checkpoints.files import CONFIG, read_config
    from hybrid.weights.checkpoints.gguf_outline import outline_gguf
    from hybrid.weights.checkpoints.published import native_mix
    from hybrid.weights.pack import describe

    if is_gguf(path):
        outline = outline_gguf(path)
        return outline.config, outline.native, outline.notes
    if path.is_dir() or not path.exists():
        return *describe(path), ()
    beside = path.name == CONFIG  # then files beside it may say how it is quantised
    config = read_config(path.parent) if beside else read_json_object(path)
    return config, native_mix(config), ()


def machine_of(options: FitOptions) -> tuple[HardwareSpec, Rates]:
    """The machine that the options describe, this one where they say nothing."""
    from hybrid.machine.hardware import probe

    hardware = probe()
    if options.memory:
        size = machine_size(options.memory, "--memory")
        hardware = replace(hardware, memory_available=size, memory_total=size, memory_limit=None)
    if options.gpu:
        hardware = replace(hardware, device_memory=machine_size(options.gpu, "--gpu"))
    return hardware, rates_of(options, hardware)


def rates_of(options: FitOptions, hardware: HardwareSpec) -> Rates:
    """What is given; the rest is measured, or 0 for the operations of another machine."""
    from hybrid.machine.rates import Rates, measured_rates

    flops = (options.tflops or 0.0) * 1e12
    if options.bandwidth:
        return Rates(machine_size(options.bandwidth, "--bandwidth"), flops, INTEGER_RATE * flops)
    measured = measured_rates(hardware, hardware.default_threads)
    return Rates(measured.read, flops, INTEGER_RATE * flops) if flops else measured


def machine_size(text: str, flag: str) -> int:
    """What `parse_size` reads, unless it is so little that its unit was forgotten. Raises ConfigError."""
    size = parse_size(text, flag)
    if size < LEAST:
        raise ConfigError(f"{flag} {text!r:.80} is less than 1 MB; write a number with its unit, as 64GB or 512GiB")
    return size


def parse_size(text: str, flag: str) -> int:
    """'64GB', '512 GiB' or '80GB/s' to bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    number = float(match[1]) if match else 0.0
    if not match or not number or len(match[1]) > 15:
        raise ConfigError(f"{flag} {text!r:.80} is not a size; write a number above 0 and a unit, as 64GB or 512GiB")
    unit = match[2].upper()
    scale = 1024 ** "KMGT".index(unit) * 1024 if match[3] and unit else _UNITS[unit]
    return int(number * scale)


def fitter_of(spec: ModelSpec, hardware: HardwareSpec, rates: Rates, config: EngineConfig, depth: int = 0) -> Fitter:
    """How a model fits a machine, with its GPU if it has one. depth: tokens behind which speeds are predicted."""
    from hybrid.plan.fit import fit_model

    if hardware.device_memory:
        cache = config.cache if spec.moe_layers else replace(config.cache, mode="off")
        config = replace(config, device="cuda", cache=cache)
    return lambda name, mix: fit_model(spec, name, mix, hardware, rates, config, depth)


def fits_of(fitter: Fitter, native: FormatMix | None, formats: Sequence[str] = ()) -> list[Fit]:
    """The model in every format that was asked for, or in its own and those that need less."""
    names: dict[FormatMix, str] = {}
    for name in formats or (("auto", *OTHERS) if native else OTHERS):
        names.setdefault(_mix(name, native), name)
    return [fitter(name, mix) for mix, name in names.items()]


def instead_of(fitter: Fitter, fits: Sequence[Fit]) -> Fit | None:
    """What to take where none of `fits` fits: what does of SMALLER, or what needs least; None where one fits."""
    from hybrid.formats.mix import FormatMix, parse_mix
    from hybrid.plan.fit import longest

    if any(not found.plan.problem for found in fits):
        return None
    mixes = {parse_mix(name, FormatMix.uniform("bf16")): name for name in SMALLER}
    tried = [fitter(name, mix) for mix, name in mixes.items()]
    fitting = longest([found for found in tried if not found.plan.problem])
    return fitting or min((*fits, *tried), key=lambda found: found.needed)


def _mix(text: str, native: FormatMix | None) -> FormatMix:
    """What `--format` asks for. native: what the model has, None if that is not known. Raises ConfigError."""
    from hybrid.formats.mix import FormatMix, parse_mix

    found = parse_mix(text, native or FormatMix.uniform("bf16"))
    if native is None and (text.strip().startswith("auto") or "=" in text.split(",")[0]):
        raise ConfigError(
            f"--format {text:.80} begins with what the model has, which the files that are here do not show; "
            "begin with another, as int4, or fetch the header of the next file"
        )
    return found


def report(
    spec: ModelSpec, hardware: HardwareSpec, rates: Rates, fits: Sequence[Fit], instead: Fit | None
) -> dict[str, Any]:
    """What `--json` prints. instead: as `instead_of` has it."""
    from dataclasses import asdict

    from hybrid.plan.fit import parameters

    total, used = parameters(spec)
    return {
        "model": {"model_type": spec.model_type, "parameters": total, "parameters_per_token": used},
        "machine": {"memory_bytes": hardware.memory_available, "gpu_bytes": hardware.device_memory, **asdict(rates)},
        "formats": [found.to_dict() for found in fits],
        "instead": instead.to_dict() if instead else None,
    }
