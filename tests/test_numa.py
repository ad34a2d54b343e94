"""A model split over memory nodes: the plan says which, every node works on its own part, and tokens stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS
from rig import placed
from steps import greedy, in_chunks, open_engine, step
from test_plan import MACHINE, plan_of, spec_of

import cpu_kernels
from hybrid.config import MAX_NODES, EngineConfig, check_config
from hybrid.engine.engine import Engine
from hybrid.engine.kv import HUGE_BEHIND, KvArena
from hybrid.errors import CapacityError, ConfigError, StepCancelled
from hybrid.formats import FORMATS, GROUPED
from hybrid.formats.mix import MIXES, FormatMix
from hybrid.formats.rows import RowKind, row_bytes
from hybrid.machine.hardware import MemoryNode, has_huge_pages, probe
from hybrid.machine.memory import MemoryGrant, NodeMemory
from hybrid.machine.numa import choose_nodes, node_threads
from hybrid.models.layers.base import Extents
from hybrid.models.layers.products import rows_name
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import StoreTensor
from hybrid.ops import Buffer, Op, Weight
from hybrid.plan.passes.split_nodes import PARTIAL, split_over_nodes
from hybrid.plan.plan import Plan, make_plan
from hybrid.plan.program import build_buffers, build_ops
from hybrid.plan.resolve import plan_model
from hybrid.plan.text import plan_text
from hybrid.weights.copied import CopiedWeights, lay_out
from hybrid.weights.pack import cached_store

# 300 columns are three units of 64 or 128 inputs, but two of the 256 that share factors in q4_k.
CUT = [(text, nodes) for text in MIXES if text not in (*GROUPED, "fp8_row", "nvfp4") for nodes in (2, 3)]
CUT += [("q8_0", 3), ("q4_k", 2), ("nvfp4", 3)]
WIDE = {"moe_intermediate_size": 300, "intermediate_size": 320}  # what can be cut in three, at odd places
TWO = (MemoryNode(0, (0, 2)), MemoryNode(3, (4, 6)))


def choice(nodes: tuple[MemoryNode, ...], threads: int, **choices: Any):
    return choose_nodes(replace(MACHINE, nodes=nodes), EngineConfig(**choices), threads)


ALL, EACH = MACHINE.cpus, ((0, 2), (4, 6))


@pytest.mark.parametrize(
    ("nodes", "threads", "choices", "ids", "cpus", "note"),
    [
        (TWO, 4, {}, (0, 3), EACH, ""),
        (TWO, 2, {}, (0, 3), EACH, ""),
        (TWO, 3, {}, (0, 3), EACH, ""),
        (TWO, 4, {"numa": "2"}, (0, 3), EACH, ""),
        (TWO, 4, {"numa": "off"}, (-1,), (ALL,), ""),
        (TWO, 4, {"numa": "1"}, (-1,), (ALL,), ""),
        (TWO, 3, {"numa": "3"}, (-1,) * 3, (ALL,) * 3, ""),
        (TWO, 1, {}, (-1,), (ALL,), "1 threads are fewer"),
        (TWO, 4, {"load": "map"}, (-1,), (ALL,), "--load map keeps the weights in one piece"),
        (TWO, 6, {}, (-1,), (), "6 threads cannot be shared equally"),
        (TWO, 6, {"numa": "2"}, (-1, -1), (), ""),
        (TWO[:1], 4, {}, (-1,), (ALL,), ""),
        ((), 4, {}, (-1,), (ALL,), ""),
        ((), 2, {"numa": "2"}, (-1, -1), (ALL, ALL), ""),
    ],
)
def test_nodes_are_those_of_the_machine_or_simulated(nodes, threads, choices, ids, cpus, note) -> None:
    found = choice(nodes, threads, **choices)
    assert (found.ids, found.cpus) == (ids, cpus)
    assert note in found.note and bool(note) == bool(found.note)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"numa": "3", "threads": 2}, "--numa 3 is above the 2 threads.*at most 2"),
        ({"numa": "2", "load": "map"}, "--load map .* --numa 2 must split: use --load auto or copy"),
    ],
)
def test_nodes_that_cannot_be_had_are_refused(choices, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(**choices)


@pytest.mark.parametrize("numa", ["0", "17", "-1", "two", "", "1.5", "9" * 30, 2, None])
def test_a_number_of_nodes_must_be_one(numa) -> None:
    with pytest.raises(
        ConfigError, match="--numa .* is unknown; allowed: auto, off, or a number of nodes from 1 to 16"
    ):
        check_config(EngineConfig(numa=numa))


def test_ways_to_load_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--load 'lazy' is unknown; allowed: auto, map, copy"):
        plan_of(load="lazy")


def test_what_the_configuration_allows_is_what_the_kernels_join() -> None:
    assert MAX_NODES == cpu_kernels.MAX_NODES


@pytest.mark.parametrize(("threads", "nodes"), [(2, 2), (5, 2), (7, 3), (16, 16)])
def test_the_plan_cuts_threads_as_the_pool_does(threads, nodes) -> None:
    pool = cpu_kernels.ThreadPool(threads, [], nodes)
    of = [pool.node_of(thread) for thread in range(threads)]
    assert [node_threads(threads, nodes, node) for node in range(nodes)] == [of.count(node) for node in range(nodes)]


def with_biases(spec: ModelSpec) -> ModelSpec:
    layers = [replace(layer, feed_forward=replace(layer.feed_forward, bias=True)) for layer in spec.layers]
    return replace(spec, layers=tuple(layers))


def per_node(plan: Plan, kind: str) -> list[list[Op]]:
    """Ops of a kind that are split, the nodes of each together, in order."""
    ops = [op for op in plan.ops if op.kind == kind and "node" in op.arguments]
    return [ops[i : i + plan.nodes] for i in range(0, len(ops), plan.nodes)]


@pytest.mark.parametrize(("text", "nodes"), CUT)
def test_every_node_has_its_turn_and_all_parts_make_the_whole(text, nodes) -> None:
    """qwen3_moe has a dense layer as well; its head stands apart."""
    plan = plan_of(with_biases(spec_of(**WIDE)), weight_format=text, numa=str(nodes))
    for kind, count in {"gemm": 7, "gate_up": 3, "down": 3}.items():
        assert len(per_node(plan, kind)) == count
        for group in per_node(plan, kind):
            assert [op.arguments["node"] for op in group] == list(range(nodes))
    one = plan_of(with_biases(spec_of(**WIDE)), weight_format=text)
    for kind, argument in {"gemm": "columns", "gate_up": "blocks"}.items():
        sums = [sum(op.arguments[argument] for op in group) for group in per_node(plan, kind)]
        assert sums == [op.arguments[argument] for op in one.ops if op.kind == kind]


def test_the_sums_of_down_are_joined_at_once_and_the_first_node_adds_the_bias() -> None:
    plan = plan_of(with_biases(spec_of(**WIDE)), numa="2", weight_format="int8")
    kinds = [op.kind for op in plan.ops if op.layer == 0 and op.part in ("moe", "experts")]
    assert kinds[-7:] == ["gate_up"] * 2 + ["quantise"] * 2 + ["down"] * 2 + ["join"]
    for first, second in per_node(plan, "down"):
        assert first.arguments["bias"] and second.arguments["bias"] is None
        assert [op.arguments["output"] for op in (first, second)] == [Buffer(PARTIAL, node=node) for node in (0, 1)]
    for join in (op for op in plan.ops if op.kind == "join"):
        assert join.arguments["output"] == Buffer("residual") and join.arguments["width"] == 96
        assert join.arguments["partials"] == (Buffer(PARTIAL, node=0), Buffer(PARTIAL, node=1))


@pytest.mark.parametrize("text", ["bf16", "int8", "fp8", "q8_0"])
def test_buffers_of_a_node_are_as_large_as_its_part_needs(text) -> None:
    plan = plan_of(spec_of(**WIDE), numa="2", weight_format=text, chunk_size=64)
    kind = FORMATS[text].rows
    for node, width in enumerate((128, 176)):  # of 300 columns, in 19 blocks
        sizes = {name: size for name, (_, size) in plan.node_buffers[node].items()}
        assert sizes[PARTIAL] == plan.buffers["residual"][1]
        made = {name: size for name, size in sizes.items() if ".300." in name}
        kinds: set[RowKind] = {"bf16", kind}
        assert made == {f"{rows_name('activation', 300, k)}.{width}": 64 * 3 * row_bytes(width, k) for k in kinds}
        assert sum(sizes.values()) <= plan.node_arena_bytes[node] < sum(sizes.values()) + 64 * len(sizes)
    assert not [name for name in plan.buffers if name.startswith("activation")]


def test_what_is_too_small_or_used_twice_stays_whole() -> None:
    """40 intermediate columns are one unit; the table of a tied model with a bf16 head serves as both."""
    plan = plan_of(spec_of("llama", intermediate_size=40), numa="2")
    assert not per_node(plan, "gate_up") and not per_node(plan, "down")
    assert not [op for op in plan.ops if op.kind == "join"]
    head = plan.ops[-1]
    assert head.arguments["weight"] == Weight("embedding") and "node" not in head.arguments
    assert set(plan.parts) == {f"layers.{i}.attention.{name}" for i in range(2) for name in ("qkv", "out")}
    assert plan_of(spec_of("llama"), numa="2", weight_format="int8").ops[-1].arguments["first_column"] == 4 * 16


def test_experts_with_a_second_set_in_the_same_pass_stay_whole() -> None:
    spec, mix = spec_of(**WIDE), FormatMix.uniform("bf16")
    ops = build_ops(spec, mix)
    changed = [replace(op, arguments={**op.arguments, "more": 1}) if op.kind == "gate_up" else op for op in ops]
    tensors = {tensor.name: tensor for tensor in spec.store_tensors(mix)}
    sizes = build_buffers(spec, mix, Extents(8, 4, 256))
    step = split_over_nodes(changed, tensors, sizes, 2)
    assert [op for op in step.ops if op.kind != "gemm"] == [op for op in changed if op.kind != "gemm"]
    assert step.sizes == sizes and step.node_sizes == ({}, {})
    assert not [name for name in step.parts if "experts" in name]


def test_one_node_changes_nothing() -> None:
    assert plan_of(numa="1") == plan_of(numa="off") == plan_of()
    assert plan_of().nodes == 1 and plan_of().node_arena_bytes == ()


@pytest.mark.parametrize("text", MIXES)
def test_a_plan_counts_what_the_nodes_hold(text) -> None:
    spec = spec_of(**WIDE)
    plan, one = plan_of(spec, numa="3", weight_format=text), plan_of(spec, weight_format=text)
    _, ends = lay_out(spec.store_tensors(plan.formats), plan.parts, 3)
    total, whole = sum(plan.weight_bytes.values()), sum(one.weight_bytes.values())
    assert total <= sum(ends) < total + 64 * 3 * len(spec.store_tensors(plan.formats))
    assert whole <= total <= whole * 1.05
    assert plan.fixed_bytes - one.fixed_bytes == (
        total - whole + plan.arena_bytes + sum(plan.node_arena_bytes) - one.arena_bytes
    )


@pytest.mark.parametrize(
    ("nodes", "choices", "line"),
    [
        (
            (),
            {},
            "memory: one node; weights mapped from the store's files; huge pages for buffers, long keys and values",
        ),
        ((), {"load": "copy"}, "memory: one node; weights copied; huge pages for weights, buffers, long keys"),
        ((), {"numa": "3"}, "memory: 3 nodes, simulated; weights copied"),
        (TWO, {}, "memory: 2 nodes, numbers 0, 3; weights copied"),
        (TWO, {"threads": 9}, "memory: this machine's 2 memory nodes are used as one: 9 threads cannot be"),
    ],
)
def test_the_printed_plan_tells_of_nodes_and_huge_pages(nodes, choices, line) -> None:
    machine = replace(MACHINE, nodes=nodes, huge_pages="madvise")
    plan = make_plan(spec_of(**WIDE), machine, EngineConfig(**choices), FormatMix.uniform("bf16"))
    assert [text for text in plan_text(plan).splitlines() if text.startswith(line) and "(system: madvise)" in text]
    assert (", node 1" in plan_text(plan)) == (plan.nodes > 1)
    told = plan.to_dict()
    assert (told["nodes"], told["load"], told["huge_pages"]) == (len(plan.node_ids), plan.load, "madvise")


@pytest.mark.parametrize("setting", ["never", "unsupported"])
def test_a_plan_without_huge_pages_says_so(setting) -> None:
    plan = make_plan(spec_of(), replace(MACHINE, huge_pages=setting), EngineConfig(), FormatMix.uniform("bf16"))
    assert f"huge pages cannot be had (system: {setting})" in plan_text(plan)


@pytest.mark.parametrize(
    ("grant", "text"),
    [
        (MemoryGrant("map", "madvise", (), 0, 0), "weights mapped from the store's files"),
        (
            MemoryGrant("copy", "always", (NodeMemory(-1, False, 3 << 30, 2 << 30),), 10, 7),
            "weights: 2.15 GB of 3.22 GB in huge pages (system: always); "
            "keys and values: huge pages for 7 of 10 long runs",
        ),
        (
            MemoryGrant("copy", "never", (NodeMemory(0, True, 10**6, 0), NodeMemory(3, False, 10**6, 0)), 0, 0),
            "weights: 0.00 MB of 2.00 MB in huge pages (system: never); node 0: placed, node 3: refused",
        ),
        (
            MemoryGrant("copy", "madvise", (NodeMemory(-1, False, 10**6, 0),) * 2, 0, 0),
            "weights: 0.00 MB of 2.00 MB in huge pages (system: madvise); 2 simulated nodes",
        ),
    ],
)
def test_what_was_granted_is_a_line(grant, text) -> None:
    assert str(grant) == text


class Advised:
    """An arena that notes where huge pages are asked for, and refuses after some."""

    def __init__(self, refused_after: int) -> None:
        self.places: list[tuple[int, int]] = []
        self._left = refused_after

    def use_huge(self, offset: int, size: int) -> bool:
        self._left -= 1
        self.places += [(offset, size)] * (self._left >= 0)
        return self._left >= 0


def advised(monkeypatch, plan: Plan, spec: ModelSpec, refused_after: int = 10**9) -> tuple[Advised, KvArena]:
    arena = Advised(refused_after)
    with monkeypatch.context() as patch:
        patch.setattr("hybrid.engine.kv.cpu_kernels.Arena", lambda size: arena)
        return arena, KvArena(plan)


def long_plan(format: str, setting: str = "madvise") -> tuple[Plan, ModelSpec]:
    """Runs of 40 dimensions: keys of 64, values of 48 each take a token; 262144 tokens of bf16 are 32 and 24 MiB."""
    spec = spec_of(head_dim=40, max_position_embeddings=1 << 18)
    config = EngineConfig(max_batch=2, max_seq_len=1 << 18, kv_format=format)
    machine = replace(MACHINE, huge_pages=setting, memory_available=1 << 40)
    return make_plan(spec, machine, config, FormatMix.uniform("bf16")), spec


@pytest.mark.parametrize(("format", "size"), [("bf16", 2), ("int8", 1), ("fp8", 1)])
def test_keys_and_values_have_huge_pages_behind_their_first_8_mib(monkeypatch, format, size) -> None:
    """In every slot (2), layer (3) and head (2), keys and values apart; the scales are too short."""
    plan, spec = long_plan(format)
    arena, kv = advised(monkeypatch, plan, spec)
    assert (kv.long_runs, kv.huge_runs) == (24, 24)
    expected = set()
    for slot in range(2):
        for layer, offset in zip(plan.kv.layers, plan.kv.offsets, strict=True):
            for head in range(2):
                keys = slot * plan.kv.sequence_stride + offset + head * layer.fields["head_stride"]
                values = keys + layer.fields["value_offset"]
                lengths = ((keys, (64 * size << 18)), (values, 48 * size << 18))
                expected |= {(start + HUGE_BEHIND, length - HUGE_BEHIND) for start, length in lengths}
    assert set(arena.places) == expected and HUGE_BEHIND == 8 << 20


def test_huge_keys_and_values_end_where_the_system_refuses_or_there_are_too_many(monkeypatch) -> None:
    plan, spec = long_plan("bf16")
    arena, kv = advised(monkeypatch, plan, spec, refused_after=5)
    assert (kv.long_runs, kv.huge_runs, len(arena.places)) == (24, 5, 5)
    monkeypatch.setattr("hybrid.engine.kv.MAX_HUGE_RUNS", 7)
    arena, kv = advised(monkeypatch, plan, spec)
    assert (kv.long_runs, kv.huge_runs, len(arena.places)) == (24, 7, 7)
    arena, kv = advised(monkeypatch, *long_plan("bf16", "never"))
    assert (kv.long_runs, kv.huge_runs, arena.places) == (24, 0, [])


def test_short_keys_and_values_stay_in_small_pages() -> None:
    plan = make_plan(spec_of(), replace(MACHINE, huge_pages="madvise"), EngineConfig(), FormatMix.uniform("bf16"))
    kv = KvArena(plan)
    assert (kv.long_runs, kv.huge_runs) == (0, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint with routed and dense layers wide enough to split, and with every expert active."""
    path = tmp_path_factory.mktemp("numa") / "hf"
    return write_checkpoint(path, "qwen3_moe", **WIDE, num_experts_per_tok=10)


