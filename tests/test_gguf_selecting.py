"""GGUF files of models that select what they attend to: what may differ in them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf
from test_gguf_models import model, packed, same_stores

from hybrid.errors import WeightsError
from hybrid.weights.checkpoints.opening import open_checkpoint

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "blocks of M3": (
        "minimax_m3_vl_text",
        {"minimax-m3.attention.indexer.top_k": None},
        "lacks minimax-m3.attention.indexer.top_k, which must be an integer",
    ),
    "size of blocks": ("minimax_m3_vl_text", {"minimax-m3.attention.indexer.block_size": 64}, "index_block_size"),
    "shared experts": ("minimax_m3_vl_text", {"minimax-m3.expert_shared_count": 2}, "n_shared_experts"),
    "gates of V4": (
        "deepseek_v4",
        {"deepseek4.expert_gating_func": 2},
        r"expert_gating_func 2; it must be 4 \(root of softplus\)",
    ),
    "too few ratios": (
        "deepseek_v4",
        {"deepseek4.attention.compress_ratios": [0, 4]},
        r"compress_ratios \[0, 4\]; it must be an integer, or one for each of 4 layers",
    ),
    "ratio": (
        "deepseek_v4",
        {"deepseek4.attention.compress_ratios": [0, 4, 16, 4]},
        r"compress_ratios is \[0, 4, 16, 4\]; it must have one of 0, 4, 128",
    ),
    "bound": ("deepseek_v4", {"deepseek4.swiglu_clamp_exp": 7.0}, "swiglu_limit"),
    "two bounds": ("deepseek_v4", {"deepseek4.swiglu_clamp_shexp": 7.0}, "7.0; it must be 10, as swiglu_clamp_exp"),
    "no bound": ("deepseek_v4", {"deepseek4.swiglu_clamp_exp": None}, "lacks deepseek4.swiglu_clamp_exp"),
    "norm of keys": (
        "glm5_next_text",
        {"glm5-next.attention.layer_norm_epsilon": 1e-5},
        r"layer_norm_epsilon 9\.99\d*e-06; it must be 1e-06",
    ),
    "pools": ("glm5_next_text", {"glm5-next.attention.indexer.kpool": None}, "lacks glm5-next.attention.indexer.kpool"),
    "last pool": ("glm5_next_text", {"glm5-next.attention.indexer.kpool_select_tail": False}, "always_select_tail"),
    "turned": ("glm5_next_text", {"glm5-next.rope.dimension_count": 12}, "qk_rope_head_dim"),
    "shared indexers": (
        "glm5_next_text",
        {"glm5-next.attention.indexer.types": [True, False, True, True]},
        "indexer_types says shared of layer 1",
    ),
    "no streams": (
        "glm5_next_text",
        {"glm5-next.hyper_connection.count": None},
        "lacks glm5-next.hyper_connection.count",
    ),
    "weights of M3": (
        "minimax_m3_vl_text",
        {"minimax-m3.expert_weights_norm": False},
        "expert_weights_norm False; it must be true",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_cannot_be(tmp_path: Path, case: str) -> None:
    family, changes, message = WRONG[case]
    config, tensors = model(family)
    metadata = {name: item for name, item in {**gguf_metadata(config), **changes}.items() if item is not None}
    path = write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(config, tensors))
    with pytest.raises(WeightsError, match=message) as raised:
        open_checkpoint(path).check()
    assert "\n" not in str(raised.value)


def test_layers_of_v4_that_predict_further_tokens_count_where_they_are(tmp_path: Path) -> None:
    """Files tell of one, whether they have it or not."""
    config, tensors = model("deepseek_v4")
    metadata, found = gguf_metadata(config), gguf_tensors(config, tensors)
    more = {f"blk.4.{name}.weight": np.ones((4, 4), np.float32) for name in ("attn_kv", "nextn.e_proj")}
    paths = (
        write_gguf(tmp_path / "without.gguf", metadata, found),
        write_gguf(tmp_path / "with.gguf", {**metadata, "deepseek4.block_count": 5}, {**found, **more}),
    )
    assert metadata["deepseek4.nextn_predict_layers"] == 1
    for path in paths:
        checkpoint = open_checkpoint(path)
        checkpoint.check()
        assert len(checkpoint.spec.layers) == 4


def test_a_table_of_experts_is_of_integers(tmp_path: Path) -> None:
    config, tensors = model("deepseek_v4")
    name, found = "blk.0.ffn_gate_tid2eid.weight", gguf_tensors(config, tensors)
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), {**found, name: found[name].astype(np.float32)})
    with pytest.raises(WeightsError, match=f"tensor {name} has type F32, which is not read; read are I32, I64"):
        open_checkpoint(path).check()


@pytest.mark.parametrize(("expert", "least", "most"), [(-1, -1, 7), (8, 0, 8)])
def test_a_table_of_experts_names_those_that_there_are(tmp_path: Path, expert: int, least: int, most: int) -> None:
    config, tensors = model("deepseek_v4")
    name, found = "blk.0.ffn_gate_tid2eid.weight", gguf_tensors(config, tensors)
    found[name] = np.arange(found[name].size, dtype=np.int32).reshape(found[name].shape) % 8
    found[name][-1, 0] = expert
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), found)
    with pytest.raises(
        WeightsError, match=f"tensor {name} has numbers from {least} to {most}, they must be from 0 to 7"
    ):
        packed(path)


def test_an_early_file_of_minimax_m3_without_indexers_is_refused(tmp_path: Path) -> None:
    config, tensors = model("minimax_m3_vl_text")
    found = {name: array for name, array in gguf_tensors(config, tensors).items() if ".indexer." not in name}
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), found)
    with pytest.raises(WeightsError, match=r"tensor blk\.1\.indexer\.q_proj\.weight is missing"):
        open_checkpoint(path).check()


def test_the_first_files_of_glm_5_3_flash_have_another_word(tmp_path: Path) -> None:
    """Files of either have the layer that predicts further tokens, and may have no bound of decays."""
    config, tensors = model("glm5_next_text")
    metadata, found = gguf_metadata(config), gguf_tensors(config, tensors)
    ours = {name.replace("glm5-next.", "glm5next."): item for name, item in metadata.items()}
    ours |= {
        "general.architecture": "glm5next",
        "glm5next.block_count": 5,
        "glm5next.nextn_predict_layers": 1,
        "glm5next.attention.head_count_kv": [0, 1, 0, 1, 1],
        "glm5next.attention.indexer.types": [True] * 4,
        "glm5next.attention.indexer.kpool_select_tail": True,
    }
    more = {f"blk.4.{name}.weight": np.ones((4, 4), np.float32) for name in ("nextn.eh_proj", "indexer.attn_k")}
    theirs = packed(write_gguf(tmp_path / "first.gguf", metadata, found))
    with theirs, packed(write_gguf(tmp_path / "second.gguf", ours, {**found, **more})) as store:
        assert store.spec == theirs.spec and same_stores(store, theirs)
        assert store.spec.layers[0].mixer.lower_bound == -5  # type: ignore[attr-defined]
    del ours["glm5next.kda.gate_lower_bound"]
    unbounded = open_checkpoint(write_gguf(tmp_path / "third.gguf", ours, {**found, **more})).spec
    assert unbounded.layers[0].mixer.lower_bound == 0  # type: ignore[attr-defined]


def test_glm_5_3_flash_selects_nothing_in_short_contexts(tmp_path: Path) -> None:
    config, tensors = model("glm5_next_text")
    metadata = {**gguf_metadata(config), "glm5-next.context_length": 64}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(config, tensors)))
    checkpoint.check()
    assert not any(".indexer" in name for name, _ in checkpoint.spec.checkpoint_shapes("apart"))
