"""What config.json says is not quantised, for where no tensors are at hand that show it."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import translate
from typing import Any

from hybrid.errors import ConfigError
from hybrid.formats.mix import MIXES, PARTS, FormatMix
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import Gated, PerHead, Stacked, StoreTensor
from hybrid.weights.checkpoints.exact_mix import Part, layer_of, mix_of_matrices
from hybrid.weights.checkpoints.files import name_of_step, own_name, placed
from hybrid.weights.checkpoints.patterns import wildcards
from hybrid.weights.checkpoints.schemes import auto_round, gptq

FIELDS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude")
MAX_NAMES = 10_000
_EXPRESSION = "re:"
_PLAIN_NAME = re.compile(r"[\w.-]+")

IsLeftOut = Callable[[str], bool]  # of the name of a module


def believed_mix(spec: ModelSpec, mix: FormatMix, is_left_out: IsLeftOut) -> FormatMix:
    """The formats of a checkpoint that is quantised so, but for these modules: they are bf16, or all experts of a layer
    if some of them are.
    """
    found: dict[Part, dict[int, str]] = {}
    for tensor in spec.store_tensors(MIXES["bf16"]):
        if tensor.part in PARTS and tensor.format is not None and not isinstance(tensor.origin, PerHead):
            matrices = found.setdefault((layer_of(tensor), tensor.part), {})
            for position, name in _positions(tensor):
                format = matrices.setdefault(position, getattr(mix, tensor.part))
                if format != "bf16" and is_left_out(name.removesuffix(".weight")):
                    matrices[position] = "bf16"
    return mix_of_matrices(spec, found, mix)


def left_out(quantisation: Mapping[str, Any], module: str = "") -> IsLeftOut:
    """Whether a module is not quantised: by its whole name, the beginning or the end of it, wildcards, or a regular
    expression behind "re:". module: see `own_name`, as names may say where a checkpoint has a module. Raises
    `ConfigError` for what is not understood.
    """
    given = left_out_names(quantisation)
    names = dict.fromkeys(named(name, module) for named in (own_name, placed) for name in given)
    wild = [pattern for name in names if "*" in name for pattern in (name, f"{name}.*")]
    wild += [pattern for name in names if name.startswith(_EXPRESSION) for pattern in _wildcards(name)]
    plain, patterns = set(names), re.compile("|".join(map(translate, wild)) or r"(?!)")
    within = _within_blocks(quantisation)

    def is_left_out(module: str) -> bool:
        if within and not module.endswith(within):
            return True
        known = {module, name_of_step(module)}
        return any(not plain.isdisjoint(_edges(name)) or patterns.match(name) is not None for name in known)

    return is_left_out


def left_out_names(quantisation: Mapping[str, Any]) -> list[str]:
    """Under all names of lists that programs read, and in the objects that say something of some modules."""
    found: list[str] = []
    for field in FIELDS:
        names = quantisation.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MAX_NAMES:
            raise ConfigError(
                f"config.json: {field} is {reprlib.repr(names)}; it must be a list of at most {MAX_NAMES} names: "
                "take the complete config.json of the model"
            )
        found += names
    found += [_EXPRESSION + expression for expression in gptq.left_out(quantisation)]
    for name in auto_round.left_out(quantisation):
        found.append(name if _PLAIN_NAME.fullmatch(name) else _EXPRESSION + name)
    return found


def _within_blocks(quantisation: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of modules end with that alone are quantised, of GPTQ; nothing if all are."""
    groups = quantisation.get("modules_in_block_to_quantize") or []
    lists = isinstance(groups, list) and all(isinstance(group, list | str) for group in groups)
    names = [name for group in groups for name in ([group] if isinstance(group, str) else group)] if lists else [None]
    if len(names) > MAX_NAMES or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"config.json: modules_in_block_to_quantize is {reprlib.repr(groups)}; it must be a list of lists of "
            "names: take the complete config.json of the model"
        )
    return tuple(f".{name}" for name in names)


def _wildcards(name: str) -> list[str]:
    found = wildcards(name.removeprefix(_EXPRESSION))
    if found is None:
        raise ConfigError(
            f"config.json: quantization_config leaves out {reprlib.repr(name)}, which is not understood; give the "
            "directory with the weights, whose tensors say it"
        )
    return found


def _edges(module: str) -> set[str]:
    """Its name cut at every dot: what comes before and what comes after."""
    words = module.split(".")
    cuts = range(len(words) + 1)
    return {".".join(words[:cut]) for cut in cuts} | {".".join(words[cut:]) for cut in cuts}


def _positions(tensor: StoreTensor) -> Iterator[tuple[int, str]]:
    """Names of the checkpoint tensors that it may be made of, of experts those of the first; and which format of its
    part each has.
    """
    origin, positions = tensor.origin, tensor.positions
    if isinstance(origin, Stacked):
        yield from zip(positions * len(origin.names) if len(positions) == 1 else positions, origin.names, strict=True)
    elif isinstance(origin, Gated):
        names = (origin.names.fused_gate_up, origin.names.fused_down, *origin.names.of_expert(0))
        yield from ((positions[0], name) for name in names if name)
