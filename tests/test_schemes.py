"""Matrices published as 4-bit codes in several tensors are packed to exactly what they stand for."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import packed, random_tensors, write_tensors
from configs import CONFIGS
from test_published import expert

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats import FORMATS
from hybrid.models import model_spec
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.patterns import wildcards
from hybrid.weights.checkpoints.published import native_mix
from hybrid.weights.pack import model_formats
from hybrid.weights.source import source_fingerprint
from hybrid.weights.store import Store

Tensors = dict[str, np.ndarray]
SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192, "head_dim": 32}
CONFIG = {**CONFIGS["qwen3_moe"], **SIZES, "num_attention_heads": 4}
ROUTED = {**CONFIG, "num_experts": 16, "mlp_only_layers": []}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUPS = {"group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}}}


def compressed(group: int = 32, **changes: Any) -> dict[str, Any]:
    weights = {**GROUPS["group_0"]["weights"], "group_size": group, **changes}
    if group == -1:
        weights |= {"strategy": "channel", "group_size": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def gptq(group: int = 32, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False, **changes}


def auto_round(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, **changes}


def quark(dtype: str) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": dtype, "qscheme": "per_group"}}}


def awq(group: int = 32, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **changes}


def in_words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """int32 [rows, columns / 8]: the i-th four bits of a word are those of neighbour order[i]."""
    filled = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8))).astype(np.uint32)
    words = np.zeros((len(codes), filled.shape[1] // 8), np.uint32)
    for place, neighbour in enumerate(order):
        words |= filled[:, neighbour::8] << np.uint32(4 * place)
    return words.view(np.int32)


def quantised(tensors: Tensors, config: dict[str, Any], scales: Any = None) -> tuple[Tensors, Tensors]:
    """The tensors of a checkpoint with projections as the config says, and what these stand for, in float32."""
    random, found, values = np.random.default_rng(3), dict(tensors), {}
    method = config["quant_method"]
    weights = config["config_groups"]["group_0"]["weights"] if method == "compressed-tensors" else config
    scales = scales or (ml_dtypes.bfloat16 if method == "compressed-tensors" else np.float16)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, inputs = found.pop(name).shape
        group = weights["group_size"] if (weights["group_size"] or -1) > 0 else inputs
        groups = -(-inputs // group)
        codes = random.integers(0, 16, (rows, inputs))
        steps = random.uniform(1e-3, 1e-2, (rows, groups)).astype(scales)
        zeros = np.full((rows, groups), 8)
        if not (method == "compressed-tensors" or config.get("sym")):
            zeros = random.integers(0, 16, (rows, groups))
        values[name] = (codes - zeros.repeat(group, 1)[:, :inputs]) * steps.astype("f4").repeat(group, 1)[:, :inputs]
        module = name.removesuffix(".weight")
        if method == "compressed-tensors":
            parts = {"weight_packed": in_words(codes), "weight_scale": steps, "weight_shape": np.array([rows, inputs])}
        elif method == "gptq":
            stored = in_words(zeros.T)
            if config.get("checkpoint_format", "gptq") == "gptq":
                stored = (stored.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
            parts = {"qweight": in_words(codes).T, "qzeros": stored, "scales": steps.T}
            parts["g_idx"] = (np.arange(inputs) // group).astype(np.int32)
        else:
            parts = {"qweight": in_words(codes.T, AWQ_ORDER), "qzeros": in_words(zeros.T, AWQ_ORDER), "scales": steps.T}
        found |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
    return found, {name: value.astype(np.float32) for name, value in values.items()}


def matrix(store: Store, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return FORMATS[store.tensors[name].format or ""].unpack(store.array(name), *shape)


CASES = {
    "compressed": (compressed(), None, "int4"),
    "compressed, groups of 64, fp16": (compressed(64), np.float16, "q4_0"),
    "compressed, a scale a row": (compressed(-1), None, "int4"),
    "gptq": (gptq(), None, "q4_0"),
    "gptq, bf16, second version": (gptq(64, checkpoint_format="gptq_v2"), ml_dtypes.bfloat16, "int4"),
    "gptq, zeros": (gptq(64, sym=False), None, "q5_0"),
    "gptq, a scale a column": (gptq(-1), None, "q4_0"),
    "awq": (awq(), None, "q5_0"),
    "awq, groups of 64": (awq(64), None, "q5_0"),
}


@pytest.mark.parametrize("case", CASES)
def test_codes_are_taken_as_they_are(tmp_path: Path, case: str) -> None:
    config, scales, format = CASES[case]
    tensors, values = quantised(random_tensors(CONFIG), config, scales)
    source = write_tensors(tmp_path / "hf", {**CONFIG, "quantization_config": config}, tensors, shards=2)
    with packed(source) as store:
        assert {store.mix.experts, store.mix.attention, store.mix.dense} == {format}
        assert store.mix.head == "bf16"
        out = "model.layers.0.self_attn.o_proj.weight"
        assert (matrix(store, "layers.0.attention.out", values[out].shape) == values[out]).all()
        qkv = np.concatenate([values[f"model.layers.2.self_attn.{part}_proj.weight"] for part in "qkv"])
        assert (matrix(store, "layers.2.attention.qkv", qkv.shape) == qkv).all()
        names = [f"model.layers.2.mlp.experts.7.{part}_proj.weight" for part in ("gate", "up", "down")]
        assert all((a == values[name]).all() for a, name in zip(expert(store, 2, 7), names, strict=True))


@pytest.mark.parametrize("case", ["compressed", "gptq, zeros", "awq"])
def test_other_formats_are_made_of_what_codes_stand_for(tmp_path: Path, case: str) -> None:
    config, scales, _ = CASES[case]
    tensors, values = quantised(random_tensors(CONFIG), config, scales)
    source = write_tensors(tmp_path / "hf", {**CONFIG, "quantization_config": config}, tensors)
    out, kind = values["model.layers.0.self_attn.o_proj.weight"], FORMATS["q6_k"]
    with packed(source, "q6_k") as store:
        expected = kind.unpack(kind.pack(out), *out.shape)
        assert (matrix(store, "layers.0.attention.out", out.shape) == expected).all()


def test_matrices_of_a_part_may_have_their_own_bits(tmp_path: Path) -> None:
    """8 bits for down, for all of layer 0's attention and for layer 2's o, 4 for the rest: as `dynamic` says."""
    many = (".down_proj", "layers.0.self_attn", "layers.2.self_attn.o_proj")
    config = gptq(dynamic={"+:.*": {"bits": 8, "group_size": -1}, "-:lm_head": {}})
    plain = random_tensors(CONFIG)
    tensors, values = quantised({n: t for n, t in plain.items() if not any(word in n for word in many)}, config)
    chance = np.random.default_rng(7)
    for name in [name for name in plain if any(word in name for word in many) and name.endswith("_proj.weight")]:
        rows, inputs = plain[name].shape
        codes = chance.integers(0, 256, (rows, inputs), np.uint8)
        scales = chance.uniform(1e-4, 1e-3, (rows, 1)).astype(np.float16)
        values[name] = (codes.astype("f4") - 128) * scales.astype("f4")
        words = np.ascontiguousarray(codes).view(np.int32).T.copy()
        zeros = np.full((1, rows // 4), 0x7F7F7F7F, np.int32)
        parts = {"qweight": words, "qzeros": zeros, "scales": scales.T.copy()}
        tensors |= {name.replace(".weight", f".{part}"): array for part, array in parts.items()}
    tensors |= {name: plain[name] for name in plain if name not in values}
    source = write_tensors(tmp_path / "hf", {**CONFIG, "quantization_config": config}, tensors)
    with packed(source) as store:
        mixes = [store.mix.of_layer(layer) for layer in range(3)]
        assert [mix.attention for mix in mixes] == ["int8", "q4_0", "q4_0/q4_0/q4_0/int8"]
        assert {mix.experts for mix in mixes} == {mix.dense for mix in mixes} == {"q4_0/int8"}
        for layer in range(3):
            qkv = np.concatenate([values[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"])
            assert (matrix(store, f"layers.{layer}.attention.qkv", qkv.shape) == qkv).all()
            out = values[f"model.layers.{layer}.self_attn.o_proj.weight"]
            assert (matrix(store, f"layers.{layer}.attention.out", out.shape) == out).all()
        names = [f"model.layers.2.mlp.experts.7.{part}_proj.weight" for part in ("gate", "up", "down")]
        assert all((a == values[name]).all() for a, name in zip(expert(store, 2, 7), names, strict=True))


@pytest.mark.parametrize(("version", "less"), [("gptq", 0), ("gptq_v2", 1)])
def test_zeros_of_symmetric_codes_may_be_of_the_other_version(tmp_path: Path, version: str, less: int) -> None:
    """As Qwen3.5-27B-GPTQ-Int4 has them: 8 beside the word `gptq`, which stores 7."""
    config = gptq(checkpoint_format=version)
    tensors, values = quantised(random_tensors(CONFIG), config)
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = np.full(tensors[name].shape, 0x77777777 if less else 0x88888888, np.uint32).view(np.int32)
    with packed(write_tensors(tmp_path / "hf", {**CONFIG, "quantization_config": config}, tensors)) as store:
        out = "model.layers.0.self_attn.o_proj.weight"
        assert (matrix(store, "layers.0.attention.out", values[out].shape) == values[out]).all()


def test_what_is_left_unquantised_stays_so(tmp_path: Path) -> None:
    plain = random_tensors(CONFIG)
    tensors, _ = quantised({name: plain[name] for name in plain if "self_attn" not in name}, compressed())
    tensors |= {name: plain[name] for name in plain if "self_attn" in name}
    with packed(write_tensors(tmp_path / "hf", {**CONFIG, "quantization_config": compressed()}, tensors)) as store:
        assert (store.mix.attention, store.mix.experts) == ("bf16", "int4")


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_beside_config_json_may_say_how(tmp_path: Path, file: str) -> None:
    """As older programs wrote it; without it, codes are codes of nothing that is known."""
    words: dict[str, Any] = {"quantize_config.json": gptq(), "quant_config.json": awq()}.get(file, {})
    tensors = random_tensors(CONFIG)
    if words:
        tensors, _ = quantised(tensors, words)
    source = write_tensors(tmp_path / "hf", CONFIG, tensors)
    without = {key: value for key, value in words.items() if key != "quant_method"}
    before = source_fingerprint(source)
    if words:
        with pytest.raises(
            WeightsError, match=r"q_proj.weight is stored as codes \(qweight\), and quantization_config"
        ):
            packed(source)
    (source / file).write_text(json.dumps(without or {"quantization": {"quant_algo": "FP8"}}))
    assert source_fingerprint(source) != before
    assert Checkpoint.open(source).config["quantization_config"]["quant_method"] == words.get(
        "quant_method", "modelopt"
    )
    assert model_formats(source).experts == {"gptq": "q4_0", "awq": "q5_0"}.get(words.get("quant_method", ""), "bf16")
    (source / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": gptq(bits=7)}))
    with pytest.raises(ConfigError, match="codes of 7 bits"):  # what config.json says itself comes first
        Checkpoint.open(source)


def test_keys_and_values_are_not_quantised_by_a_checkpoint(tmp_path: Path) -> None:
    config = {**compressed(), "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    tensors, _ = quantised(random_tensors(CONFIG), config)
    checkpoint = Checkpoint.open(write_tensors(tmp_path, {**CONFIG, "quantization_config": config}, tensors))
    lines = checkpoint.notes(checkpoint.native)
    assert len(lines) == 1 and "(kv_cache_scheme), which is not done; --kv-format says" in lines[0]


@pytest.mark.parametrize("words", [gptq(lm_head=True), compressed(), awq()], ids=["gptq", "compressed", "awq"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_may_be_quantised(tmp_path: Path, words: dict[str, Any], tied: bool) -> None:
    """Also beside embeddings that config.json calls tied, from which it differs then."""
    plain = {**CONFIG, "vocab_size": 128}
    renamed = {name.replace("lm_head", "lm_head_proj"): tensor for name, tensor in random_tensors(plain).items()}
    tensors, values = quantised(renamed, words)
    tensors = {name.replace("lm_head_proj", "lm_head"): tensor for name, tensor in tensors.items()}
    config = {**plain, "tie_word_embeddings": tied, "quantization_config": words}
    with packed(write_tensors(tmp_path / "hf", config, tensors)) as store:
        head = values["lm_head_proj.weight"]
        assert store.mix.head == store.mix.attention != "bf16"
        assert (matrix(store, "head", head.shape) == head).all()


def test_a_router_may_be_quantised(tmp_path: Path) -> None:
    plain = {name.replace("mlp.gate.", "mlp.gate_proj."): t for name, t in random_tensors(ROUTED).items()}
    tensors, values = quantised(plain, gptq())
    tensors = {name.replace("mlp.gate_proj.", "mlp.gate."): tensor for name, tensor in tensors.items()}
    with packed(write_tensors(tmp_path / "hf", {**ROUTED, "quantization_config": gptq()}, tensors)) as store:
        router = values["model.layers.0.mlp.gate_proj.weight"]
        assert (store.array("layers.0.ffn.router").reshape(router.shape) == router).all()


def test_a_text_model_within_another_may_have_its_own_quantisation(tmp_path: Path) -> None:
    config = {**CONFIG, "text_config": {"quantization_config": compressed()}}
    tensors, _ = quantised(random_tensors(CONFIG), compressed())
    assert Checkpoint.open(write_tensors(tmp_path, config, tensors)).native.experts == "int4"


def test_a_config_alone_says_what_is_quantised() -> None:
    ignore = ["lm_head", "model.layers.0.self_attn.o_proj"]
    mix = native_mix({**CONFIG, "quantization_config": {**compressed(), "ignore": ignore}})
    assert (mix.experts, mix.attention, mix.head) == ("int4", "int4", "bf16")
    assert [mix.of_layer(layer).attention for layer in range(3)] == ["int4/int4/int4/bf16", "int4", "int4"]


@pytest.mark.parametrize(
    "words",
    [
        gptq(dynamic={r"-:model\.layers\.0\.self_attn.*": {}}),
        gptq(dynamic={r"-:.*\.(?:0)\.self_attn.*": {}, "+:.*down_proj": {"bits": 8}}),
        auto_round(extra_config={"model.layers.0.self_attn.o_proj": {"bits": 16}, "lm_head": {"bits": 8}}),
        auto_round(extra_config={r".*layers\.0\.self_attn.*": {"bits": 16}}),
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["model.layers.0.self_attn*"]},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head", "*.layers.0.*.o_proj"]},
    ],
)
def test_whatever_program_left_it_out_it_counts_as_bf16(words: dict[str, Any]) -> None:
    mix = native_mix({**CONFIG, "quantization_config": words})
    usual = "fp8" if words["quant_method"] == "modelopt" else "q4_0"
    left = "bf16" if "self_attn" in str(words).replace("self_attn.o_proj", "") else f"{usual}/{usual}/{usual}/bf16"
    assert [mix.of_layer(layer).attention for layer in range(3)] == [left, usual, usual] and mix.experts == usual


FLOATS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "minmax"}
INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("words", "experts", "attention"),
    [
        (  # a MiniMax whose experts alone have 4 bits
            {
                "format": "mixed-precision",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {**FLOATS, "strategy": "block", "block_structure": [128, 128]},
                        "input_activations": INPUTS,
                        "format": "float-quantized",
                    },
                    "group_1": {
                        "targets": ["re:.*block_sparse_moe.*"],
                        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
                        "input_activations": None,
                        "format": "pack-quantized",
                    },
                },
            },
            "fp8",
            "fp8",
        ),
        (  # a Qwen3-32B in int8
            {
                "format": "int-quantized",
                "config_groups": {
                    "group_0": {
                        "weights": {
                            "num_bits": 8,
                            "type": "int",
                            "strategy": "channel",
                            "actorder": None,
                            "group_size": None,
                        },
                        "input_activations": INPUTS,
                        "targets": ["Linear"],
                    }
                },
                "ignore": ["lm_head"],
                "kv_cache_scheme": None,
                "sparsity_config": {},
                "transform_config": {},
            },
            "int8",
            "int8",
        ),
        (
            {"format": "naive-quantized", "config_groups": {"group_0": {"weights": {**FLOATS, "strategy": "tensor"}}}},
            "fp8",
            "fp8",
        ),
        (  # AutoRound for GPTQ, with a line for each module that it left out
            {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 128,
                "sym": True,
                "data_type": "int",
                "provider": "auto-round",
                "dynamic": {
                    rf"-:.*model\.layers\.{layer}\.self_attn\.{part}_proj.*": {} for layer in range(3) for part in "kv"
                },
                "desc_act": False,
                "lm_head": False,
                "damp_percent": 0.01,
                "modules_in_block_to_quantize": None,
            },
            "q4_0",
            "q4_0/bf16/bf16/q4_0",
        ),
        (  # AutoRound without calibration
            {
                "quant_method": "auto-round",
                "packing_format": "auto_round:auto_gptq",
                "bits": 4,
                "group_size": 128,
                "sym": True,
                "data_type": "int",
                "iters": 0,
                "model_free": True,
                "autoround_version": "0.14.2",
                "block_name_to_quantize": "model.language_model.layers",
                "extra_config": {
                    "lm_head": {"bits": 16, "data_type": "float"},
                    r".*mlp\.gate.*": {"bits": 16, "data_type": "float"},
                    "model.layers.0.input_layernorm": {"bits": 16, "data_type": "float"},
                },
            },
            "q4_0",
            "q4_0",
        ),
        (
            {
                "quant_method": "auto-round",
                "packing_format": "auto_round:llm_compressor",
                "bits": 4,
                "act_bits": 4,
                "data_type": "mx_fp",
                "act_data_type": "mx_fp",
                "group_size": 32,
                "act_group_size": 32,
                "sym": True,
            },
            "mxfp4",
            "mxfp4",
        ),
    ],
)
def test_words_that_programs_write_are_read(words: dict[str, Any], experts: str, attention: str) -> None:
    """As they stand in published config.json files and bug reports."""
    mix = native_mix({**CONFIG, "quantization_config": {"quant_method": "compressed-tensors", **words}})
    assert (mix.experts, mix.attention, mix.head) == (experts, attention, "bf16")


def test_modules_may_be_told_that_alone_are_quantised() -> None:
    inside = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"], ["mlp.up_proj"]]
    mix = native_mix({**CONFIG, "quantization_config": gptq(modules_in_block_to_quantize=inside)})
    assert (mix.attention, mix.experts, mix.dense) == ("q4_0", "bf16", "bf16")
    with pytest.raises(ConfigError, match="modules_in_block_to_quantize is"):
        native_mix({**CONFIG, "quantization_config": gptq(modules_in_block_to_quantize=[[7]])})


def test_expressions_say_what_is_left_out() -> None:
    """As Kimi-K2-Thinking is published."""
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    mix = native_mix({**CONFIG, "quantization_config": {**compressed(), "ignore": ignore}})
    assert (mix.experts, mix.attention, mix.dense, mix.head) == ("int4", "bf16", "bf16", "bf16")
    with pytest.raises(ConfigError, match=r"leaves out 're:\(a\+\)\+b', which is not understood"):
        native_mix({**CONFIG, "quantization_config": {**compressed(), "ignore": ["re:(a+)+b"]}})
    native_mix({**CONFIG, "quantization_config": {**compressed(), "ignore": ["re:(a+)+b"]}}, {})  # tensors say it


@pytest.mark.parametrize(
    ("expression", "name", "matches"),
    [
        (".*self_attn.*", "model.layers.3.self_attn.q_proj", True),
        (".*gate$", "model.layers.3.mlp.gate", True),
        (".*gate$", "model.layers.3.mlp.gate_proj", False),
        ("model\\.layers\\.0\\..*", "model.layers.0.mlp.up_proj", True),
        ("model\\.layers\\.0\\..*", "model.layers.10.mlp.up_proj", False),
        ("^lm_head$", "lm_head", True),
        ("layers.*", "model.layers.0", False),  # from the beginning, as re.match
        ("(?:a|b)x.*", "bxy", True),
        ("model\\.layers\\.\\d+\\.mlp\\..*", "model.layers.12.mlp.up_proj", True),
        ("model\\.layers\\.\\d+\\.mlp\\..*", "model.layers.x.mlp.up_proj", False),
        (".*layers.[3-5].self_attn.[qkv]_proj", "model.layers.4.self_attn.k_proj", True),
        (".*layers.[3-5].self_attn.[qkv]_proj", "model.layers.6.self_attn.k_proj", False),
    ],
)
def test_expressions_become_wildcards(expression: str, name: str, matches: bool) -> None:
    assert bool(re.match(expression, name)) == matches
    assert any(fnmatchcase(name, pattern) for pattern in wildcards(expression) or []) == matches


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+",
        "a{2}",
        "[ab]{2}",
        "[^a]",
        "(a|b)*",
        "a|b",
        "(a(b))",
        "x+",
        "(" + "|".join("abcdefgh") + ")" * 1 + "(a|b)" * 9,
    ],
)
def test_other_expressions_are_not_understood(expression: str) -> None:
    assert wildcards(expression) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (compressed(num_bits=3), "codes of 3 bits; those of 2, 4, 8 bits are read"),
        (compressed(strategy="tensor"), "weights.strategy is 'tensor'"),
        (compressed(type="float"), "weights.type is 'float'"),
        (compressed(group=48), "group_size is 48; it must be a multiple of 32"),
        ({**compressed(), "format": "mxfp6-pack-quantized"}, "format is 'mxfp6-pack-quantized'"),
        ({**compressed(), "transform_config": {"R3": {}}}, "transform_config is"),
        ({"quant_method": "mxfp8", "weight_block_size": [32, 32]}, r"weight_block_size is \[32, 32\]"),
        ({"quant_method": "mxfp8", "moe_quant_algo": "NVFP4"}, "moe_quant_algo is 'NVFP4'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        (quark("int4"), "weight.dtype is 'int4'"),
        ({"quant_method": "quark"}, "global_quant_config is None; it must have a weight"),
        ({**quark("fp4"), "algo_config": [{"name": "quarot"}]}, "algo_config is"),
        ({**quark("fp4"), "export": {"weight_format": "fake_quantized"}}, "weight_format is 'fake_quantized'"),
        (gptq(bits=5), "codes of 5 bits; those of 2, 3, 4, 8 bits are read"),
        (gptq(dynamic={"+:.*": {"bits": 6}}), "codes of 6 bits"),
        (gptq(dynamic={"+:.*": 4}), "quantization_config.dynamic is"),
        (auto_round(packing_format="auto_round:fake"), "packing_format is 'auto_round:fake'"),
        (auto_round(data_type="mx_int"), "data_type is 'mx_int'"),
        (auto_round(rotation_config={"algorithm": "hadamard"}), "rotation_config is"),
        (auto_round(extra_config={"lm_head": []}), "quantization_config.extra_config is"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'.*one of these kinds"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (awq(version="gemv"), "version is 'gemv'"),
        (awq(backend="llm-awq"), "backend is 'llm-awq'"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    source = write_tensors(tmp_path, {**CONFIG, "quantization_config": config}, random_tensors(CONFIG))
    with pytest.raises(ConfigError, match=message) as error:
        Checkpoint.open(source)
    assert "\n" not in str(error.value)


MODULE = "model.layers.0.mlp.experts.1.up_proj"


@pytest.mark.parametrize(
    ("config", "part", "change", "message"),
    [
        (gptq(), "scales", None, f"{MODULE}.scales is missing"),
        (gptq(), "scales", lambda a: a[:, :8], r"up_proj.scales has shape \[4, 8\]; codes and config.json ask for"),
        (gptq(), "scales", lambda a: a.astype("f8"), "scales is F64 of 2 dimensions; it must be BF16 or F16"),
        (gptq(), "scales", lambda a: a * np.float16(np.nan), "hold NaN or infinity"),
        (gptq(), "qweight", lambda a: a.astype("i8"), "qweight is I64 of 2 dimensions"),
        (gptq(), "qzeros", lambda a: a + 1, "has zeros other than 8"),
        (gptq(), "g_idx", lambda a: a[::-1].copy(), "groups in another order than inputs, which q4_0 does not hold"),
        (gptq(), "g_idx", lambda a: a + 2**30, r"has the groups \[1073741824, "),
        (compressed(), "weight_scale", lambda a: a * 0 + 3e38, "make its values infinite"),
        (gptq(), "g_idx", lambda a: a + 1, r"has the groups \[1, 1, 1, 1\] ... in g_idx"),
        (gptq(), "g_idx", lambda a: a - 1, r"has the groups \[-1, -1, -1, -1\] ... in g_idx"),
        (gptq(), "g_idx", lambda a: a.astype("f4"), "g_idx is F32 of 1 dimensions; it must be I32 or I64 of 1"),
        (gptq(), "g_idx", lambda a: a[:9].copy(), r"g_idx has shape \[9\]"),
        (awq(), "qzeros", None, f"{MODULE}.qzeros is missing"),
        (compressed(symmetric=False), "weight_zero_point", None, "down_proj.weight_zero_point is missing"),
        (compressed(), "weight_shape", lambda a: a[::-1].copy(), r"has the weight_shape \[128, 64\]"),
        (awq(), "scales", lambda a: np.full_like(a, np.nan), "NaN"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, config: dict[str, Any], part: str, change: Any, message: str
) -> None:
    tensors, _ = quantised(random_tensors(CONFIG), config)
    name = f"{MODULE}.{part}"
    if change is None:
        tensors.pop(name, None)
    else:
        tensors[name] = change(tensors[name])
    source = write_tensors(tmp_path / "hf", {**CONFIG, "quantization_config": config}, tensors)
    with pytest.raises(WeightsError, match=message) as error:
        packed(source)
    assert "\n" not in str(error.value)


def test_a_matrix_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors, _ = quantised(random_tensors(CONFIG), gptq())
    other = {**CONFIG, "moe_intermediate_size": 32, "quantization_config": gptq()}
    with pytest.raises(WeightsError, match=r"has shape \[64, 128\], config.json asks for \[32, 128\]"):
        Checkpoint.open(write_tensors(tmp_path, other, tensors)).check()
    assert model_spec(other).hidden == 128
