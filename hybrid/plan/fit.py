"""What a model needs, and about how fast it runs, on any machine: from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.formats import FORMATS
from hybrid.formats.mix import FormatMix
from hybrid.machine.hardware import HardwareSpec
from hybrid.models.layers.base import Cost
from hybrid.models.spec import ModelSpec
from hybrid.plan.plan import Plan, make_plan
from hybrid.plan.roofline import part_costs, step_cost

# Shares of the limit that this runtime has reached (`bench/results/README.md`), one token at a time and in prompts of
# 512 tokens, by the format of the weights. A prediction is the limit times these. Whole prompts in fp8 and mxfp4 were
# not measured: they multiply in bf16, after opening the weights.
DECODE_SHARES = {"bf16": 0.95, "int8": 0.88, "int4": 0.75, "fp8": 0.85, "mxfp4": 0.6}
PROMPT_SHARES = {"bf16": 0.87, "int8": 0.64, "int4": 0.53, "fp8": 0.75, "mxfp4": 0.7}
AMX_PROMPT_SHARES = {"bf16": 0.78, "int8": 0.42, "int4": 0.17, "fp8": 0.6, "mxfp4": 0.5}
_GROUPED = "int4"  # what codes in groups count as, which were not measured apart
PROMPT_ROWS = 512  # of a step that reads a prompt


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: bytes read from memory, operations in bf16 and on 8-bit integers.

    flops and int_ops are 0 where they are not known.
    """

    read: float
    flops: float = 0.0
    int_ops: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """The shortest time of a step: that of reading alone where operations are not known."""
        return cost.seconds(self.read, self.flops, self.int_ops) if self.flops else cost.bytes / self.read


@dataclass(frozen=True)
class Fit:
    """A model in one mix of formats on one machine.

    name: of the mix, as it was asked for. plan: has `problem` set where the model does not fit; its `max_seq_len` is
    the context that does. decode, prompt: the cost of a token that is generated, and of PROMPT_ROWS tokens that are
    read. decode_speed, prompt_speed:
    predicted tokens per second at the depth that was asked for, None where the machine's operations are not known.
    without_gpu: why the plan has no GPU, where one was asked for; else empty.
    """

    name: str
    mix: FormatMix
    plan: Plan
    decode: Cost
    prompt: Cost
    decode_speed: float
    prompt_speed: float | None
    without_gpu: str = ""

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(self.plan.weight_bytes.values())

    @property
    def needed(self) -> int:
        """Bytes of everything, with one sequence as long as the context."""
        return self.plan.fixed_bytes + self.plan.max_seq_len * self.plan.kv.token_bytes

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: sizes in bytes, speeds in tokens per second."""
        cache = self.plan.cache
        return {
            "name": self.name,
            "format": self.plan.format_text,
            "weight_bytes": self.plan.weight_bytes,
            "kv_token_bytes": self.plan.kv.token_bytes,
            "context": self.plan.max_seq_len,
            "needed_bytes": self.needed,
            "problem": self.plan.problem,
            "decode": {"tokens_per_second": self.decode_speed, **asdict(self.decode)},
            "prompt": {"tokens_per_second": self.prompt_speed, "rows": PROMPT_ROWS, **asdict(self.prompt)},
            "cache": cache.to_dict() if cache else None,
            "gpu": asdict(self.plan.device) if self.plan.device else None,
            "without_gpu": self.without_gpu or None,
        }


def fit_model(
    spec: ModelSpec,
    name: str,
    mix: FormatMix,
    hardware: HardwareSpec,
    rates: Rates,
    config: EngineConfig,
    depth: int = 0,
) -> Fit:
    """Plan a model as an engine would, and predict its speed behind `depth` earlier tokens.

    hardware: with the memory of the machine in question. Raises ConfigError as `make_plan` does; a model that does
    not fit is no error, nor one that a GPU cannot have.
    """
    plan, without_gpu = _plan(spec, hardware, config, mix)
    shares = AMX_PROMPT_SHARES if hardware.isa == "amx" else PROMPT_SHARES
    decode = tuple(part_costs(spec, mix, plan.kv.format, 1, 1, depth, 1))
    prompt = tuple(part_costs(spec, mix, plan.kv.format, 1, PROMPT_ROWS, depth, 0))
    return Fit(
        name,
        mix,
        plan,
        sum((cost for _, cost in decode), Cost()),
        sum((cost for _, cost in prompt), Cost()),
        1 / _seconds(decode, rates, DECODE_SHARES),
        PROMPT_ROWS / _seconds(prompt, rates, shares) if rates.flops else None,
        without_gpu,
    )


def _plan(spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig, mix: FormatMix) -> tuple[Plan, str]:
    """The plan, and why it is one without the GPU that `config` asks for."""
    try:
        return make_plan(spec, hardware, config, mix), ""
    except ConfigError as error:
        if config.device != "cuda":
            raise
        return make_plan(spec, hardware, replace(config, device="cpu"), mix), str(error)


def _seconds(parts: Iterable[tuple[tuple[str, ...], Cost]], rates: Rates, shares: Mapping[str, float]) -> float:
    """Predicted seconds of a step; a part of several formats counts as the slowest of them."""
    return sum(_reached(rates, shares, formats).seconds(cost) for formats, cost in parts)


def _reached(rates: Rates, shares: Mapping[str, float], formats: tuple[str, ...]) -> Rates:
    """What is reached of the rates. Beside weights that multiply integers, floats are attention's, which is bf16."""
    slowest = min(formats, key=lambda name: shares.get(name, shares[_GROUPED]), default="bf16")
    share = shares.get(slowest, shares[_GROUPED])
    floats = shares["bf16"] if FORMATS[slowest].integer else share
    return Rates(rates.read * share, rates.flops * floats, rates.int_ops * share)


def parameters(spec: ModelSpec) -> tuple[int, int]:
    """How many a model has, and how many of them a token multiplies with."""
    apart = all(spec.layers[layer].feed_forward.names.experts.gate for layer in spec.moe_layers)
    total = sum(prod(shape) for _, shape in spec.checkpoint_shapes("apart" if apart else "fused"))
    used = step_cost(spec, FormatMix.uniform("bf16"), "bf16", 1, 1, 0, 1).flops / 2
    return total, int(used)
