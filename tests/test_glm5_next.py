"""GLM-5.3-Flash: what is published, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from configs import CONFIGS

from hybrid.errors import ConfigError
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec
from hybrid.models.layers.base import Load
from hybrid.models.layers.indexed import IndexedAttention
from hybrid.models.layers.kimi_delta import KimiDeltaAttention
from hybrid.models.layers.latent import LatentAttention
from hybrid.models.layers.pool_indexer import PoolIndexer

CONFIG = CONFIGS["glm5_next_text"]
PLAIN = {"model_type": "glm5_next_text", "vocab_size": 154880, "hidden_size": 4096, "intermediate_size": 12288,
         "moe_intermediate_size": 2048, "num_hidden_layers": 45, "num_attention_heads": 64, "n_routed_experts": 288,
         "num_experts_per_tok": 8}  # fmt: skip


def test_layers_are_those_that_are_published() -> None:
    spec = model_spec(PLAIN)
    delta, attention = spec.layers[0].mixer, spec.layers[3].mixer
    assert isinstance(delta, KimiDeltaAttention) and (delta.rank, delta.lower_bound, delta.rates) == (128, -5, (64,))
    assert isinstance(attention, IndexedAttention) and isinstance(attention.indexer, PoolIndexer)
    assert (attention.rope, attention.row_dim, attention.key_dim, attention.latent_eps) == (None, 512, 544, 1e-5)
    assert attention.selects == attention.indexer.tokens == 2063 and attention.scale == 256**-0.5
    assert [layer for layer in range(45) if spec.layers[layer].mixer == attention] == list(range(3, 45, 4))
    assert spec.moe_layers == tuple(range(3, 45)) and spec.streams and spec.streams.head is None
    assert all(layer.feed_forward.activation == "silu_clamped" for layer in spec.layers)


def test_a_configuration_of_text_alone_is_that_of_the_text_within_the_whole() -> None:
    flat = model_spec({**CONFIG, "model_type": "glm5_next"})
    assert flat == model_spec({"model_type": "glm5_next", "text_config": CONFIG})
    names = {name for name, _ in flat.checkpoint_shapes()}
    assert "model.language_model.layers.0.hc_attn_fn" in names and "lm_head.weight" in names


def test_words_as_published_are_those_of_transformers() -> None:
    """Those of the nested object count; no bound there is the usual one unless decays are said to have none."""
    rest = {name: value for name, value in CONFIG.items() if not name.startswith("linear_")}
    words = {"head_dim": 20, "num_heads": 3, "short_conv_kernel_size": 4}
    assert model_spec({**rest, "linear_attn_config": words}) == model_spec(CONFIG)
    assert model_spec({**CONFIG, "linear_attn_config": {"gate_lower_bound": None}}) == model_spec(CONFIG)
    for changes in (
        {"linear_lower_bound": None},
        {"linear_attn_config": {"gate_lower_bound": None, "safe_gate": False}},
    ):
        delta = model_spec({**CONFIG, **changes}).layers[0].mixer
        assert isinstance(delta, KimiDeltaAttention) and delta.lower_bound == 0
    kinds = ["full_attention" if kind == "indexed_attention" else kind for kind in CONFIG["layer_types"]]
    assert model_spec({**CONFIG, "layer_types": kinds}) == model_spec(CONFIG)


def test_where_no_sequence_is_long_enough_nothing_selects() -> None:
    """As many tokens as are selected, and those of a pool that has not ended."""
    attention = model_spec({**CONFIG, "index_topk": 48}).layers[1].mixer
    assert isinstance(attention, IndexedAttention) and attention.selects == 51
    assert type(attention.within(51)) is LatentAttention and attention.within(52) is attention


def test_a_step_costs_what_it_reads_and_multiplies() -> None:
    """Of long sequences the keys of pools, and as many rows of attention as before."""
    spec = model_spec(CONFIG)
    place, mixer = spec.place(1, FormatMix.uniform("bf16")), spec.layers[1].mixer
    long, longer = (mixer.cost(place, Load(1, 1, tokens, float(tokens), "bf16")) for tokens in (1000, 2000))
    assert longer.bytes - long.bytes == 1000 / 4 * 32 * 2
    assert longer.flops - long.flops == 2 * 1000 / 4 * 3 * 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 12}, "qk_rope_head_dim is 12; it must be absent or 0"),
        ({"q_lora_rank": None}, "q_lora_rank is null"),
        ({"index_kpool": 12}, "index_kpool is 12, index_topk 200; the first must be a power of 2"),
        ({"index_kpool": 128}, "index_kpool is 128; it must be an integer from 2 to 64"),
        ({"index_topk": 202}, "index_topk 202; the first must be a power of 2, the second a multiple of it"),
        ({"index_head_dim": 21}, "index_head_dim is 21; it must be even"),
        ({"index_kpool_always_select_tail": False}, "index_kpool_always_select_tail is False"),
        ({"indexer_types": ["full", "full", "full", "shared"]}, "indexer_types says shared of layer 3, which attends"),
        ({"linear_lower_bound": 0.5}, "linear_lower_bound is 0.5; it must be below 0"),
        ({"swiglu_limit": 7.0}, "swiglu_limit is 7.0; it must be absent or 10.0"),
        ({"hc_mult": 9}, "hc_mult is 9; it must be an integer from 2 to 8"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIG, **changes})
