"""Steps on a device, for which torch's CPU device stands in: logits are those of the threads, whatever lies where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS, ON_DEVICE
from rig import quantised_rows
from steps import agreement, greedy, in_chunks, open_engine, step

from hybrid.config import CacheConfig, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError, KernelError
from hybrid.formats import GROUPED
from hybrid.formats.mix import MIXES
from hybrid.weights.pack import cached_store

torch = pytest.importorskip("torch")
import oracle  # noqa: E402
from dequantised import write_dequantised  # noqa: E402
from oracle import Oracle  # noqa: E402
from test_engine import CASES, SHARP  # noqa: E402
from test_formats_engine import all_active, bound  # noqa: E402

from hybrid.gpu.rows import expert_rows  # noqa: E402

STEP = {"step_on": "torch-cpu"}
FEW = [*(name for name in MIXES if name not in (*GROUPED, "fp8_row", "nvfp4")), "q6_k"]
NEAR = 1.05  # times the error of the threads: other orders of the same sums
EMBEDDED = {"threads": 2, "max_batch": 4, "chunk_size": 64, "max_seq_len": 512}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """More would wait for the processors on which the threads of the executor spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("case", [case for case, (family, _) in CASES.items() if family in ON_DEVICE])
def test_logits_are_nearer_to_fp32_than_transformers_in_bf16(tmp_path, case) -> None:
    family, changes = CASES[case]
    ours, theirs = [], []
    for seed in range(3):
        wanted = oracle.save(tmp_path / f"{seed}", family, dtype="bf16", seed=seed, **changes)
        with open_engine(wanted.path, tmp_path / "cache", **STEP) as engine:
            whole = step(engine, (0, 0, wanted.tokens))
            ours.append(wanted.error(whole))
            theirs.append(wanted.bf16_error)
            if seed == 0 and not engine.spec.length_limits:  # of those the scheduler's steps must know the lengths
                assert_same_but_for_near_ties(in_chunks(engine, wanted.tokens, 9, slot=1), whole)
                assert_same_but_for_near_ties(decoded_beside_others(engine, wanted.tokens), whole[50:])
    assert 0 < oracle.together(ours) <= oracle.together(theirs)


def decoded_beside_others(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    """Logits of the tokens from the 50th on, each in a step with prompts and tokens of others."""
    step(engine, (3, 0, tokens[:7]), (0, 0, tokens[:30]), (2, 0, tokens[:50]))
    parts = [
        step(engine, (0, i - 20, tokens[:1]), (2, i, tokens[i : i + 1]), (3, 0, tokens[:5]))[1:2] for i in range(50, 70)
    ]
    return np.concatenate(parts)


def assert_same_but_for_near_ties(logits: np.ndarray, wanted: np.ndarray) -> None:
    """Sums in another order may send a row to another expert, which shows in it and a little in those that see it."""
    errors = [distance(*rows) for rows in zip(logits, wanted, strict=True)]
    assert np.median(errors) < 0.005 and np.mean(np.array(errors) > 0.02) < 0.1


LONG = {"max_position_embeddings": 1024, "length": 500, **SHARP}
LONG_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen3", {}),
    "sinks, windows of 20 on half of the layers": ("gpt_oss", {"num_experts_per_tok": 6}),
    "sinks, windows longer than the mirror": ("gpt_oss", {"num_experts_per_tok": 6, "sliding_window": 150}),
    "many heads a key": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 40}),
    "latents": ("deepseek_v3", {**all_active("deepseek_v3"), "num_attention_heads": 5, "num_key_value_heads": 5}),
    "late queries grow": ("ministral3", {}),
    "queries of latents grow": ("mistral4", all_active("mistral4")),
    "two ropes, windows on some layers": ("gemma3_text", {}),
    "own numbers of heads, softplus of a gate for each": ("laguna", all_active("laguna")),
    "softplus of a gate for each value, bounded scores of routers": (
        "laguna",
        {**all_active("laguna"), "gating": "per-element", "moe_router_logit_softcapping": 0.3},
    ),
}


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("case", LONG_CASES)
def test_attention_over_mirrored_and_older_tokens_is_that_over_all(tmp_path, case, kv_format) -> None:
    """The prompt comes in chunks that leave the mirror behind, then single tokens and rewinds, beside a short one."""
    family, changes = LONG_CASES[case]
    wanted = oracle.save(tmp_path / "hf", family, **LONG, **changes)
    sizes = {"chunk_size": 64, "max_seq_len": 512, "kv_format": kv_format, "max_batch": 4}

    def run(engine: Engine) -> np.ndarray:
        tokens = wanted.tokens
        logits = [in_chunks(engine, tokens[:320], 50, slot=1)]
        logits += [step(engine, (1, i, tokens[i : i + 1]), (3, i - 320, tokens[:1]))[:1] for i in range(320, 345)]
        step(engine, (1, 200, tokens[:30]))  # a rewind that writes other tokens
        again = [step(engine, (1, i, tokens[i : i + 60])) for i in range(200, 500, 60)]
        return np.concatenate([*logits, np.concatenate(again)[145:]])

    with open_engine(wanted.path, tmp_path / "cache", **sizes) as engine:
        threads = wanted.error(run(engine))
    with open_engine(wanted.path, tmp_path / "cache", **sizes, **STEP) as engine:
        whole = wanted.error(run(engine))
    with open_engine(wanted.path, tmp_path / "cache", **sizes, **STEP, gpu_kv_tokens=64) as engine:
        assert engine.device_step.mirror.capacity == 64
        parts = wanted.error(run(engine))
        assert engine.plan.device.kv == sum(mixer._rings.nbytes for mixer in engine.device_step._mixers)
    # The mirror is bf16: where the home is not, the fewer tokens lie there alone, the nearer.
    assert whole <= NEAR * threads and parts <= NEAR * threads
    if kv_format != "bf16":
        assert whole < parts