def opened(saved: Path, **choices: Any) -> Engine:
    return open_engine(saved, saved.parent / "cache", **choices)


TOKENS = np.random.default_rng(0).integers(0, 131, 60)


@pytest.mark.parametrize("text", MIXES)
def test_copied_weights_are_those_of_the_store(saved, text) -> None:
    """Whole tensors byte by byte, and the logits bit for bit."""
    with opened(saved, weight_format=text) as engine:
        mapped = step(engine, (0, 0, TOKENS))
        assert not engine.memory.nodes
    with opened(saved, weight_format=text, load="copy") as engine:
        assert np.array_equal(step(engine, (0, 0, TOKENS)), mapped)
        (node,) = engine.memory.nodes
        assert node.bytes >= engine.store.nbytes and 0 <= node.huge_bytes <= node.bytes + (2 << 20)
        assert not has_huge_pages(probe().huge_pages) or node.huge_bytes or node.bytes < 2 << 20
        with pytest.raises(KeyError):
            engine.store.array("final_norm")


FLOAT, INTEGER = 0.006, 0.025  # how far a part of a layer may be off


def allowed(text: str) -> float:
    """int8 activations are scaled anew in each part: two roundings of them, each as near as one must be."""
    return np.sqrt(2) * INTEGER if "int" in text or text in GROUPED else FLOAT


