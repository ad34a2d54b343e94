"""A plan for people: what `--dry-run` prints."""

from __future__ import annotations

from hybrid.machine.hardware import has_huge_pages, ranges_text
from hybrid.machine.memory import size_text
from hybrid.machine.numa import node_threads
from hybrid.plan.expert_cache import CachePlan
from hybrid.plan.plan import RUNTIME_BYTES, Plan

_LOADS = {"map": "mapped from the store's files", "copy": "copied"}


def plan_text(plan: Plan) -> str:
    """Memory by part, then the ops of a layer."""
    return "\n".join([*_memory_lines(plan), "", *_op_lines(plan)])


def summary_text(plan: Plan) -> str:
    """Memory by part alone."""
    return "\n".join(_memory_lines(plan))


def _memory_lines(plan: Plan) -> list[str]:
    rows = [(f"weights: {part}", size) for part, size in plan.weight_bytes.items()]
    if plan.device and plan.device.stand_in_bytes:
        rows.append(("what stands in for the memory of a device", plan.device.stand_in_bytes))
    rows += [
        ("arena (shared by all layers)", plan.arena_bytes + sum(plan.node_arena_bytes)),
        (f"scratch ({plan.threads} threads)", plan.scratch_bytes * plan.threads),
        ("logits", plan.logits_bytes),
        *_slot_rows(plan.cache),
        ("runtime", RUNTIME_BYTES),
        ("total before the first token", plan.fixed_bytes),
        (f"KV of one sequence of {plan.max_seq_len} tokens", plan.max_seq_len * plan.kv.token_bytes),
        (f"KV reserved for {plan.sequences} sequences (address space)", plan.sequences * plan.kv.sequence_stride),
        (_free_text(plan), plan.memory_available),
    ]
    verdict = plan.problem or f"fits: room for {plan.kv_token_budget} tokens of KV over {plan.sequences} sequences"
    return [
        f"plan for {plan.model_type}: {plan.isa}, {plan.threads} threads"
        + (f" on processors {_places_text(plan)}" if plan.cpus else ", on any processor")
        + f", device {plan.device_name}, steps of up to {plan.max_rows} rows",
        *(f"limit: {limit}" for limit in plan.limits),
        f"formats: {plan.format_text}; keys and values {plan.kv.format}"
        + ("" if plan.batch_invariant else "; results may depend on what else runs in a step"),
        f"memory: {_nodes_text(plan)}; weights {_LOADS[plan.load]}; huge pages {_huge_text(plan)}",
        *([f"chunk: {plan.chunk_note}"] if plan.chunk_note else []),
        *([f"expert cache: {plan.cache}"] if plan.cache else []),
        *([f"routes: those of {plan.route_trace}, not of the model's routers"] if plan.route_trace else []),
        "",
        *_size_lines(rows),
        *(["", "memory of the device:", *_size_lines(plan.device.rows())] if plan.device else []),
        "",
        f"  {verdict}",
    ]


def _size_lines(rows: list[tuple[str, int]]) -> list[str]:
    return [f"  {name:<52}{size_text(size):>12}" for name, size in rows]


def _slot_rows(cache: CachePlan | None) -> list[tuple[str, int]]:
    return [("expert cache (slots of the simulated device)", cache.host_bytes)] if cache and cache.host_bytes else []


def _places_text(plan: Plan) -> str:
    """Of each node: "0-3,8 and 4-7"."""
    return " and ".join(dict.fromkeys(ranges_text(cpus) for cpus in plan.cpus))


def _free_text(plan: Plan) -> str:
    if plan.memory_share == 1:
        return "memory free"
    whose = ", mapped weights are common" if plan.load == "map" else ""
    return f"memory free for each of {plan.memory_share}{whose}"


def _nodes_text(plan: Plan) -> str:
    if plan.nodes == 1:
        return plan.numa_note or "one node"
    real = [str(id) for id in plan.node_ids if id >= 0]
    return f"{plan.nodes} nodes, {'numbers ' + ', '.join(real) if real else 'simulated'}"


def _huge_text(plan: Plan) -> str:
    """What is requested; what the system grants is only known after allocation."""
    wanted = [*["weights"] * (plan.load == "copy"), "buffers", "long keys and values"]
    asked = f"for {', '.join(wanted)}" if has_huge_pages(plan.huge_pages) else "cannot be had"
    return f"{asked} (system: {plan.huge_pages})"


def _op_lines(plan: Plan) -> list[str]:
    """The ops of the first layer and those outside, with each thread's share."""
    ops = plan.device_ops or plan.ops
    shown = [op for op in ops if op.layer in (None, 0)]
    layers = len(plan.kv.layers)
    lines = [f"  {len(ops)} ops a step; those of layer 0 (of {layers}) and around the layers:"]
    for op in shown:
        units, what = op.split
        node = op.arguments.get("node", -1)
        threads = plan.threads if node < 0 else node_threads(plan.threads, plan.nodes, node)
        share = f"{units} {what}, {-(-units // threads)} a thread" if units > 1 else f"shared by {what}"
        place = f", node {node}" if node >= 0 else ""
        lines.append(f"    {op.kind:<12}{op.part:<11}{share if units != 1 else 'one thread'}{place}")
    return lines
