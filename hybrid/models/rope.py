"""Rotary embedding: its parameters in config.json, and the inverse frequencies they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields

RopeKind = Literal["default", "linear", "llama3", "yarn", "factors", "longrope", "proportional"]

_GROWTH = "llama_4_scaling_beta"
_MANY_TURNS = 1e300  # infinity has no nearest dimension
_Array = npt.NDArray[Any]  # float32; numpy types its mixture with Python numbers as float64


@dataclass(frozen=True)
class Growth:
    """What queries are multiplied by once they are turned: 1 + beta * ln(1 + position // length)."""

    beta: float
    length: int


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. `parameters` are the type's own (factor, beta_fast, ...). growth: of late queries, None where
    they have none.

    dim: how many leading dimensions of a head rotate (partial rope: less than head_dim). interleaved: pairs
    are (2i, 2i+1) instead of (i, i + dim/2). max_position: max_position_embeddings of the checkpoint. longrope has two
    sets of frequencies: that of a sequence of up to `long_above` tokens, and that of longer ones, for all their tokens.
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    interleaved: bool = False
    max_position: int = 0
    parameters: tuple[tuple[str, float | bool | tuple[float, ...]], ...] = ()
    growth: Growth | None = None

    @property
    def long_above(self) -> int:
        """The length up to which a sequence has the first of two sets of frequencies; 0 where there is one."""
        return int(dict(self.parameters)["original_max_position"]) if self.kind == "longrope" else 0  # type: ignore[arg-type]


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    theta: float,
    max_position: int,
    part: float | None = None,
    interleaved: bool = False,
    by_length: bool = False,
    grows: bool = False,
) -> RopeSpec:
    """Rotary embedding of heads, from `rope_parameters`, or `rope_theta` and `rope_scaling`.

    theta: the family's default. part: the same of the part of the dimensions that turn, None where all do.
    max_position: the context length, which the types with scaling start from. by_length: whether the layer can have
    frequencies that depend on the length of a sequence. grows: whether its late queries may be larger.
    """
    scaling = fields.group("rope_scaling", "rope_parameters")
    original = _read_original(fields, scaling, max_position)
    if not grows:
        scaling.refuse(_GROWTH, neutral=0)
    theta = scaling.number("rope_theta", default=fields.number("rope_theta", default=theta, above=1), above=1)
    allowed = tuple(kind for kind in _KINDS if by_length or kind != "longrope")
    kind = scaling.choice("rope_type", "type", default="default", allowed=allowed)
    dim = head_dim if kind == "proportional" else _read_dim(fields, scaling, head_dim, part)
    parameters: dict[str, Any] = _KINDS[kind][0](scaling)
    if kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position"] = original
    for name in ("short_factor", "long_factor"):
        if len(parameters.get(name, ())) not in (0, dim // 2):
            raise ConfigError(
                f"config.json: {name} has {len(parameters[name])} numbers and {dim} dimensions of a head turn; it must "
                f"have {dim // 2}: correct it, or take a checkpoint that has it so"
            )
    return RopeSpec(
        theta,
        dim,
        cast(RopeKind, kind),
        interleaved=interleaved,
        max_position=max_position,
        parameters=tuple(parameters.items()),
        growth=_read_growth(scaling, original),
    )


def _read_original(fields: Fields, scaling: Fields, max_position: int) -> int:
    """The context length before it was stretched."""
    inner = scaling.size("original_max_position_embeddings", default=max_position, maximum=10**9)
    return fields.size("original_max_position_embeddings", default=inner, maximum=10**9)


def _read_growth(scaling: Fields, original: int) -> Growth | None:
    if not scaling.has(_GROWTH) or scaling.is_zero(_GROWTH):
        return None
    return Growth(scaling.number(_GROWTH), original)


def _read_dim(fields: Fields, scaling: Fields, head_dim: int, part: float | None) -> int:
    """How many leading dimensions of a head turn."""
    if part is None:
        for place in (fields, scaling):
            place.refuse("partial_rotary_factor", neutral=1.0)
        return head_dim
    part = scaling.number("partial_rotary_factor", default=fields.number("partial_rotary_factor", default=part))
    dim = int(head_dim * part)
    if part > 1 or dim < 2 or dim % 2:
        raise ConfigError(
            f"config.json: partial_rotary_factor {part:g} of heads of {head_dim} dimensions turns {dim}; "
            "it must be an even number of them, from 2 on: correct it"
        )
    return dim


def inverse_frequencies(rope: RopeSpec, long: bool = False) -> tuple[npt.NDArray[np.float32], float]:
    """Radians per position, float32 [dim / 2], and the factor on both cosine and sine. long: of sequences longer than
    `long_above`, where that has a meaning.

    Computed in float32 step by step as `transformers` does, so that angles agree at large positions too.
    Raises `ConfigError` for a type that is not computed here, and for angles that are not finite.
    """
    if rope.kind not in _KINDS:
        raise ConfigError(
            f"rope type {rope.kind!r} is not supported; supported: {', '.join(_KINDS)}: take another model"
        )
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    periods = np.float32(rope.theta) ** exponents
    with np.errstate(all="ignore"):  # what is not finite is refused
        frequencies, attention_factor = _KINDS[rope.kind][1](rope, periods, {**dict(rope.parameters), "long": long})
    if not (np.isfinite(frequencies).all() and math.isfinite(attention_factor)):
        parameters = ", ".join(f"{name} {value}" for name, value in rope.parameters)
        raise ConfigError(f"rope type {rope.kind!r} has angles that are not finite ({parameters}): correct config.json")
    return frequencies.astype(np.float32, copy=False), attention_factor


def _read_nothing(scaling: Fields) -> dict[str, Any]:
    return {}


def _read_factor(scaling: Fields) -> dict[str, Any]:
    return {"factor": scaling.number("factor")}


def _read_factors(scaling: Fields) -> dict[str, Any]:
    return {"factors": tuple(scaling.numbers("factors"))}


def _read_llama3(scaling: Fields) -> dict[str, Any]:
    low = scaling.number("low_freq_factor")
    high = scaling.number("high_freq_factor", above=low)
    return {"factor": scaling.number("factor"), "low_freq_factor": low, "high_freq_factor": high}


def _read_yarn(scaling: Fields) -> dict[str, Any]:
    found = {name: scaling.number(name) for name in ("factor", "attention_factor") if scaling.has(name)}
    for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow"):  # of which 0 says nothing
        if scaling.has(name) and not scaling.is_zero(name):
            found[name] = scaling.number(name)
    return {**found, "truncate": scaling.flag("truncate", default=True)}


def _read_proportional(scaling: Fields) -> dict[str, Any]:
    """The part of a head that turns, whose pairs lie as far apart as if all of it did."""
    part = scaling.number("partial_rotary_factor", default=1.0)
    if part > 1:
        raise ConfigError(f"config.json: partial_rotary_factor is {part:g}; it must be at most 1: correct it")
    return {"part": part, "factor": scaling.number("factor", default=1.0)}


def _read_longrope(scaling: Fields) -> dict[str, Any]:
    optional = ("factor", "attention_factor", "short_mscale", "long_mscale")
    found: dict[str, Any] = {name: scaling.number(name) for name in optional if scaling.has(name)}
    return {**found, **{name: tuple(scaling.numbers(name)) for name in ("short_factor", "long_factor")}}


def _default(rope: RopeSpec, periods: _Array, p: dict[str, Any]) -> tuple[_Array, float]:
    return 1 / periods, 1.0


def _linear(rope: RopeSpec, periods: _Array, p: dict[str, Any]) -> tuple[_Array, float]:
    return 1 / periods / np.float32(p["factor"]), 1.0


def _factors(rope: RopeSpec, periods: _Array, p: dict[str, Any]) -> tuple[_Array, float]:
    """Each frequency is divided by its own factor, as GGUF files tell them."""
    factors = np.array(p["factors"], np.float32)
    if factors.shape != periods.shape:
        raise ConfigError(
            f"rope type 'factors' has {factors.size} factors, {rope.dim} dimensions turn: it must have one for two"
        )
    return 1 / (periods * factors), 1.0


def _llama3(rope: RopeSpec, periods: _Array, p: dict[str, Any]) -> tuple[_Array, float]:
    """Low frequencies are divided by the factor, high ones kept, those between interpolated by wavelength."""
    plain, original = 1 / periods, p["original_max_position"]
    low, high, factor = p["low_freq_factor"], p["high_freq_factor"], p["factor"]
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelength > original / low, plain / factor, between)
    return np.where(wavelength < original / high, plain, scaled), 1.0