@pytest.mark.parametrize(("text", "nodes"), [*CUT, ("int4,attention=fp8,head=int8,dense=mxfp4", 3)])
def test_logits_of_nodes_are_near_and_do_not_depend_on_threads_or_chunks(saved, isa, text, nodes) -> None:
    choices = {"weight_format": text, "isa": isa, "batch_invariant": True}
    with opened(saved, threads=1, **choices) as engine:
        whole = step(engine, (0, 0, TOKENS))
    found = []
    for threads in (nodes, nodes + 2):
        with opened(saved, threads=threads, numa=str(nodes), **choices) as engine:
            assert (engine.plan.nodes, engine.pool.nodes, engine.plan.load) == (nodes, nodes, "copy")
            assert sum(op.kind == "join" for op in engine.plan.ops) == 3
            found.append(step(engine, (0, 0, TOKENS)))
            assert np.array_equal(found[0], in_chunks(engine, TOKENS, 7, slot=1))
    assert np.array_equal(found[0], found[1])
    error = np.linalg.norm(found[0] - whole) / np.linalg.norm(whole)
    print(f"{text}, {nodes} nodes, {isa}: {error:.2e} of {allowed(text):.2e}")
    assert error <= allowed(text)


class MadeUp:
    """A store of random weights for any spec, in bf16; it lies where `address` says, and nothing of it is verified."""

    unverified = False

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.mix, random = spec, FormatMix.uniform("bf16"), np.random.default_rng(0)
        self.tensors = {tensor.name: tensor for tensor in spec.store_tensors(self.mix)}
        self._arrays = {name: placed(_values(tensor, random)) for name, tensor in self.tensors.items()}

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def address(self, name: str, node: int = -1) -> int:
        assert node == -1
        return self._arrays[name].ctypes.data

    def verify_in_background(self) -> None:
        pass

    def require_sound(self) -> None:
        pass

    def require_unharmed(self) -> None:
        pass

    def close(self) -> None:
        pass


