"""The plan: what a model needs on a machine, computed from (spec, hardware, config) before a byte is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cpu_kernels import KEY_BLOCK, Format, KvLayout
from hybrid.cache_plan import CachePlan, plan_cache
from hybrid.config import EngineConfig, check_config
from hybrid.device_memory import DeviceMemory, StepSizes, plan_device
from hybrid.device_step import device_step_buffers, device_step_ops
from hybrid.errors import CapacityError, ConfigError
from hybrid.hardware import HardwareSpec
from hybrid.memory import size_text
from hybrid.models.rope import inverse_frequencies
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.nodes import NodeChoice, choose_nodes
from hybrid.ops import Op
from hybrid.partition import split_over_nodes
from hybrid.placement import ExpertShape, expert_shape, observe_routes, place_experts, placement_buffers, take_routes
from hybrid.program import build_buffers, build_ops, key_dim, ropes, value_dim
from hybrid.scratch import scratch_bytes
from hybrid.supported import check_supported
from hybrid.weights.layout import round_up, store_tensors
from hybrid.weights.mix import FormatMix
from hybrid.weights.split import Parts, held_bytes

DEFAULT_SEQ_LEN = 32768  # KV costs only what is used, so the default is generous
RUNTIME_BYTES = 300 << 20  # the interpreter, the tokenizer and the code
ALIGN = 64
_SCALE = 4  # bytes of the scale of a key or a value


@dataclass(frozen=True)
class KvGeometry:
    """Where keys and values lie: [slot][layer][kv head][keys | values], every run contiguous for `tokens` tokens.

    int8 and fp8 have a float32 scale for each token of a head: [keys | values | key scales | value scales].
    """

    format: str
    tokens: int
    layer_offsets: tuple[int, ...]  # bytes from the start of a slot
    head_strides: tuple[int, ...]
    value_offsets: tuple[int, ...]  # bytes from the start of a head
    key_scale_offsets: tuple[int, ...]  # the same; 0 where there are no scales
    value_scale_offsets: tuple[int, ...]
    slot_stride: int

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers."""
        return self.slot_stride // self.tokens


@dataclass(frozen=True)
class Plan:
    """Everything the engine needs to allocate and run; `str()` is what `--dry-run` prints.

    device_name: of EngineConfig, without "auto".
    node_ids: the system's numbers of the memory nodes, -1 for a simulated one and where there is no split; numa_note:
    why there is none, on a machine of several. load: "map" or "copy". huge_pages: who gets them on this system.
    parts: what each node holds of the weights. node_buffers: those of each node, as `buffers`, which all share.
    cache: where experts may be computed on a device, and placed_ops the ops of such a step; `ops` are those without.
    device: the memory of a device that computes all but the experts, and device_ops, device_placed_ops the same two
    lists for a step with it, by CUDA graphs if wanted.
    route_trace: whose experts rows take in place of those of the model's routers.
    """

    model_type: str
    isa: str
    threads: int
    cpus: tuple[int, ...]
    node_ids: tuple[int, ...]
    numa_note: str
    load: str
    huge_pages: str
    max_seq_len: int
    slots: int
    max_rows: int
    buffers: dict[str, tuple[int, int]]  # name: (offset, bytes)
    arena_bytes: int
    node_buffers: tuple[dict[str, tuple[int, int]], ...]
    node_arena_bytes: tuple[int, ...]
    scratch_bytes: int  # per thread
    logits_bytes: int
    formats: FormatMix
    weight_bytes: dict[str, int]  # by part
    batch_invariant: bool
    kv: KvGeometry
    kv_token_budget: int
    memory_available: int
    parts: Parts
    ops: tuple[Op, ...]
    placed_ops: tuple[Op, ...] = ()
    cache: CachePlan | None = None
    device_name: str = "cpu"
    device: DeviceMemory | None = None
    device_ops: tuple[Op, ...] = ()
    device_placed_ops: tuple[Op, ...] = ()
    cuda_graphs: bool = True
    route_trace: Path | None = None

    @property
    def nodes(self) -> int:
        """Memory nodes that the work is split over; 1 is no split."""
        return len(self.node_ids)

    @property
    def fixed_bytes(self) -> int:
        """All that is needed before the first token: weights, arena, scratch, logits, runtime."""
        arenas = self.arena_bytes + sum(self.node_arena_bytes)
        planned = arenas + self.scratch_bytes * self.threads + self.logits_bytes
        planned += self.cache.host_bytes if self.cache else 0
        planned += self.device.stand_in_bytes if self.device else 0
        return sum(self.weight_bytes.values()) + planned + RUNTIME_BYTES

    @property
    def problem(self) -> str | None:
        """Why this plan cannot run, in one line, or None if it fits."""
        needed = self.fixed_bytes + self.max_seq_len * self.kv.token_bytes
        if self.kv_token_budget >= self.max_seq_len:
            return None
        return (
            f"the model does not fit in memory: {size_text(self.fixed_bytes)} for weights and buffers and "
            f"{size_text(needed - self.fixed_bytes)} for {self.max_seq_len} tokens make {size_text(needed)}, "
            f"{size_text(self.memory_available)} are free; use a smaller model or --max-seq-len, or free memory"
        )

    @property
    def format_text(self) -> str:
        """'experts int4, attention int8, head int8': the format of every part that the model has."""
        absent = {"experts", "shared", "dense"} - set(self.weight_bytes)
        return ", ".join(f"{part} {format}" for part, format in asdict(self.formats).items() if part not in absent)

    def require_fit(self) -> None:
        """Raise CapacityError with the numbers if the plan does not fit."""
        if self.problem:
            raise CapacityError(self.problem)

    def to_dict(self) -> dict[str, Any]:
        """The plan for `--json`: numbers without the op list."""
        fields = asdict(self)
        for name in ("ops", "placed_ops", "device_ops", "device_placed_ops", "kv", "buffers", "node_buffers", "parts"):
            del fields[name]
        fields["cache"] = self.cache.to_dict() if self.cache else None
        fields["route_trace"] = str(self.route_trace) if self.route_trace else None
        kv = {"kv_format": self.kv.format, "kv_token_bytes": self.kv.token_bytes}
        return fields | kv | {"nodes": self.nodes, "ops": len(self.ops), "problem": self.problem}

    def __str__(self) -> str:
        from hybrid.plan_text import plan_text

        return plan_text(self)


