"""Which weight format each part of a model has."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields, replace

from hybrid.errors import ConfigError
from hybrid.formats import FORMATS


@dataclass(frozen=True)
class FormatMix:
    """Names of formats by part. Raises `ConfigError` for one that does not exist.

    dense: feed-forwards without a router. attention: all four projections. The embedding is always bf16; router,
    norms and biases are fp32.
    """

    experts: str
    shared: str
    dense: str
    attention: str
    head: str

    def __post_init__(self) -> None:
        for part, name in asdict(self).items():
            if name not in FORMATS:
                raise ConfigError(f"format {name!r} of {part} is unknown; allowed: {', '.join(FORMATS)}")

    @classmethod
    def uniform(cls, name: str) -> FormatMix:
        """The same format for every part."""
        return cls(*[name] * len(fields(cls)))

    def __str__(self) -> str:
        """The exceptions, then the format that most parts have: "int4", "experts mxfp4, shared mxfp4, rest bf16"."""
        parts = asdict(self)
        rest = Counter(parts.values()).most_common(1)[0][0]
        apart = [f"{part} {name}" for part, name in parts.items() if name != rest]
        return ", ".join([*apart, f"rest {rest}"]) if apart else rest


PARTS = tuple(field.name for field in fields(FormatMix))


# What one name stands for. fp8 and mxfp4 are as checkpoints are published, whose other parts are not quantised.
MIXES = {
    "bf16": FormatMix.uniform("bf16"),
    "int8": FormatMix.uniform("int8"),
    "int4": FormatMix.uniform("int4"),
    "fp8": replace(FormatMix.uniform("fp8"), head="bf16"),
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
    return replace(native if first == "auto" else MIXES[first], **_overrides(text, rest))


def _overrides(text: str, words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        part, _, name = (piece.strip() for piece in word.partition("="))
        if part not in PARTS or name not in FORMATS or part in found:
            raise ConfigError(
                f"format {text!r}: {word!r} is not understood; after the first name, each of "
                f"{', '.join(PARTS)} may be set once to one of {', '.join(FORMATS)}, as in int4,head=int8"
            )
        found[part] = name
    return found
