"""The plan: what a model needs on a machine, computed from (spec, hardware, config) before a byte is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cpu_kernels import KEY_BLOCK
from hybrid.config import EngineConfig, check_config
from hybrid.errors import CapacityError, ConfigError
from hybrid.formats.block import round_up
from hybrid.formats.mix import FormatMix
from hybrid.machine.hardware import HardwareSpec
from hybrid.machine.memory import size_text
from hybrid.machine.numa import NodeChoice, choose_nodes
from hybrid.machine.rates import Rates
from hybrid.models.layers.base import Extents
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import PARTS
from hybrid.ops import Op
from hybrid.plan.chunk import Chunk, fastest_chunk
from hybrid.plan.expert_cache import CachePlan, plan_cache, require_kernels
from hybrid.plan.expert_shape import ExpertShape, expert_shape
from hybrid.plan.gpu_memory import DeviceMemory, plan_device
from hybrid.plan.kv_layout import KvPlan, lay_out_kv
from hybrid.plan.passes.gpu_step import device_step_buffers, device_step_ops
from hybrid.plan.passes.keep_use import keep_use, use_buffers
from hybrid.plan.passes.place_experts import observe_routes, place_experts, placement_buffers, take_routes
from hybrid.plan.passes.split_nodes import split_over_nodes
from hybrid.plan.program import build_buffers, build_ops
from hybrid.plan.scratch import scratch_bytes
from hybrid.weights.split import Parts, held_bytes

DEFAULT_SEQ_LEN = 32768  # KV costs only what is used, so the default is generous
RUNTIME_BYTES = 300 << 20  # the interpreter, the tokenizer and the code
BUFFER_SHARE = 8  # of what is left for keys and values, the part that buffers of a larger chunk may take
MIN_FREE = 256 << 20  # bytes that are left to others
ALIGN = 64


@dataclass(frozen=True)
class Plan:
    """Everything the engine needs to allocate and run; `plan.text.plan_text` is what `--dry-run` prints.

    device_name: of EngineConfig, without "auto". memory_limit: the file that limits `memory_available`, or ""; limits:
    what the system leaves of the machine, as HardwareSpec says it.
    node_ids: the system's numbers of the memory nodes, -1 for a simulated one and where there is no split; numa_note:
    why there is none, on a machine of several. load: "map" or "copy". huge_pages: who gets them on this system.
    cpus: for each node, the processors of its threads; none: all.
    parts: what each node holds of the weights. node_buffers: those of each node, as `buffers`, which all share.
    cache: where experts may be computed on a device, and placed_ops the ops of such a step; `ops` are those without.
    device: the memory of a device that computes all but the experts, and device_ops, device_placed_ops the same two
    lists for a step with it, by CUDA graphs if wanted.
    route_trace: whose experts rows take in place of those of the model's routers. speculate: whether tokens may be
    guessed. max_itl: seconds that a step with tokens of prompts should take beside texts that are produced, 0 for no
    limit, None for what is measured without. prefix_bytes: that kept prompts may take beyond the sequences;
    kv_idle_release: seconds without requests after which they are given up. prefix_dir: where they are
    kept between starts, in at most prefix_disk_bytes.
    """

    model_type: str
    isa: str
    threads: int
    cpus: tuple[tuple[int, ...], ...]
    node_ids: tuple[int, ...]
    numa_note: str
    load: str
    huge_pages: str
    max_seq_len: int
    sequences: int  # that run together
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
    kv: KvPlan
    kv_token_budget: int
    memory_available: int
    memory_limit: str
    limits: tuple[str, ...]
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
    speculate: bool = True
    max_itl: float | None = None
    prefix_bytes: int = 0
    kv_idle_release: float | None = None
    prefix_dir: Path | None = None
    prefix_disk_bytes: int = 0
    chunk_note: str = ""  # why a step has so many rows, where that was chosen
    memory_share: int = 1  # engines that share what is free

    @property
    def nodes(self) -> int:
        """Memory nodes that the work is split over; 1 is no split."""
        return len(self.node_ids)

    @property
    def processors(self) -> tuple[int, ...]:
        """Those among which the threads run, ascending; none: all."""
        return tuple(sorted({cpu for cpus in self.cpus for cpu in cpus}))

    @property
    def fixed_bytes(self) -> int:
        """All that is needed before the first token: weights, arena, scratch, logits, runtime."""
        arenas = self.arena_bytes + sum(self.node_arena_bytes)
        planned = arenas + self.scratch_bytes * self.threads + self.logits_bytes
        planned += self.cache.host_bytes if self.cache else 0
        planned += self.device.stand_in_bytes if self.device else 0
        planned += self.sequences * self.kv.fixed_bytes
        return sum(self.weight_bytes.values()) + planned + RUNTIME_BYTES

    @property
    def state_bytes(self) -> int:
        """What is left for keys and values, of sequences and of kept prompts."""
        return max(0, self.memory_available - self.fixed_bytes)

    @property
    def min_free_bytes(self) -> int:
        """What should be free while this runs. The pages of mapped weights count as free, and are not to be lost."""
        return MIN_FREE + (sum(self.weight_bytes.values()) if self.load == "map" else 0)

    @property
    def problem(self) -> str | None:
        """Why this plan cannot run, in one line, or None if it fits."""
        needed = self.fixed_bytes + self.max_seq_len * self.kv.token_bytes
        if self.kv_token_budget >= self.max_seq_len:
            return None
        limit = f" within the limit that {self.memory_limit} sets" if self.memory_limit else ""
        return (
            f"the model does not fit in memory: {size_text(self.fixed_bytes)} for weights and buffers and "
            f"{size_text(needed - self.fixed_bytes)} for {self.max_seq_len} tokens make {size_text(needed)}, "
            f"{size_text(self.memory_available)} are free{limit}; use a smaller model or --max-seq-len, "
            f"or {'raise that limit' if limit else 'free memory'}"
        )

    @property
    def format_text(self) -> str:
        """'experts int4, attention int8, head int8': the format of every part that the model has."""
        absent = {"experts", "shared", "dense"} - set(self.weight_bytes)
        text = ", ".join(f"{part} {name}" for part, name in self.formats.parts().items() if part not in absent)
        return f"{text}; some layers differ" if self.formats.layers else text

    def require_fit(self) -> None:
        """Raise CapacityError with the numbers if the plan does not fit."""
        if self.problem:
            raise CapacityError(self.problem)

    def to_dict(self) -> dict[str, Any]:
        """The plan for `--json`: numbers without the op list."""
        fields = asdict(self)
        for name in ("ops", "placed_ops", "device_ops", "device_placed_ops", "kv", "buffers", "node_buffers", "parts"):
            del fields[name]
        fields["formats"] = self.formats.to_dict()
        fields["cache"] = self.cache.to_dict() if self.cache else None
        fields["prefix_dir"] = str(self.prefix_dir) if self.prefix_dir else None
        fields["route_trace"] = str(self.route_trace) if self.route_trace else None
        kv = {"kv_format": self.kv.format, "kv_token_bytes": self.kv.token_bytes}
        return fields | kv | {"nodes": self.nodes, "ops": len(self.ops), "problem": self.problem}


def make_plan(
    spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig, mix: FormatMix, rates: Rates | None = None
) -> Plan:
    """Pure: nothing is allocated or read. Raises ConfigError for values and model parts that cannot be run.

    mix: what `config.weight_format` means for this model, by `hybrid.formats.mix.parse_mix`. rates: of the machine, by
    which `--chunk-size auto` is chosen.
    A plan that does not fit in memory is returned with `problem` set, so that it can still be printed.
    """
    check_config(config)
    if config.max_seq_len and config.max_seq_len > spec.max_position:
        raise ConfigError(f"--max-seq-len {config.max_seq_len} is above the model's {spec.max_position} positions")
    threads = config.threads or hardware.default_threads
    nodes = choose_nodes(hardware, config, threads)
    wanted = config.max_seq_len or min(spec.max_position, DEFAULT_SEQ_LEN)

    def sized(rows: int) -> Plan:
        """With the context that is wanted, or where none was asked for with as much of it as fits."""
        size = partial(_sized, spec, hardware, config, mix, threads, nodes)
        plan = size(Extents(rows, config.max_batch, wanted))
        if config.max_seq_len is None and KEY_BLOCK <= plan.kv_token_budget < wanted:
            plan = size(Extents(rows, config.max_batch, plan.kv_token_budget))
        return plan

    plan = sized(config.least_chunk)
    if config.chunk_size != "auto":
        return plan
    return _with_chunk(plan, sized, _chunk(plan, spec, config, rates))


def _chunk(plan: Plan, spec: ModelSpec, config: EngineConfig, rates: Rates | None) -> Chunk:
    """How many rows a step should have, whatever memory they take."""
    if config.cached or config.step_device:
        return Chunk(plan.max_rows, "more are not chosen beside a device")
    return fastest_chunk(spec, plan.formats, plan.kv.format, rates, plan.max_rows, plan.max_seq_len)


def _with_chunk(plan: Plan, sized: Callable[[int], Plan], chunk: Chunk) -> Plan:
    """The plan with the chunk, or with the largest half of it whose buffers leave most memory to keys and values.

    plan: with the fewest rows. sized: the plan with so many.
    """
    rows, why, found = chunk.rows, chunk.why, plan
    while rows > plan.max_rows:
        found = sized(rows)
        if found.fixed_bytes - plan.fixed_bytes <= plan.state_bytes // BUFFER_SHARE and not found.problem:
            break
        rows, why, found = max(rows // 2, plan.max_rows), "more would take too much memory", plan
    return replace(found, chunk_note=f"{rows} tokens: {why}")


def _sized(
    spec: ModelSpec,
    hardware: HardwareSpec,
    config: EngineConfig,
    mix: FormatMix,
    threads: int,
    nodes: NodeChoice,
    extents: Extents,
) -> Plan:
    length, spec = extents.tokens, spec.within(extents.tokens)
    tensors = {tensor.name: tensor for tensor in spec.store_tensors(mix)}
    sizes = build_buffers(spec, mix, extents) | use_buffers(spec)
    shape, next_gate = expert_shape(spec, tensors) if config.cached else None, config.cache.prefetch == "next-gate"
    if shape:
        sizes |= placement_buffers(extents.rows, shape.top_k, spec, mix, next_gate)
    if config.step_device:
        sizes |= device_step_buffers(spec, mix, extents)
    step = split_over_nodes(build_ops(spec, mix), tensors, sizes, len(nodes.ids))
    buffers, arena_bytes = lay_out(step.sizes)
    own = [lay_out(sizes) for sizes in step.node_sizes]
    kv = lay_out_kv(spec, length, config.kv_format)
    driven = take_routes if config.route_trace else tuple
    plan = Plan(
        model_type=spec.model_type,
        threads=threads,
        cpus=nodes.cpus,
        node_ids=nodes.ids,
        numa_note=nodes.note,
        load=("map" if len(nodes.ids) == 1 else "copy") if config.load == "auto" else config.load,
        max_seq_len=length,
        sequences=extents.sequences,
        max_rows=extents.rows,
        buffers=buffers,
        arena_bytes=arena_bytes,
        node_buffers=tuple(buffers for buffers, _ in own),
        node_arena_bytes=tuple(size for _, size in own),
        scratch_bytes=scratch_bytes(step.ops, extents.rows, hardware.isa, kv),
        logits_bytes=extents.sequences * spec.vocab * 4,
        formats=mix,
        weight_bytes=weight_bytes(spec, mix, step.parts),
        batch_invariant=hardware.isa != "amx" if config.batch_invariant is None else config.batch_invariant,
        kv=kv,
        kv_token_budget=0,
        parts=step.parts,
        ops=tuple(keep_use(driven(observe_routes(step.ops) if config.routes else step.ops), spec)),
        placed_ops=tuple(place_experts(driven(step.ops), next_gate)) if shape else (),
        **_of_machine(hardware),
        **_as_configured(config),
    )
    plan = replace(plan, memory_available=_own_memory(plan))
    if config.step_device:
        plan = _with_device(plan, spec, hardware, config, config.step_device)
    if shape:
        plan = _with_cache(plan, shape, config, _device_memory(hardware, config))
    budget = min(extents.sequences * length, plan.state_bytes // max(1, kv.token_bytes))
    return replace(plan, kv_token_budget=budget, prefix_bytes=_prefix_bytes(plan, config))


def _of_machine(hardware: HardwareSpec) -> dict[str, Any]:
    """Fields of the plan that the machine alone decides."""
    return {
        "isa": hardware.isa,
        "huge_pages": hardware.huge_pages,
        "memory_available": hardware.memory_available,
        "memory_limit": hardware.memory_limit.file if hardware.memory_limit else "",
        "limits": hardware.limits,
    }


def _as_configured(config: EngineConfig) -> dict[str, Any]:
    """Fields of the plan that the configuration alone decides."""
    return {
        "device_name": "cpu" if config.device == "auto" else config.device,
        "route_trace": config.route_trace,
        "speculate": config.speculate,
        "max_itl": None if config.max_itl_ms is None else config.max_itl_ms / 1000,
        "kv_idle_release": config.kv_idle_release,
        "prefix_dir": config.prefix_dir,
        "prefix_disk_bytes": int(config.prefix_disk_gb * 1e9),
        "memory_share": config.memory_share,
    }


def _own_memory(plan: Plan) -> int:
    """Of the free memory what one of several engines may use; weights that all of them map are there once."""
    common = min(plan.memory_available, sum(plan.weight_bytes.values()) if plan.load == "map" else 0)
    return common + (plan.memory_available - common) // plan.memory_share


def _prefix_bytes(plan: Plan, config: EngineConfig) -> int:
    """By default half of what is left: the other half is for running requests alone."""
    wanted, left = config.prefix_memory_gb, plan.state_bytes
    if wanted is None:
        return left // 2
    if wanted * 1e9 > left:
        raise ConfigError(
            f"--prefix-memory-gb {wanted:g} is more than the {size_text(left)} that weights and buffers leave; lower "
            "it, or leave it out for half of that"
        )
    return int(wanted * 1e9)


def _with_device(plan: Plan, spec: ModelSpec, hardware: HardwareSpec, config: EngineConfig, name: str) -> Plan:
    """name: torch's, of the device."""
    if plan.nodes > 1:
        raise ConfigError(f"a step on a GPU cannot be had with {plan.nodes} memory nodes; use --numa off")
    if plan.formats.layers or any(len(set(name.split("/"))) > 1 for name in plan.formats.parts().values()):
        raise ConfigError(
            f"a step on a GPU cannot be had with matrices of several formats in a part ({plan.format_text:.80}); use "
            "--device cpu, or one format for each part, as --format auto,attention=bf16 or --format int4"
        )
    extents = Extents(plan.max_rows, plan.sequences, plan.max_seq_len)
    free = _device_memory(hardware, config)
    memory = plan_device(spec, plan.formats, free, extents, config.gpu_kv_tokens, name)
    plain, placed = (tuple(device_step_ops(spec, ops)) if ops else () for ops in (plan.ops, plan.placed_ops))
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
    require_kernels(plan.formats.experts, config.device, plan.placed_ops)
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


def weight_bytes(spec: ModelSpec, mix: FormatMix, parts: Parts) -> dict[str, int]:
    """Bytes of the weights by part of the model, as they lie in memory. parts: what each node holds of them."""
    sizes = dict.fromkeys(PARTS, 0)
    for tensor in spec.store_tensors(mix):
        sizes[tensor.part] += held_bytes(tensor, parts)
    return {part: size for part, size in sizes.items() if size}