def _yarn(rope: RopeSpec, periods: _Array, p: dict[str, Any]) -> tuple[_Array, float]:
    """A ramp over the dimensions from kept (fast rotation) to divided by the factor (slow rotation)."""
    factor = p.get("factor", rope.max_position / p["original_max_position"])
    low = _rotation_dim(rope, p, p.get("beta_fast", 32))
    high = _rotation_dim(rope, p, p.get("beta_slow", 1))
    if p["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = (high - low) or 0.001
    divided = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / width, 0, 1)
    kept = 1 - divided
    return 1 / (factor * periods) * (1 - kept) + 1 / periods * kept, _yarn_attention_factor(factor, p)


def _rotation_dim(rope: RopeSpec, p: dict[str, Any], rotations: float) -> float:
    """The dimension that turns `rotations` times over the original context."""
    turns = min(p["original_max_position"] / (rotations * 2 * math.pi), _MANY_TURNS)
    return rope.dim * math.log(turns) / (2 * math.log(rope.theta))


def _yarn_attention_factor(factor: float, p: dict[str, Any]) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "attention_factor" in p:
        return float(p["attention_factor"])
    if "mscale" in p and "mscale_all_dim" in p:
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


def _proportional(rope: RopeSpec, periods: _Array, p: dict[str, Any]) -> tuple[_Array, float]:
    """Frequencies are those of a head that turns whole, and zero behind the part that does."""
    turning = np.arange(periods.size) < int(p["part"] * rope.dim // 2)
    return np.where(turning, 1 / periods, np.float32(0)) / np.float32(p["factor"]), 1.0


def _longrope(rope: RopeSpec, periods: _Array, p: dict[str, Any]) -> tuple[_Array, float]:
    """Every frequency is divided by a number of its own, and cosines and sines are larger where contexts are."""
    name, original = "long" if p["long"] else "short", p["original_max_position"]
    factor = p.get("factor", rope.max_position / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    mscale = p.get(f"{name}_mscale", p.get("attention_factor", grown))
    return 1 / (np.array(p[f"{name}_factor"], np.float32) * periods), mscale


_Reader = Callable[[Fields], dict[str, Any]]
_Scaler = Callable[[RopeSpec, _Array, dict[str, Any]], tuple[_Array, float]]
_KINDS: dict[str, tuple[_Reader, _Scaler]] = {
    "default": (_read_nothing, _default),
    "linear": (_read_factor, _linear),
    "llama3": (_read_llama3, _llama3),
    "yarn": (_read_yarn, _yarn),
    "factors": (_read_factors, _factors),
    "longrope": (_read_longrope, _longrope),
    "proportional": (_read_proportional, _proportional),
}
