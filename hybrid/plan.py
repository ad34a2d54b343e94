"""The plan: what a model needs on a machine, computed from (spec, hardware, config) before a byte is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cpu_kernels import KEY_BLOCK, TILE_ROWS
from hybrid.config import EngineConfig, check_config
from hybrid.errors import CapacityError, ConfigError
from hybrid.hardware import HardwareSpec
from hybrid.models.rope import inverse_frequencies
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.program import STATE_EXTRA, Op, build_buffers, build_ops, key_dim, ropes, value_dim
from hybrid.weights.layout import round_up, store_tensors

DEFAULT_SEQ_LEN = 32768  # KV costs only what is used, so the default is generous
RUNTIME_BYTES = 300 << 20  # the interpreter, the tokenizer and the code
ALIGN = 64


@dataclass(frozen=True)
class KvGeometry:
    """Where keys and values lie: [slot][layer][kv head][keys | values], every run contiguous for `tokens` tokens."""

    tokens: int
    layer_offsets: tuple[int, ...]  # bytes from the start of a slot
    head_strides: tuple[int, ...]
    value_offsets: tuple[int, ...]  # bytes from the start of a head
    slot_stride: int

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers."""
        return self.slot_stride // self.tokens


@dataclass(frozen=True)
class Plan:
    """Everything the engine needs to allocate and run; `str()` is what `--dry-run` prints."""

    model_type: str
    isa: str
    threads: int
    cpus: tuple[int, ...]
    max_seq_len: int
    slots: int
    max_rows: int
    buffers: dict[str, tuple[int, int]]  # name: (offset, bytes)
    arena_bytes: int
    scratch_bytes: int  # per thread
    logits_bytes: int
    weight_bytes: dict[str, int]  # by part
    kv: KvGeometry
    kv_token_budget: int
    memory_available: int
    ops: tuple[Op, ...]

    @property
    def fixed_bytes(self) -> int:
        """All that is needed before the first token: weights, arena, scratch, logits, runtime."""
        planned = self.arena_bytes + self.scratch_bytes * self.threads + self.logits_bytes
        return sum(self.weight_bytes.values()) + planned + RUNTIME_BYTES

    @property
    def problem(self) -> str | None:
        """Why this plan cannot run, in one line, or None if it fits."""
        needed = self.fixed_bytes + self.max_seq_len * self.kv.token_bytes
        if self.kv_token_budget >= self.max_seq_len:
            return None
        return (
            f"the model does not fit in memory: {_gb(self.fixed_bytes)} for weights and buffers and "
            f"{_gb(needed - self.fixed_bytes)} for {self.max_seq_len} tokens make {_gb(needed)}, "
            f"{_gb(self.memory_available)} are free; use a smaller model or --max-seq-len, or free memory"
        )

    def require_fit(self) -> None:
        """Raise CapacityError with the numbers if the plan does not fit."""
        if self.problem:
            raise CapacityError(self.problem)

    def to_dict(self) -> dict[str, Any]:
        """The plan for `--json`: numbers without the op list."""
        fields = asdict(self)
        del fields["ops"], fields["kv"], fields["buffers"]
        return fields | {"kv_token_bytes": self.kv.token_bytes, "ops": len(self.ops), "problem": self.problem}

    def __str__(self) -> str:
        return "\n".join([*_memory_lines(self), "", *_op_lines(self)])


def make_plan(spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig) -> Plan:
    """Pure: nothing is allocated or read. Raises ConfigError for values and model parts that cannot be run.

    A plan that does not fit in memory is returned with `problem` set, so that it can still be printed.
    """
    check_config(config)
    check_supported(spec)
    if config.max_seq_len and config.max_seq_len > spec.max_position:
        raise ConfigError(f"--max-seq-len {config.max_seq_len} is above the model's {spec.max_position} positions")
    threads = config.threads or hardware.default_threads
    wanted = config.max_seq_len or min(spec.max_position, DEFAULT_SEQ_LEN)
    plan = _sized(spec, hardware, config, threads, wanted)
    if config.max_seq_len is None and KEY_BLOCK <= plan.kv_token_budget < wanted:
        plan = _sized(spec, hardware, config, threads, plan.kv_token_budget)
    return plan


def _sized(spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig, threads: int, length: int) -> Plan:
    rows, slots = config.chunk_size, config.max_batch
    buffers, arena_bytes = _lay_out(build_buffers(spec, rows, slots, length))
    factors = [inverse_frequencies(rope)[1] for rope in ropes(spec)]
    kv = kv_geometry(spec, length)
    plan = Plan(
        model_type=spec.model_type,
        isa=hardware.isa,
        threads=threads,
        cpus=hardware.cpus[:threads] if threads <= len(hardware.cpus) else (),
        max_seq_len=length,
        slots=slots,
        max_rows=rows,
        buffers=buffers,
        arena_bytes=arena_bytes,
        scratch_bytes=scratch_bytes(spec, rows),
        logits_bytes=slots * spec.vocab * 4,
        weight_bytes=weight_bytes(spec),
        kv=kv,
        kv_token_budget=0,
        memory_available=hardware.memory_available,
        ops=tuple(build_ops(spec, factors)),
    )
    budget = max(0, hardware.memory_available - plan.fixed_bytes) // kv.token_bytes
    return Plan(**{**plan.__dict__, "kv_token_budget": min(slots * length, budget)})


