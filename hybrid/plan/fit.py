"""What a model needs, and about how fast it runs, on any machine: from its config.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import hypot, prod
from typing import Any

from cpu_kernels import KEY_BLOCK
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.formats import FORMATS
from hybrid.formats.mix import FormatMix
from hybrid.machine.hardware import HardwareSpec
from hybrid.machine.rates import Rates
from hybrid.models.layers.base import Cost
from hybrid.models.spec import ModelSpec
from hybrid.plan.plan import Plan, make_plan
from hybrid.plan.roofline import part_costs, step_cost

# What this runtime has reached of the limit (`bench/results/README.md`), by the format of the weights. Prompts of 512
# tokens: a share of it.
PROMPT_SHARES = {"bf16": 0.87, "int8": 0.69, "int4": 0.57, "fp8": 0.8, "fp8_row": 0.8, "mxfp4": 0.8, "nvfp4": 0.7}
AMX_PROMPT_SHARES = {"bf16": 0.78, "int8": 0.42, "int4": 0.17, "fp8": 0.6, "fp8_row": 0.6, "mxfp4": 0.5, "nvfp4": 0.2}
# One token: a row multiplies at a part of the peak, so many times slower, and partly while others are read.
ONE_ROW = {"bf16": 6.0, "int8": 7.1, "int4": 6.0, "fp8": 6.0, "fp8_row": 6.0, "mxfp4": 2.0, "nvfp4": 2.0}
# What that came to of the limit where the operations of a machine are not known, and with AMX, whose peak one row never
# comes near.
DECODE_SHARES = {"bf16": 0.95, "int8": 0.88, "int4": 0.75, "fp8": 0.85, "fp8_row": 0.85, "mxfp4": 0.8, "nvfp4": 0.8}
_GROUPED = "int4"  # what codes in groups count as, which were not measured apart
PROMPT_ROWS = 512  # of a step that reads a prompt

Parts = tuple[tuple[tuple[str, ...], Cost], ...]  # of a step: the formats of their weights, and what they cost


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
    decode_limit: float
    decode_speed: float
    prompt_limit: float | None
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

    def room(self, memory: int) -> int:
        """Tokens of the longest sequence that `memory` bytes hold, 0 if not even a block of keys."""
        tokens = (memory - self.plan.fixed_bytes) // max(1, self.plan.kv.token_bytes) // KEY_BLOCK * KEY_BLOCK
        return max(0, min(tokens, self.plan.max_seq_len))

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
            "decode": {
                "tokens_per_second": self.decode_speed,
                "limit_tokens_per_second": self.decode_limit,
                **asdict(self.decode),
            },
            "prompt": {
                "tokens_per_second": self.prompt_speed,
                "limit_tokens_per_second": self.prompt_limit,
                "rows": PROMPT_ROWS,
                **asdict(self.prompt),
            },
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
    plan, without_gpu = _plan(spec, hardware, config, mix, rates)
    decode = tuple(part_costs(spec, mix, plan.kv.format, 1, 1, depth, 1))
    prompt = tuple(part_costs(spec, mix, plan.kv.format, 1, PROMPT_ROWS, depth, 0))
    token, rows = (sum((cost for _, cost in parts), Cost()) for parts in (decode, prompt))
    amx, known = hardware.isa == "amx", rates.flops > 0
    overlapping = _overlapping(decode, rates, DECODE_SHARES)
    return Fit(
        name=name,
        mix=mix,
        plan=plan,
        decode=token,
        prompt=rows,
        decode_limit=1 / rates.seconds(token),
        decode_speed=1 / (_of_one_row(decode, rates) if known and not amx else overlapping),
        prompt_limit=PROMPT_ROWS / rates.seconds(rows) if known else None,
        prompt_speed=PROMPT_ROWS / _overlapping(prompt, rates, AMX_PROMPT_SHARES if amx else PROMPT_SHARES)
        if known
        else None,
        without_gpu=without_gpu,
    )


def longest(fits: Sequence[Fit]) -> Fit | None:
    """The first of those with the longest context; None of none."""
    return max(fits, key=lambda found: found.plan.max_seq_len, default=None)


def _plan(
    spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig, mix: FormatMix, rates: Rates
) -> tuple[Plan, str]:
    """The plan, and why it is one without the GPU that `config` asks for."""
    try:
        return make_plan(spec, hardware, config, mix, rates), ""
    except ConfigError as error:
        if config.device != "cuda":
            raise
        return make_plan(spec, hardware, replace(config, device="cpu"), mix, rates), str(error)


def _overlapping(parts: Parts, rates: Rates, shares: Mapping[str, float]) -> float:
    """Predicted seconds of a step that reads while it multiplies."""
    seconds = 0.0
    for formats, cost in parts:
        weights, floats = _of_slowest(shares, formats, min)
        seconds += Rates(rates.read * weights, rates.flops * floats, rates.int_ops * weights).seconds(cost)
    return seconds


def _of_one_row(parts: Parts, rates: Rates) -> float:
    """Predicted seconds of a step of one row."""
    seconds = 0.0
    for formats, cost in parts:
        weights, floats = _of_slowest(ONE_ROW, formats, max)
        multiplying = floats * cost.flops / rates.flops
        multiplying += weights * cost.int_ops / rates.int_ops if cost.int_ops else 0.0
        seconds += hypot(cost.bytes / rates.read, multiplying)
    return seconds


def _of_slowest(
    table: Mapping[str, float], formats: tuple[str, ...], slowest: Callable[..., str]
) -> tuple[float, float]:
    """What a table has for the slowest of a part's formats, and for its floats: beside weights that multiply integers,
    they are attention's, which is bf16.
    """
    name = slowest(formats, key=lambda format: table.get(format, table[_GROUPED]), default="bf16")
    found = table.get(name, table[_GROUPED])
    return found, table["bf16"] if FORMATS[name].integer else found


def parameters(spec: ModelSpec) -> tuple[int, int]:
    """How many a model has, and how many of them a token multiplies with: what it does with states counts with these,
    in dense models as far as there are more.
    """
    apart = all(spec.layers[layer].feed_forward.names.experts.up for layer in spec.moe_layers)
    total = sum(prod(shape) for _, shape in spec.checkpoint_shapes("apart" if apart else "fused"))
    used = step_cost(spec, FormatMix.uniform("bf16"), "bf16", 1, 1, 0, 1).flops / 2
    return total, min(int(used), total)
