"""Gemma 4: how its configurations say what they say, and what of it is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS
from steps import in_chunks, open_engine, step

from hybrid.errors import ConfigError
from hybrid.models import model_spec
from hybrid.models.layers.parallel_feed_forward import ParallelFeedForward

CONFIG = CONFIGS["gemma4_text"]
# Of google/gemma-4-26B-A4B-it, as published.
LARGE = {
    "model_type": "gemma4_text", "attention_k_eq_v": True, "enable_moe_block": True, "final_logit_softcapping": 30.0,
    "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2816,
    "hidden_size_per_layer_input": 0, "intermediate_size": 2112,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 5,
    "max_position_embeddings": 262144, "moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128,
    "num_global_key_value_heads": 2, "num_hidden_layers": 30, "num_key_value_heads": 8, "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-06, "sliding_window": 1024, "tie_word_embeddings": True, "top_k_experts": 8,
    "use_bidirectional_attention": "vision", "use_double_wide_mlp": False, "vocab_size": 262144,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip


def test_the_large_model_is_what_it_says() -> None:
    spec = model_spec(LARGE)
    slides, everything = spec.layers[4].mixer, spec.layers[5].mixer
    assert (slides.head_dim, slides.kv_heads, slides.window, slides.keys_are_values) == (256, 8, 1024, False)
    assert (everything.head_dim, everything.kv_heads, everything.window, everything.keys_are_values) == (
        512,
        2,
        None,
        True,
    )
    assert (slides.scale, everything.scale, everything.value_norm, spec.logit_cap) == (1.0, 1.0, True, 30.0)
    half = spec.layers[0].feed_forward
    assert isinstance(half, ParallelFeedForward) and (half.experts, half.dense.intermediate) == (128, 2112)
    weights = sum(math.prod(shape) for _, shape in spec.checkpoint_shapes("fused"))
    assert 25e9 < weights < 26e9


def test_layers_that_have_their_sizes_by_number_are_the_same() -> None:
    by_layer = {str(layer): {"head_dim": 40, "num_key_value_heads": 3} for layer in (1, 2)}
    without = {name: value for name, value in CONFIG.items() if "global" not in name}
    assert model_spec({**without, "per_layer_config": by_layer}) == model_spec(CONFIG)


def test_numbers_of_layers_may_have_zeros_before_them() -> None:
    """As transformers writes them where there are ten or more."""
    kinds = ["sliding_attention", "full_attention"] * 6
    whole = {**CONFIG, "num_hidden_layers": 12, "layer_types": kinds}
    sizes = {"head_dim": 40, "num_key_value_heads": 3}
    without = {name: value for name, value in whole.items() if "global" not in name}
    by_layer = {f"{layer:02}": sizes for layer in range(1, 12, 2)}
    assert model_spec({**without, "per_layer_config": by_layer}) == model_spec(whole)
    for wrong in ({"01": sizes}, {**by_layer, "1": sizes}, {**by_layer, "x": sizes}, [sizes]):
        with pytest.raises(ConfigError, match="per_layer_config must give"):
            model_spec({**without, "per_layer_config": wrong})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input is 256, which means embeddings of its own"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1, which means layers that attend to the keys"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'; it must be absent or vision"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; it must be absent"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        ({"top_k_experts": 9}, "top_k_experts is 9.*num_experts"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"per_layer_config": {"1": {"head_dim": 40}}}, "per_layer_config must give the same head_dim"),
        ({"per_layer_config": {"1": {"head_dim": 40}, "2": {"head_dim": 20}}}, "per_layer_config must give the same"),
        ({"per_layer_config": {"1": {"window": 4}, "2": {"window": 4}}}, "per_layer_config must give the same"),
        ({"per_layer_config": []}, "per_layer_config must give the same"),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 1.5}}},
         "partial_rotary_factor is 1.5; it must be at most 1"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        model_spec({**CONFIG, **changes})
    assert "\n" not in str(error.value)


def test_whole_chunked_and_beside_others_are_the_same_bits_in_every_format_of_weights(tmp_path, isa) -> None:
    """And formats of 8 bits are near bf16, where rounding cannot send a row to another expert."""
    config = CONFIG | {"top_k_experts": CONFIG["num_experts"]}
    path, tokens = write_tensors(tmp_path / "hf", config, random_tensors(config)), np.arange(3, 93, dtype=np.int32)
    found = {}
    for text in ("bf16", "int8", "q8_0", "int4"):
        with open_engine(path, tmp_path / "cache", weight_format=text, isa=isa, batch_invariant=True) as engine:
            found[text] = step(engine, (0, 0, tokens))
            assert np.array_equal(in_chunks(engine, tokens, 7, slot=1), found[text]), text
            beside = step(engine, (2, 0, tokens[:9]), (3, 0, tokens))
            assert np.array_equal(beside[9:], found[text]), text
    for text in ("int8", "q8_0"):
        error = np.linalg.norm(found[text] - found["bf16"]) / np.linalg.norm(found["bf16"])
        assert 0 < error < 0.1, (text, error)