def _lay_out(sizes: dict[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    """Buffers one after the other, aligned; with the total."""
    buffers, offset = {}, 0
    for name, size in sizes.items():
        buffers[name] = (offset, size)
        offset += round_up(size, ALIGN)
    return buffers, offset


def kv_geometry(spec: ModelSpec, length: int) -> KvGeometry:
    tokens = round_up(length, KEY_BLOCK)
    keys = [tokens * key_dim(layer) * 2 for layer in spec.layers]
    strides = [k + tokens * value_dim(layer) * 2 for k, layer in zip(keys, spec.layers, strict=True)]
    offsets, total = [], 0
    for stride, layer in zip(strides, spec.layers, strict=True):
        offsets.append(total)
        total += stride * layer.attention.kv_heads
    return KvGeometry(tokens, tuple(offsets), tuple(strides), tuple(keys), total)


def scratch_bytes(spec: ModelSpec, rows: int) -> int:
    """Per thread: a panel's unfinished sums (64 columns), or an attention tile's scores, weights and two states."""

    def tile(layer: LayerSpec) -> int:
        heads = max(TILE_ROWS, layer.attention.heads // layer.attention.kv_heads)
        return heads * (KEY_BLOCK * 6 + (value_dim(layer) + STATE_EXTRA) * 8)

    return round_up(max(rows * 64 * 4, *map(tile, spec.layers)), 4096)


def weight_bytes(spec: ModelSpec) -> dict[str, int]:
    """Bytes of the packed store by part."""
    parts = {"experts": 0, "attention": 0, "router": 0, "norms": 0, "embedding": 0, "head": 0}
    for tensor in store_tensors(spec):
        name = tensor.name.rsplit(".", 1)[-1]
        part = "norms" if "norm" in name else "attention" if ".attention." in tensor.name else name
        parts[part] += tensor.nbytes
    return {part: size for part, size in parts.items() if size}


def check_supported(spec: ModelSpec) -> None:
    """Raise ConfigError naming the first part of the model that no kernel implements."""
    for layer in spec.layers:
        attention, ffn = layer.attention, layer.feed_forward
        checks = {
            f"attention of kind {attention.kind!r}": attention.kind == "gqa" and attention.mla is None,
            "values of another size than keys": attention.v_head_dim in (None, attention.head_dim),
            f"norm {attention.qk_norm!r} on queries and keys": attention.qk_norm in ("none", "head"),
            "attention sinks": not attention.sinks,
            "gated attention": not attention.output_gate,
            f"activation {ffn.activation!r}": ffn.activation == "silu",
            "biases in the feed-forward": not ffn.bias,
            "shared experts": not ffn.shared_intermediate,
            f"norm of kind {spec.norm.kind!r}": spec.norm.kind == "rms" and not spec.norm.zero_centred,
            "a bias on the output head": not spec.head_bias,
        }
        if ffn.router:
            plain = not (ffn.router.bias or ffn.router.correction_bias) and ffn.router.groups == 1
            checks[f"router of kind {ffn.router.kind!r}"] = plain and ffn.router.kind in (
                "softmax",
                "topk_softmax",
            )
        for what, supported in checks.items():
            if not supported:
                raise ConfigError(f"model_type {spec.model_type!r} uses {what}, which this version cannot run")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _memory_lines(plan: Plan) -> list[str]:
    rows = [(f"weights: {part}", size) for part, size in plan.weight_bytes.items()]
    rows += [
        ("arena (shared by all layers)", plan.arena_bytes),
        (f"scratch ({plan.threads} threads)", plan.scratch_bytes * plan.threads),
        ("logits", plan.logits_bytes),
        ("runtime", RUNTIME_BYTES),
        ("total before the first token", plan.fixed_bytes),
        (f"KV of one sequence of {plan.max_seq_len} tokens", plan.max_seq_len * plan.kv.token_bytes),
        (f"KV reserved for {plan.slots} sequences (address space)", plan.slots * plan.kv.slot_stride),
        ("memory free", plan.memory_available),
    ]
    verdict = plan.problem or f"fits: room for {plan.kv_token_budget} tokens of KV over {plan.slots} sequences"
    return [
        f"plan for {plan.model_type}: {plan.isa}, {plan.threads} threads"
        + (f" on processors {', '.join(map(str, plan.cpus))}" if plan.cpus else ", not pinned")
        + f", steps of up to {plan.max_rows} rows",
        "",
        *(f"  {name:<52}{_gb(size):>12}" for name, size in rows),
        "",
        f"  {verdict}",
    ]


def _op_lines(plan: Plan) -> list[str]:
    """The ops of the first layer and those outside, with each thread's share."""
    shown = [op for op in plan.ops if op.layer in (None, 0)]
    layers = len(plan.kv.layer_offsets)
    lines = [f"  {len(plan.ops)} ops a step; those of layer 0 (of {layers}) and around the layers:"]
    for op in shown:
        units, what = op.split
        share = f"{units} {what}, {-(-units // plan.threads)} a thread" if units > 1 else f"shared by {what}"
        lines.append(f"    {op.kind:<12}{op.part:<11}{share if units != 1 else 'one thread'}")
    return lines
