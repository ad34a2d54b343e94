"""Which weight format each part of a model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.formats import FORMATS
from hybrid.formats.packed import matrix_formats


@dataclass(frozen=True)
class FormatMix:
    """Names of formats by part. Raises `ConfigError` for one that does not exist.

    dense: feed-forwards without a router. attention: its projections. The embedding is always bf16; router, norms and
    biases are fp32. Of experts, shared and dense a name such as "q4_k/q6_k" is that of gate and up, and that of down;
    of attention it names each projection in the order of a step. per_head: of the matrices of latent heads, those of
    keys and those of values, where a checkpoint has them as they are multiplied; else empty, and they follow from
    attention. layers: the mix of every layer, where they differ; the other fields are then what most of them have.
    """

    experts: str
    shared: str
    dense: str
    attention: str
    head: str
    per_head: str = field(default="", kw_only=True)
    layers: tuple[FormatMix, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for part, name in self._named().items():
            names = [name] if part == "head" else name.split("/")
            if part in (*GATED, PER_HEAD):
                matrix_formats(name)
            if any(format not in FORMATS for format in names):
                raise ConfigError(f"format {name!r} of {part} is unknown; allowed: {', '.join(FORMATS)}")

    @classmethod
    def uniform(cls, name: str) -> FormatMix:
        """The same format for every part."""
        return cls(*[name] * len(PARTS))

    @classmethod
    def of_layers(cls, layers: Sequence[FormatMix]) -> FormatMix:
        """The mix of a model from those of its layers."""
        usual = Counter(layers).most_common(1)[0][0]
        return usual if all(mix == usual for mix in layers) else replace(usual, layers=tuple(layers))

    def of_layer(self, layer: int) -> FormatMix:
        return self.layers[layer] if self.layers else self

    def parts(self) -> dict[str, str]:
        """The format of each part, in most layers."""
        return {part: getattr(self, part) for part in PARTS}

    def _named(self) -> dict[str, str]:
        """All that has a format of its own."""
        return self.parts() | ({PER_HEAD: self.per_head} if self.per_head else {})

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `per_head` and `layers` are there only if they say something."""
        return self._named() | ({"layers": [mix._named() for mix in self.layers]} if self.layers else {})

    def with_parts(self, formats: Mapping[str, Any]) -> FormatMix:
        """A copy with other formats of some parts, in every layer. With another attention `per_head` is empty unless it
        is given too.
        """
        if "attention" in formats:
            formats = {PER_HEAD: "", **formats}
        changed = replace(self, **formats, layers=())
        return self.of_layers([replace(mix, **formats) for mix in self.layers]) if self.layers else changed

    def __str__(self) -> str:
        """The exceptions, then the format that most parts have: "int4", "experts mxfp4, shared mxfp4, rest bf16"; then
        the layers that have others.
        """
        parts = self.parts()
        rest = Counter(parts.values()).most_common(1)[0][0]
        apart = [f"{part} {name}" for part, name in parts.items() if name != rest]
        apart += [f"matrices of heads {self.per_head}"] if self.per_head else []
        usual = ", ".join([*apart, f"rest {rest}"]) if apart else rest
        return "; ".join([usual, *(f"layers {layers}: {mix}" for mix, layers in self._others().items())])

    def _others(self) -> dict[FormatMix, str]:
        """The numbers of layers with other formats, as "0-3,8"."""
        found: dict[FormatMix, list[list[int]]] = {}
        for layer, mix in enumerate(self.layers):
            if mix != replace(self, layers=()):
                runs = found.setdefault(mix, [])
                if runs and runs[-1][-1] == layer - 1:
                    runs[-1].append(layer)
                else:
                    runs.append([layer])
        return {mix: ",".join(_run_text(run) for run in runs) for mix, runs in found.items()}


def _run_text(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"


GATED = ("experts", "shared", "dense")
PER_HEAD = "per_head"
PARTS = (*GATED, "attention", "head")


# What one name stands for. Those of fp8 and of 4 bits in floats are as checkpoints are published, whose other parts are
# not quantised.
MIXES = {
    "bf16": FormatMix.uniform("bf16"),
    "int8": FormatMix.uniform("int8"),
    "int4": FormatMix.uniform("int4"),
    **{name: replace(FormatMix.uniform(name), head="bf16") for name in ("fp8", "fp8_row", "nvfp4")},
    "mxfp4": replace(FormatMix.uniform("bf16"), experts="mxfp4", shared="mxfp4"),
    **{name: FormatMix.uniform(name) for name in ("q8_0", "q6_k", "q5_k", "q4_k")},
}


def parse_mix(text: str, native: FormatMix) -> FormatMix:
    """The mix that a text such as "auto", "int8" or "int4,head=int8,attention=bf16" asks for.

    "auto", also meant when the text starts with a part, is `native`: what the model has. Raises `ConfigError`.
    """
    first, *rest = [word.strip() for word in text.split(",")]
    if "=" in first:
        first, rest = "auto", [first, *rest]
    if first != "auto" and first not in MIXES:
        raise ConfigError(
            f"format {first!r} is unknown; allowed: auto, {', '.join(MIXES)}, "
            f"then overrides such as head=int8 for {', '.join(PARTS)}"
        )
    return (native if first == "auto" else MIXES[first]).with_parts(_overrides(text, rest))


def _overrides(text: str, words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        part, _, name = (piece.strip() for piece in word.partition("="))
        if part not in PARTS or not {*name.split("/")} <= {*FORMATS} or part in found:
            raise ConfigError(
                f"format {text!r}: {word!r} is not understood; after the first name, each of "
                f"{', '.join(PARTS)} may be set once to one of {', '.join(FORMATS)}, as in int4,head=int8"
            )
        found[part] = name
    return found