def make_plan(spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig, mix: FormatMix) -> Plan:
    """Pure: nothing is allocated or read. Raises ConfigError for values and model parts that cannot be run.

    mix: what `config.weight_format` means for this model, by `hybrid.weights.mix.parse_mix`.
    A plan that does not fit in memory is returned with `problem` set, so that it can still be printed.
    """
    check_config(config)
    check_supported(spec)
    if config.max_seq_len and config.max_seq_len > spec.max_position:
        raise ConfigError(f"--max-seq-len {config.max_seq_len} is above the model's {spec.max_position} positions")
    threads = config.threads or hardware.default_threads
    nodes = choose_nodes(hardware, config, threads)
    wanted = config.max_seq_len or min(spec.max_position, DEFAULT_SEQ_LEN)
    plan = _sized(spec, hardware, config, mix, threads, nodes, wanted)
    if config.max_seq_len is None and KEY_BLOCK <= plan.kv_token_budget < wanted:
        plan = _sized(spec, hardware, config, mix, threads, nodes, plan.kv_token_budget)
    return plan


def _sized(
    spec: ModelSpec,
    hardware: HardwareSpec,
    config: EngineConfig,
    mix: FormatMix,
    threads: int,
    nodes: NodeChoice,
    length: int,
) -> Plan:
    rows, slots = config.chunk_size, config.max_batch
    factors = [inverse_frequencies(rope)[1] for rope in ropes(spec)]
    tensors = {tensor.name: tensor for tensor in store_tensors(spec, mix)}
    sizes = build_buffers(spec, mix, rows, slots, length)
    shape, next_gate = expert_shape(spec, tensors) if config.cached else None, config.cache.prefetch == "next-gate"
    if shape:
        sizes |= placement_buffers(rows, shape.top_k, spec, next_gate)
    if config.step_device:
        sizes |= device_step_buffers(spec, rows)
    step = split_over_nodes(build_ops(spec, mix, factors), tensors, sizes, len(nodes.ids))
    buffers, arena_bytes = lay_out(step.sizes)
    own = [lay_out(sizes) for sizes in step.node_sizes]
    kv = kv_geometry(spec, length, config.kv_format)
    driven = take_routes if config.route_trace else tuple
    invariant = hardware.isa != "amx" if config.batch_invariant is None else config.batch_invariant
    plan = Plan(
        model_type=spec.model_type,
        isa=hardware.isa,
        threads=threads,
        cpus=nodes.cpus,
        node_ids=nodes.ids,
        numa_note=nodes.note,
        load=("map" if len(nodes.ids) == 1 else "copy") if config.load == "auto" else config.load,
        huge_pages=hardware.huge_pages,
        max_seq_len=length,
        slots=slots,
        max_rows=rows,
        buffers=buffers,
        arena_bytes=arena_bytes,
        node_buffers=tuple(buffers for buffers, _ in own),
        node_arena_bytes=tuple(size for _, size in own),
        scratch_bytes=scratch_bytes(step.ops, rows, hardware.isa, partial(kv_layout, spec, kv)),
        logits_bytes=slots * spec.vocab * 4,
        formats=mix,
        weight_bytes=weight_bytes(spec, mix, step.parts),
        batch_invariant=invariant,
        kv=kv,
        kv_token_budget=0,
        memory_available=hardware.memory_available,
        parts=step.parts,
        ops=tuple(driven(observe_routes(step.ops) if config.routes else step.ops)),
        placed_ops=tuple(place_experts(driven(step.ops), next_gate)) if shape else (),
        device_name="cpu" if config.device == "auto" else config.device,
        route_trace=config.route_trace,
    )
    if config.step_device:
        plan = _with_device(plan, spec, hardware, config, config.step_device)
    if shape:
        plan = _with_cache(plan, shape, config, _device_memory(hardware, config))
    budget = max(0, hardware.memory_available - plan.fixed_bytes) // kv.token_bytes
    return replace(plan, kv_token_budget=min(slots * length, budget))