def _values(tensor: StoreTensor, random: np.random.Generator) -> np.ndarray:
    """Norms around 1, all else of spread 0.1; padding is as random as the rest, so it must not matter."""
    if tensor.format is None:
        return (random.standard_normal(tensor.shape) * 0.1 + ("norm" in tensor.name)).astype(np.float32)
    values = (random.standard_normal((*tensor.shape[:-1], tensor.shape[-1] // 2)) * 0.1).astype(ml_dtypes.bfloat16)
    return values.view(np.uint8)


@pytest.mark.parametrize("nodes", [2, 3])
def test_biases_of_experts_are_split_and_added_once(nodes) -> None:
    spec = with_biases(spec_of(moe_intermediate_size=320, intermediate_size=320, num_experts_per_tok=10))
    logits = []
    for numa in ("off", str(nodes)):
        machine = replace(MACHINE, isa=cpu_kernels.available_isas()[0])
        config = EngineConfig(numa=numa, threads=3)
        plan = replace(make_plan(spec, machine, config, FormatMix.uniform("bf16")), cpus=())
        with Engine(MadeUp(spec), plan) as engine:  # type: ignore[arg-type]
            logits.append(step(engine, (0, 0, TOKENS)))
    assert np.isfinite(logits[0]).all() and logits[0].any()
    assert np.linalg.norm(logits[1] - logits[0]) <= FLOAT * np.linalg.norm(logits[0])


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3"])
def test_biases_and_a_tied_head_are_split_as_well(tmp_path, family) -> None:
    """All have biases on their projections; llama a head that stays whole with the embedding, gpt_oss and deepseek_v3,
    whose matrices of heads stay whole too, much else.
    """
    counts = ("num_local_experts", "n_routed_experts")
    active = next(({"num_experts_per_tok": CONFIGS[family][name]} for name in counts if name in CONFIGS[family]), {})
    more = {"n_group": 1, "attention_bias": True} if family == "deepseek_v3" else {}
    path = write_checkpoint(tmp_path / "hf", family, intermediate_size=320, **active, **more)
    with open_engine(path, tmp_path / "cache", threads=2) as engine:
        whole, expected = step(engine, (0, 0, TOKENS)), greedy(engine, TOKENS[:20], 20, slot=1)
    for nodes in (2, 3):
        with open_engine(path, tmp_path / "cache", threads=3, numa=str(nodes)) as engine:
            logits = step(engine, (0, 0, TOKENS))
            assert np.linalg.norm(logits - whole) <= FLOAT * np.linalg.norm(whole)
            assert greedy(engine, TOKENS[:20], 20, slot=1) == expected and len(set(expected)) > 1


@pytest.mark.parametrize("text", ["bf16", "int8", "int4"])
def test_the_embedded_model_says_the_same_on_any_number_of_nodes(tmp_path, text) -> None:
    """Its experts are too narrow to split, its attention is not."""

    def spoken(**choices: Any) -> list[int]:
        config = EngineConfig(cache_dir=tmp_path, max_seq_len=256, weight_format=text, **choices)
        with Engine.open(config) as engine:
            return greedy(engine, TOKENS[:9], 9)

    expected = spoken(threads=2)
    assert len(set(expected)) > 1
    for nodes, threads in ((2, 2), (2, 3), (3, 3), (3, 5)):
        assert spoken(numa=str(nodes), threads=threads) == expected


def test_greedy_tokens_are_the_same_on_nodes_and_one(saved) -> None:
    with opened(saved) as engine:
        expected = greedy(engine, TOKENS[:20], 20)
    assert len(set(expected)) > 1
    for nodes in (2, 3):
        with opened(saved, numa=str(nodes), threads=3) as engine:
            assert greedy(engine, TOKENS[:20], 20) == expected


def test_each_node_has_its_own_part_of_every_split_tensor_and_no_more(saved) -> None:
    with opened(saved, numa="2") as engine, cached_store(saved, saved.parent / "cache") as store:
        sizes = [node.bytes for node in engine.memory.nodes]
        parts = {name: len(blocks) for name, blocks in engine.plan.parts.items()}
        whole = sum(tensor.nbytes for name, tensor in store.tensors.items() if name not in parts)
        assert set(parts.values()) == {2} and {"head", "layers.0.ffn.experts", "layers.1.attention.qkv"} <= set(parts)
        assert 0.6 < (sizes[0] - whole) / sizes[1] < 1  # the 300 columns of experts are cut into 128 and 172
        assert sum(sizes) < 1.02 * store.nbytes


def test_a_cancelled_step_on_nodes_leaves_nothing_behind(saved) -> None:
    with opened(saved, numa="2") as engine:
        whole = step(engine, (0, 0, TOKENS))
        engine.cancel()
        with pytest.raises(StepCancelled):
            step(engine, (0, 0, TOKENS))
        assert np.array_equal(whole, step(engine, (0, 0, TOKENS)))


def test_copying_tells_how_far_it_is(saved) -> None:
    told: list[tuple[str, int, int]] = []
    plan = plan_model(EngineConfig(model_path=saved, threads=2, numa="2"))
    store = cached_store(saved, saved.parent / "cache")
    Engine(store, plan, lambda *progress: told.append(progress)).close()
    pieces = len(store.tensors) + len(plan.parts)
    assert told == [("loading", done, pieces) for done in range(1, pieces + 1)]


def test_a_copy_that_cannot_be_had_is_refused_with_its_size(saved, monkeypatch) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    with cached_store(saved, saved.parent / "cache") as store:
        monkeypatch.setattr("hybrid.weights.copied.cpu_kernels.Arena", refuse)
        with pytest.raises(CapacityError, match=r"\d GB for a copy of the weights cannot be allocated"):
            CopiedWeights(store, store.tensors.values(), {}, (-1,), 1)