@pytest.mark.parametrize("text", [*FEW, "int4,attention=fp8,head=int8,dense=mxfp4"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_every_format_gives_the_logits_of_what_it_stands_for(tmp_path, family, text) -> None:
    wanted = oracle.save(tmp_path / "hf", family, **all_active(family), **SHARP)
    with cached_store(wanted.path, tmp_path / "cache", text) as store:
        exact = oracle.logits(write_dequantised(tmp_path / "exact", store), wanted.tokens)
    with open_engine(wanted.path, tmp_path / "cache", weight_format=text, **STEP) as engine:
        assert 0 < distance(step(engine, (0, 0, wanted.tokens)), exact) <= bound(engine.spec, engine.plan.formats)


@pytest.mark.parametrize("width", [40, 96, 256, 300, 768])
@pytest.mark.parametrize("kind", ["int8", "grouped", "wide"])
def test_rows_of_int8_are_those_that_the_threads_make(width, kind) -> None:
    random = np.random.default_rng(width)
    rows = random.standard_normal((7, width)).astype(np.float32)
    rows[1] = 0
    rows[2, :40] *= 1e-37
    rows[3] *= 1e30
    assert np.array_equal(expert_rows(torch.from_numpy(rows), kind).numpy(), quantised_rows(kind, rows))


def embedded(**choices: Any) -> Engine:
    return Engine.open(EngineConfig(**EMBEDDED, **choices))


def work(engine: Engine) -> np.ndarray:
    """Logits of several sequences, prompts and tokens together."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, engine.spec.vocab, (4, 60))
    found = [step(engine, (0, 0, tokens[0, :20]), (2, 0, tokens[2, :33]))]
    for i in range(20, 30):
        found.append(
            step(engine, (0, i, tokens[0, i : i + 1]), (2, i + 13, tokens[2, i : i + 1]), (1, 0, tokens[1, :9]))
        )
    for slot in range(3):
        engine.release(slot)
    return np.concatenate(found)


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(14, 4, poison=True),
        CacheConfig(16, 16, delay=0, poison=True),
        CacheConfig(14, 4, quota=1, delay=9),
        CacheConfig(16, 8, prefetch="next-gate", delay=2, poison=True),
    ],
    ids=str,
)
def test_the_cache_changes_no_bit(cache) -> None:
    with embedded(**STEP) as engine:
        wanted = work(engine)
    with embedded(**STEP, device="simulated", cache=cache) as engine:
        for _ in range(2):
            assert np.array_equal(work(engine), wanted)
            engine.experts.drain()  # or no copy may have ended before the last step
        assert engine.experts.count()[:, 1].sum() > 0
        engine.experts.table.check_integrity()


def test_the_next_router_is_asked_on_the_device_too() -> None:
    """Both kinds of steps name the same experts to fetch, but for near-ties."""
    fetched = []
    for where in ({}, STEP):
        with embedded(**where, device="simulated", cache=CacheConfig(16, 16, prefetch="next-gate", delay=0)) as engine:
            step(engine, (0, 0, np.arange(40)))
            fetched.append(set(engine.experts.table.resident()))
    assert len(fetched[0] ^ fetched[1]) <= 0.02 * len(fetched[0]) and len(fetched[0]) > 100


def test_routes_are_observed() -> None:
    seen = []
    for where in ({}, STEP):
        with embedded(**where, routes=True) as engine:
            engine.routes.observer = lambda *route: seen.append((route[1], route[4].copy(), route[5].copy()))
            step(engine, (0, 0, np.arange(5)))
    assert [layer for layer, *_ in seen] == [*range(16), *range(16)]
    for threads, device in zip(seen[:16], seen[16:], strict=True):
        assert np.array_equal(threads[1], device[1]) and np.allclose(threads[2], device[2], atol=5e-3)


def test_text_is_that_of_the_threads() -> None:
    prompt = np.arange(3, 40)
    with embedded() as engine:
        text = np.concatenate([prompt, greedy(engine, prompt, 16, count=60)])
        assert agreement(engine, text, len(prompt), slot=1) > 0.9  # other chunks may round otherwise, with AMX
    with embedded(**STEP, gpu_kv_tokens=64, device="simulated", cache=CacheConfig(14, 4)) as engine:
        assert agreement(engine, text, len(prompt)) > 0.9


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_threads_go_on_with_the_latents_of_a_device_that_failed(tmp_path, monkeypatch, family, kv_format) -> None:
    """The rows that it made are at home, in the order of dimensions that the threads read."""
    from hybrid.gpu.layers.latent import MirroredLatents

    wanted = oracle.save(tmp_path / "hf", family, **all_active(family), **SHARP)
    with open_engine(wanted.path, tmp_path / "cache", kv_format=kv_format) as engine:
        threads = step(engine, (0, 0, wanted.tokens))
    with open_engine(wanted.path, tmp_path / "cache", kv_format=kv_format, **STEP) as engine:
        step(engine, (0, 0, wanted.tokens[:40]))
        monkeypatch.setattr(MirroredLatents, "mix", lambda *_: _no_memory())
        with pytest.raises(KernelError, match="the device has no memory left"):
            step(engine, (0, 40, wanted.tokens[40:]))
        again = step(engine, (0, 40, wanted.tokens[40:]))
        assert distance(again, threads[40:]) < (0.05 if kv_format == "fp8" else 0.02)


def test_kimi_is_deepseek_v3_on_a_device_too(tmp_path) -> None:
    plain = CONFIGS["deepseek_v3"]
    tensors, text = random_tensors(plain), {**plain, "model_type": "kimi_k2"}
    nested = {f"language_model.{name}": values for name, values in tensors.items()}
    paths = [
        write_tensors(tmp_path / "v3", plain, tensors),
        write_tensors(tmp_path / "k2", text, tensors),
        write_tensors(tmp_path / "k25", {"model_type": "kimi_k25", "text_config": text}, nested),
    ]
    logits = []
    for path in paths:
        with open_engine(path, tmp_path / "cache", **STEP) as engine:
            logits.append(step(engine, (0, 0, np.arange(40))))
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
def test_gated_attention_over_mirrored_and_older_tokens_is_that_over_all(tmp_path, kv_format) -> None:
    """Beside layers whose states cannot be rewound: chunks that leave the mirror behind, then single tokens."""
    changes = {**LONG, **all_active("qwen3_next"), "layer_types": ["linear_attention", "full_attention"] * 2}
    wanted = oracle.save(tmp_path / "hf", "qwen3_next", **changes)
    sizes = {"chunk_size": 64, "max_seq_len": 512, "kv_format": kv_format, "max_batch": 4}

    def error(**options: Any) -> float:
        tokens = wanted.tokens
        with open_engine(wanted.path, tmp_path / "cache", **sizes, **options) as engine:
            logits = [in_chunks(engine, tokens[:470], 50, slot=1)]
            logits += [step(engine, (1, i, tokens[i : i + 1]), (3, i - 470, tokens[:1]))[:1] for i in range(470, 500)]
        return wanted.error(np.concatenate(logits))

    threads = error()
    assert error(**STEP) <= NEAR * threads and error(**STEP, gpu_kv_tokens=64) <= NEAR * threads


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_threads_go_on_with_the_states_of_a_device_that_failed(tmp_path, monkeypatch, family) -> None:
    """Which have one home. Tokens come whole, one by one and beside others before."""
    from hybrid.gpu.layers.gated_delta import Projections as Delta
    from hybrid.gpu.layers.short_conv import Projections as Convolution

    wanted = oracle.save(tmp_path / "hf", family, **(all_active(family) if family == "qwen3_next" else {}))
    tokens = wanted.tokens
    with open_engine(wanted.path, tmp_path / "cache") as engine:
        threads = step(engine, (0, 0, tokens))
    with open_engine(wanted.path, tmp_path / "cache", **STEP) as engine:
        step(engine, (0, 0, tokens[:30]), (2, 0, tokens[:9]))
        for i in range(30, 40):
            step(engine, (0, i, tokens[i : i + 1]), (2, i - 21, tokens[:1]))
        for mixer in (Convolution, Delta):
            monkeypatch.setattr(mixer, "project", lambda *_: _no_memory())
        with pytest.raises(KernelError, match="the device has no memory left"):
            step(engine, (0, 40, tokens[40:]))
        assert distance(step(engine, (0, 40, tokens[40:])), threads[40:]) < 0.02


@pytest.mark.parametrize("cache", [None, CacheConfig(14, 4)], ids=str)
def test_a_device_that_fails_costs_one_step(monkeypatch, cache) -> None:
    """The home of keys and values has all tokens, so the threads go on with them."""
    from hybrid.gpu.layers.grouped_query import MirroredAttention

    device = {} if cache is None else {"device": "simulated", "cache": cache}
    tokens = np.arange(60)
    with embedded() as engine:
        wanted = step(engine, (0, 0, tokens))
    with embedded(**STEP, **device) as engine:
        step(engine, (0, 0, tokens[:40]))

        def fail(*_: Any) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure\nmore lines")

        monkeypatch.setattr(MirroredAttention, "mix", fail)
        with pytest.raises(KernelError, match=r"the device failed \(CUDA error: unspecified launch failure\)") as error:
            step(engine, (0, 40, tokens[40:]))
        assert "\n" not in str(error.value)
        assert distance(step(engine, (0, 40, tokens[40:])), wanted[40:]) < 0.02


def test_a_device_without_memory_gives_slots_back_and_goes_on(monkeypatch) -> None:
    """The step is run again with fewer slots; only when none is left is the CPU alone."""
    from hybrid.gpu.layers.grouped_query import MirroredAttention

    attend, tokens = MirroredAttention.mix, np.arange(20)
    with embedded(**STEP) as engine:
        wanted = step(engine, (0, 0, tokens))
    with embedded(**STEP, device="simulated", cache=CacheConfig(14, 4)) as engine:
        slots = engine.experts.geometry.slots

        def full(*arguments: Any) -> Any:
            if engine.experts.geometry.slots > slots // 2:
                _no_memory()
            return attend(*arguments)

        monkeypatch.setattr(MirroredAttention, "mix", full)
        assert np.array_equal(step(engine, (0, 0, tokens)), wanted)
        assert 0 < engine.experts.geometry.slots <= slots // 2 and engine.device_step is not None
        monkeypatch.setattr(MirroredAttention, "mix", lambda *_: _no_memory())
        with pytest.raises(KernelError, match="the device has no memory left .CUDA out of memory"):
            step(engine, (0, 0, tokens))
        assert engine.device_step is None
        assert distance(step(engine, (0, 0, tokens)), wanted) < 0.05


def _no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ((0, 0, np.array([10**6])), "token id 1000000 is outside the vocabulary"),
        ((4, 0, np.array([1])), "sequence 4 of 4"),
        ((0, 512, np.array([1])), "position 512 of 512"),
        ((0, 0, np.zeros(65, int)), "a step of 65 rows"),
    ],
)
def test_a_step_beyond_the_plan_is_refused_before_the_device_sees_it(part, words) -> None:
    with embedded(**STEP) as engine:
        with pytest.raises(KernelError, match=words):
            step(engine, part)
        assert engine.device_step is not None


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match="--step-on 'gpu' is unknown"):
        embedded(step_on="gpu")
    with pytest.raises(ConfigError, match="--gpu-kv-tokens 63 is out of range; it must be at least 64"):
        embedded(**STEP, gpu_kv_tokens=63)
    with pytest.raises(ConfigError, match="--numa 2 cannot be had with a step on a GPU"):
        embedded(**STEP, numa="2")


def test_without_torch_one_line_says_so(monkeypatch) -> None:
    monkeypatch.setattr("hybrid.engine.engine.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--step-on torch-cpu needs torch, which is not installed"):
        embedded(**STEP)


def test_an_engine_that_is_closed_lets_go_of_all(tmp_path: Path, saved: Oracle) -> None:
    import gc
    import weakref

    engine = open_engine(saved.path, tmp_path / "cache", **STEP)
    step(engine, (0, 0, saved.tokens))
    left = weakref.ref(engine.device_step)
    engine.close()
    gc.collect()
    assert left() is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return oracle.save(tmp_path_factory.mktemp("moe") / "hf", "qwen3_moe")