def _with_device(plan: Plan, spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig, name: str) -> Plan:
    """name: torch's, of the device."""
    if plan.nodes > 1:
        raise ConfigError(f"a step on a GPU cannot be had with {plan.nodes} memory nodes; use --numa off")
    sizes = StepSizes(plan.max_rows, plan.slots, plan.max_seq_len)
    free = _device_memory(hardware, config)
    memory = plan_device(spec, plan.formats, free, sizes, config.gpu_kv_tokens, name)
    plain, placed = (tuple(device_step_ops(ops)) if ops else () for ops in (plan.ops, plan.placed_ops))
    graphs = config.cuda_graphs
    return replace(plan, device=memory, device_ops=plain, device_placed_ops=placed, cuda_graphs=graphs)


def _device_memory(hardware: HardwareSpec, config: EngineConfig) -> int:
    return hardware.device_memory if config.device == "cuda" else int(config.simulated.memory_gb * 1e9)


def _with_cache(plan: Plan, shape: ExpertShape, config: EngineConfig, device_memory: int) -> Plan:
    """Slots get what is free beside everything else, and on the host beside the keys and values of one sequence."""
    if plan.nodes > 1:
        raise ConfigError(
            f"an expert cache cannot be had with {plan.nodes} memory nodes; use --numa off or --cache off"
        )
    free = plan.memory_available - plan.fixed_bytes - plan.max_seq_len * plan.kv.token_bytes
    cache = plan_cache(shape, config, free, plan.device.left if plan.device else device_memory)
    return replace(plan, cache=cache, device=plan.device and replace(plan.device, slots=cache.nbytes))


def lay_out(sizes: dict[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    """Buffers one after the other, aligned; with the total."""
    buffers, offset = {}, 0
    for name, size in sizes.items():
        buffers[name] = (offset, size)
        offset += round_up(size, ALIGN)
    return buffers, offset


def kv_head_bytes(layer: LayerSpec, format: str) -> int:
    """What one token takes for one KV head: its key and value, padded, and the scales of both if they need any."""
    dims = key_dim(layer) + value_dim(layer)
    return dims * 2 if format == "bf16" else dims + 2 * _SCALE


def kv_geometry(spec: ModelSpec, length: int, format: str) -> KvGeometry:
    tokens, size, scaled = round_up(length, KEY_BLOCK), 2 if format == "bf16" else 1, format != "bf16"
    offsets, total = [], 0
    for layer in spec.layers:
        offsets.append(total)
        total += tokens * layer.attention.kv_heads * kv_head_bytes(layer, format)
    strides = [tokens * kv_head_bytes(layer, format) for layer in spec.layers]
    return KvGeometry(
        format=format,
        tokens=tokens,
        layer_offsets=tuple(offsets),
        head_strides=tuple(strides),
        value_offsets=tuple(tokens * key_dim(layer) * size for layer in spec.layers),
        key_scale_offsets=tuple((stride - 2 * _SCALE * tokens) * scaled for stride in strides),
        value_scale_offsets=tuple((stride - _SCALE * tokens) * scaled for stride in strides),
        slot_stride=total,
    )


def kv_layout(spec: ModelSpec, kv: KvGeometry, layer: int, base: int = 0) -> KvLayout:
    """Where the kernels find the keys and values of a layer. base: address of the first sequence."""
    return KvLayout(
        base=base + kv.layer_offsets[layer],
        sequence_stride=kv.slot_stride,
        head_stride=kv.head_strides[layer],
        value_offset=kv.value_offsets[layer],
        key_dim=key_dim(spec.layers[layer]),
        value_dim=value_dim(spec.layers[layer]),
        format=getattr(Format, kv.format),
        key_scales_offset=kv.key_scale_offsets[layer],
        value_scales_offset=kv.value_scale_offsets[layer],
    )


def weight_bytes(spec: ModelSpec, mix: FormatMix, parts: Parts) -> dict[str, int]:
    """Bytes of the weights by part of the model, as they lie in memory. parts: what each node holds of them."""
    sizes = dict.fromkeys(("experts", "shared", "dense", "attention", "router", "norms", "embedding", "head"), 0)
    for tensor in store_tensors(spec, mix):
        sizes[_part(spec, tensor.name)] += held_bytes(tensor, parts)
    return {part: size for part, size in sizes.items() if size}


def _part(spec: ModelSpec, name: str) -> str:
    """Which part a tensor belongs to: 'layers.3.ffn.down_bias' to the experts, or to the dense layers."""
    *place, last = name.split(".")
    if "norm" in last:
        return "norms"
    if not place:
        return last
    if place[-1] == "attention":
        return "attention"
    if last == "shared":
        return "shared"
    if last.startswith("router"):
        return "router"
    return "experts" if spec.layers[int(place[1])].feed_forward.is_moe else "dense"
