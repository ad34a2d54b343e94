"""What `hybrid fit` shows to people: the model, the machine, a row for each format, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybrid.machine.hardware import HardwareSpec
from hybrid.machine.memory import size_text
from hybrid.machine.rates import Rates
from hybrid.models.spec import ModelSpec
from hybrid.plan.fit import Fit, longest, parameters

HEADER = ("format", "weights", "KV of 1000 tokens", "context", "memory", "fits", "read a token", "decode", "prompt")


def text(spec: ModelSpec, hardware: HardwareSpec, rates: Rates, fits: Sequence[Fit], instead: Fit | None = None) -> str:
    """instead: of those that were not asked for, what fits or needs least, where none of `fits` does."""
    rows = [HEADER, *(_row(found) for found in fits)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    parts = [_parts(found) for found in fits]
    advice = [*_speeds(hardware, rates), _choice(hardware, fits, instead), *_on_gpus(fits)]
    return "\n".join([*_heading(spec, hardware, rates), "", *table, "", *parts, "", *filter(None, advice)])


def _heading(spec: ModelSpec, hardware: HardwareSpec, rates: Rates) -> list[str]:
    total, used = parameters(spec)
    multiplies = f", multiplies {rates.flops / 1e9:.0f} GFLOP/s (bf16), {rates.int_ops / 1e9:.0f} GOP/s (int8)"
    gpu = f", a GPU of {size_text(hardware.device_memory)}" if hardware.device_memory else ""
    return [
        f"model: {spec.model_type}, {len(spec.layers)} layers, {_count(total)} parameters, {_count(used)} for a token",
        f"machine: {size_text(hardware.memory_available)} of memory{gpu}, reads {rates.read / 1e9:.0f} GB/s"
        + (multiplies if rates.flops else ""),
    ]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"


def _row(found: Fit) -> tuple[str, ...]:
    plan = found.plan
    return (
        found.name,
        size_text(found.weights),
        size_text(1000 * plan.kv.token_bytes),
        str(plan.max_seq_len),
        size_text(found.needed),
        "no" if plan.problem else "yes",
        size_text(found.decode.bytes),
        _speed(found.decode_speed, found.decode_limit),
        _speed(found.prompt_speed, found.prompt_limit),
    )


def _speed(predicted: float | None, limit: float | None) -> str:
    return f"{_number(predicted)} of {_number(limit)} tok/s" if predicted and limit else "-"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _parts(found: Fit) -> str:
    """'int8: experts 29.00 GB in int8, ...': bytes by part, the largest first."""
    formats = {**found.mix.parts(), "embedding": "bf16"}
    sizes = sorted(found.plan.weight_bytes.items(), key=lambda item: -item[1])
    words = [f"{part} {size_text(size)}" + (f" in {formats[part]}" if part in formats else "") for part, size in sizes]
    return f"{found.name}: {', '.join(words)}" + ("; some layers differ" if found.mix.layers else "")


def _speeds(hardware: HardwareSpec, rates: Rates) -> Iterator[str]:
    yield (
        "Speeds are predicted for one sequence, of the limit of the machine: the slower of reading and multiplying. "
        + ("" if rates.flops else "--tflops tells of prompts too. ")
        + ("They are those without the GPU." if hardware.device_memory else "")
    ).rstrip()


def _choice(hardware: HardwareSpec, fits: Sequence[Fit], instead: Fit | None) -> str:
    """Which format to take, or what it would need."""
    if best := longest([found for found in fits if not found.plan.problem]):
        return f"Take --format {best.name}: the first that fits with {_context(best)}." if fits[1:] else ""
    none = "None of these fits" if fits[1:] else f"{fits[0].name} does not fit"
    assert instead is not None
    needs = f"needs {size_text(instead.needed)}"
    if not instead.plan.problem:
        return f"{none}, but --format {instead.name} does: it {needs}, with {_context(instead)}."
    missing = size_text(instead.needed - hardware.memory_available)
    lines = f"{none}: {instead.name}, which takes least, {needs}, {missing} more than there is"
    shorter = ((found, found.room(hardware.memory_available)) for found in fits)
    return lines + next((f"; {found.name} with --max-seq-len {room} fits." for found, room in shorter if room), ".")


def _context(found: Fit) -> str:
    return f"{found.plan.max_seq_len} tokens of context"


def _on_gpus(fits: Sequence[Fit]) -> Iterator[str]:
    """What of each lies on a GPU, or why nothing does; what is the same of several, once."""
    refused: dict[str, list[str]] = {}
    for found in fits:
        if found.without_gpu:
            refused.setdefault(found.without_gpu, []).append(found.name)
        else:
            yield from _on_gpu(found)
    for reason, names in refused.items():
        yield f"Not on the GPU, {', '.join(names)}: {reason}"


def _on_gpu(found: Fit) -> Iterator[str]:
    device, cache = found.plan.device, found.plan.cache
    if found.plan.problem or device is None:
        return
    parts = [
        f"{size_text(device.weights)} of weights",
        f"{size_text(device.workspace)} for a step",
        f"{size_text(device.kv)} of mirrored keys and values, {device.kv_tokens} tokens of a sequence",
    ]
    line = f"On the GPU, {found.name}: {', '.join(parts)}"
    yield (
        f"{line}; {cache}: --cache-nblocks {cache.geometry.nblocks} --cache-nways {cache.geometry.nways}."
        if cache
        else f"{line}."
    )
