"""DeepSeek-V4: a row attends to its window and to entries of older tokens, beside a residual stream of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from checkpoints import packed, random_tensors, write_checkpoint, write_tensors
from configs import CONFIGS
from oracle import Oracle
from steps import error_of_changed, errors_together, in_chunks, open_engine, step

from hybrid.errors import ConfigError
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec
from hybrid.models.layers.base import Load
from hybrid.models.layers.compressed import CompressedAttention
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.published import native_mix

FAMILY = "deepseek_v4"
# Many heads, so that no score is that of an entry to which all are blind: among those the choice is free. No near-tie
# of experts decides.
LONG: dict[str, Any] = {"index_n_heads": 32, "num_experts_per_tok": 8, "initializer_range": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "entries of 4 tokens are selected": {"index_topk": 16},
    "entries of 128 tokens": {"index_topk": 40, "compress_rates": {"heavily_compressed_attention": 128}},
    "entries of 2 and 64 tokens": {
        "index_topk": 50,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 64},
    },
}
WIDE = {"chunk_size": 256, "max_seq_len": 256}


def save(path: Path, case: str, seed: int = 0) -> Oracle:
    rates = {**CONFIGS[FAMILY]["compress_rates"], **CASES[case].get("compress_rates", {})}
    return oracle.save(path, FAMILY, seed=seed, length=200, **LONG, **{**CASES[case], "compress_rates": rates})


@pytest.mark.parametrize("case", CASES)
def test_logits_are_nearer_to_fp32_than_transformers_in_bf16(tmp_path: Path, case: str) -> None:
    """Rounding may exchange entries of nearly equal scores, in either."""
    saved = [save(tmp_path / f"{seed}", case, seed) for seed in range(3)]
    ours, theirs = errors_together(saved, tmp_path / "cache", **WIDE)
    assert 0 < ours <= theirs


@pytest.mark.parametrize(
    "change",
    [
        {"index_topk": 17},
        {"sliding_window": 21},
        {
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
            "hc_sinkhorn_iters": 1,
        },
        {"routed_scaling_factor": 1.6},
    ],
    ids=str,
)
def test_a_slightly_wrong_model_is_further_off(tmp_path: Path, change: dict[str, Any]) -> None:
    saved = save(tmp_path / "hf", "entries of 4 tokens are selected")
    right = error_of_changed(saved, tmp_path / "right", {}, **WIDE)
    assert error_of_changed(saved, tmp_path / "wrong", change, **WIDE) > 1.2 * right


@pytest.fixture(scope="module", params=["bf16", "int8", "fp8"])
def kv_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("v4") / "hf", FAMILY)


TOKENS = np.arange(200) * 7 % 131


def test_logits_are_the_same_bits_however_a_prompt_is_run(model: Path, kv_format: str) -> None:
    """In chunks, beside others, from a snapshot in another sequence, on any threads."""
    cache = model.parent / "cache"
    with open_engine(model, cache, kv_format=kv_format, **WIDE) as engine:
        whole = step(engine, (0, 0, TOKENS))
        for size in (1, 7, 64):
            engine.release(1)
            assert np.array_equal(whole, in_chunks(engine, TOKENS, size, slot=1)), size
        step(engine, (3, 0, TOKENS[::-1][:100]))
        together = step(engine, (3, 100, TOKENS[:1]), (2, 0, TOKENS[:90]))
        assert np.array_equal(whole[:90], together[1:])
        kept, state = engine.kv.save(2, 0, 96), engine.kv.snapshot(2)
        assert np.array_equal(whole[90:], step(engine, (2, 90, TOKENS[90:])))
        engine.release(1)
        engine.kv.load(kept, 1, 0, 96)
        engine.kv.restore(1, state)
        assert np.array_equal(whole[90:], step(engine, (1, 90, TOKENS[90:])))
    for threads in (1, 3):
        with open_engine(model, cache, kv_format=kv_format, threads=threads, **WIDE) as engine:
            assert np.array_equal(whole, in_chunks(engine, TOKENS, 50))


def test_memory_nodes_compute_it_together(model: Path) -> None:
    with open_engine(model, model.parent / "cache", numa="2", **WIDE) as engine:
        whole = step(engine, (0, 0, TOKENS))
        assert np.array_equal(whole, in_chunks(engine, TOKENS, 50, slot=1)) and np.isfinite(whole).all()


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "q4_k", "mxfp4", "nvfp4"])
def test_matrices_of_every_kind_of_rows(tmp_path: Path, model: Path, format: str) -> None:
    """In chunks the same bits; and near to bf16, as far as so few bits allow."""
    with open_engine(model, model.parent / "cache", **WIDE) as engine:
        exact = step(engine, (0, 0, TOKENS[:60]))
    with open_engine(model, tmp_path / "cache", weight_format=format) as engine:
        whole = step(engine, (0, 0, TOKENS[:60]))
        assert np.array_equal(whole, in_chunks(engine, TOKENS[:60], 1, slot=1))
    assert np.linalg.norm(whole - exact) < 0.7 * np.linalg.norm(exact)


def test_every_instruction_set_computes_it(isa: str, tmp_path: Path) -> None:
    saved = save(tmp_path / "hf", "entries of 4 tokens are selected")
    with open_engine(saved.path, tmp_path / "cache", isa=isa, **WIDE) as engine:
        assert engine.plan.isa == isa
        assert (
            saved.error(step(engine, (0, 0, saved.tokens))) <= 1.5 * saved.bf16_error
        )  # of one prompt, which has luck


@pytest.mark.parametrize("kind", ["collapse", "expand"])
def test_the_streams_of_a_model_are_a_property_of_the_decoder(kind: str, model: Path) -> None:
    """Around every half, and for the embedding and the head."""
    with open_engine(model, model.parent / "cache") as engine:
        assert sum(op.kind == kind for op in engine.plan.ops) == 2 * len(engine.spec.layers) + 1
        norms = [op for op in engine.plan.ops if op.kind == "norm" and op.arguments["width"] == engine.spec.hidden]
        assert {op.arguments["input"].name for op in norms} == {"collapsed"}


def published(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors as DeepSeek names and quantises them, and what these stand for by the names that are read."""
    random, found, values = np.random.default_rng(4), dict[str, np.ndarray](), dict(tensors)
    plain = {"model.embed_tokens.weight": "embed.weight"}
    for name, tensor in tensors.items():
        theirs = plain.get(name, name.removeprefix("model.").replace("hc_head.hc_", "hc_head_"))
        theirs = theirs.replace("attn.norm.", "attn.kv_norm.")
        module, quantised = theirs.removesuffix(".weight"), name.endswith(("wq_a.weight", "wq_b.weight", "wkv.weight"))
        quantised = (quantised and "compressor" not in name) or name.endswith(("wo_a.weight", "wo_b.weight"))
        if ".experts." in name:
            codes = random.integers(0, 256, (tensor.shape[0], tensor.shape[1] // 2), np.uint8)
            powers = random.integers(118, 124, (tensor.shape[0], tensor.shape[1] // 32), np.uint8)
            pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(tensor.shape).view(ml_dtypes.float4_e2m1fn)
            scales = np.repeat(2.0 ** (powers.astype("f4") - 127), 32, axis=1)
            found[theirs], found[f"{module}.scale"] = codes.view(np.int8), powers.view(ml_dtypes.float8_e8m0fnu)
            values[name] = (pairs.astype("f4") * scales).astype(ml_dtypes.bfloat16)
        elif quantised or "shared_experts" in name:
            squares = tuple(-(-size // 128) for size in tensor.shape)
            powers = random.integers(124, 128, squares, np.uint8)
            scales = (2.0 ** (powers.astype("f4") - 127)).repeat(128, 0).repeat(128, 1)
            scales = scales[: tensor.shape[0], : tensor.shape[1]]
            codes = (tensor.astype("f4") / scales).astype(ml_dtypes.float8_e4m3fn)
            found[theirs], found[f"{module}.scale"] = codes, powers.view(ml_dtypes.float8_e8m0fnu)
            values[name] = (codes.astype("f4") * scales).astype(ml_dtypes.bfloat16)
        else:
            found[theirs] = tensor
    return found, values


PUBLISHED = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "q_lora_rank": 64}


PUBLISHED_NAMES = {  # of a layer that selects, as the index of DeepSeek-V4-Flash has them
    *(f"attn.{name}" for name in ("attn_sink", "kv_norm.weight", "q_norm.weight")),
    *(f"attn.{name}.{of}" for name in ("wkv", "wo_a", "wo_b", "wq_a", "wq_b") for of in ("weight", "scale")),
    *(
        f"attn.{module}compressor.{name}"
        for module in ("", "indexer.")
        for name in ("ape", "norm.weight", "wgate.weight", "wkv.weight")
    ),
    *("attn.indexer.weights_proj.weight", "attn.indexer.wq_b.weight", "attn.indexer.wq_b.scale"),
    *(f"ffn.shared_experts.w{number}.{of}" for number in (1, 2, 3) for of in ("weight", "scale")),
    *(f"ffn.experts.0.w{number}.{of}" for number in (1, 2, 3) for of in ("weight", "scale")),
    *("attn_norm.weight", "ffn_norm.weight", "ffn.gate.weight", "ffn.gate.bias", "ffn.gate.tid2eid"),
    *(f"hc_{half}_{part}" for half in ("attn", "ffn") for part in ("fn", "base", "scale")),
}


def test_a_checkpoint_is_read_as_it_is_published(tmp_path: Path) -> None:
    """fp8 and fp4 with powers of two, under other names, beside layers that are not read; the bits of the same in
    bf16, which holds both exactly.
    """
    config = {**CONFIGS[FAMILY], **SIZES}
    theirs, values = published(random_tensors(config))
    theirs["mtp.0.attn.wq_a.weight"] = np.zeros((2, 2), np.float32)
    assert {
        name.partition(".")[2].partition(".")[2] for name in theirs if name.startswith("layers.")
    } >= PUBLISHED_NAMES
    said = {**config, "expert_dtype": "fp4", "quantization_config": PUBLISHED}
    path = write_tensors(tmp_path / "published", said, theirs)
    checkpoint = Checkpoint.open(path)
    checkpoint.check()
    assert checkpoint.native.experts == "mxfp4" and checkpoint.native.shared == "fp8"
    assert checkpoint.native.attention == "fp8" and checkpoint.native.head == "bf16"
    assert native_mix(said) == checkpoint.native  # of config.json alone
    for name, tensor in values.items():
        assert np.array_equal(checkpoint.read(name).astype("f4"), tensor.astype("f4")), name
    plain, found = write_tensors(tmp_path / "plain", config, values), []
    for source, mix in ((path, "auto"), (path, "bf16"), (plain, "bf16")):
        with open_engine(source, tmp_path / "cache", weight_format=mix) as engine:
            found.append(step(engine, (0, 0, TOKENS[:60])))
    assert np.array_equal(found[1], found[2])
    assert np.linalg.norm(found[0] - found[1]) < 0.05 * np.linalg.norm(found[1])
    assert packed(path).mix == checkpoint.native


def test_older_fields_say_the_same(model: Path) -> None:
    config = CONFIGS[FAMILY]
    words = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor")
    old = {name: value for name, value in config.items() if name not in words}
    yarn = {name: value for name, value in config["rope_parameters"]["compress"].items() if name != "attention_factor"}
    yarn = {name: value for name, value in yarn.items() if name not in ("rope_theta", "partial_rotary_factor")}
    old |= {"compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1, "compress_rate_hca": 16, "rope_scaling": yarn}
    old |= {"qk_rope_head_dim": 12, "rope_theta": 10000.0, "compress_rope_theta": 160000.0}
    assert model_spec(old) == model_spec(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_limit": 7.0}, "swiglu_limit is 7.0; it must be absent or 10.0"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"o_groups": 4}, "o_groups 4 of 6 heads of 64 dimensions"),
        ({"o_lora_rank": 24}, "o_lora_rank 24; groups must be"),
        ({"sliding_window": 129}, "sliding_window is 129; it must be an integer from 1 to 128"),
        ({"index_head_dim": 10}, "index_head_dim is 10; it must be an integer from 12 to 1024"),
        ({"index_head_dim": 13}, "index_head_dim is 13; it must be even"),
        ({"partial_rotary_factor": 0.3}, "19 of the 64 dimensions of a head turn"),
        ({"compress_rates": {"compressed_sparse_attention": 6}}, "6 tokens make an entry"),
        ({"layer_types": None, "compress_ratios": [0, 4, 128, 5]}, r"compress_ratios is \[0, 4, 128, 5\]"),
        ({"layer_types": ["full_attention"] * 4}, "a list of 4 of sliding_attention, "),
        ({"mlp_layer_types": ["sparse"] * 4}, "a list of 4 of hash_moe, moe"),
        ({"hc_mult": 9}, "hc_mult is 9; it must be an integer from 2 to 8"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[FAMILY], **changes})


def test_a_step_costs_what_it_reads_and_multiplies() -> None:
    """Of long sequences the keys of the indexer, and no more entries than are selected."""
    spec = model_spec(CONFIGS[FAMILY])
    place, mixer = spec.place(1, FormatMix.uniform("bf16")), spec.layers[1].mixer
    assert isinstance(mixer, CompressedAttention) and mixer.indexer
    long, longer = (mixer.cost(place, Load(1, 1, tokens, float(tokens), "bf16")) for tokens in (1000, 2000))
    assert longer.bytes - long.bytes == 1000 / 4 * 32 * 2
    assert longer.flops - long.flops == 2 * 1000 / 4 * 3 * 24
