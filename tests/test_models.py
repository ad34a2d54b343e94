"""Families read config.json as transformers does, in both of its styles, and refuse what makes no model."""

from __future__ import annotations

from typing import Any

import pytest
from configs import CONFIGS, OTHER_NAMES
from oracle import recorded_json

from hybrid.errors import ConfigError
from hybrid.models import model_spec, supported_models
from hybrid.models.layers.router import Router
from hybrid.models.layers.short_conv import ShortConv
from hybrid.models.rope import Growth
from hybrid.models.spec import ModelSpec


def test_families_are_found_by_file_name() -> None:
    assert supported_models() == tuple(sorted([*CONFIGS, *OTHER_NAMES]))


@pytest.mark.parametrize("model_type", ["gpt2", "rope", "spec", None, 3, ["llama"]])
def test_unsupported_families_are_refused_with_the_supported_ones(model_type: Any) -> None:
    with pytest.raises(ConfigError, match=", ".join(sorted([*CONFIGS, *OTHER_NAMES]))):
        model_spec({**CONFIGS["llama"], "model_type": model_type})


def as_transformers_has_it(config: dict[str, Any]) -> dict[str, Any]:
    """All fields of its configuration class."""

    def compute() -> dict[str, Any]:
        from transformers import AutoConfig

        return AutoConfig.for_model(**config).to_dict()

    return recorded_json("configs", config, compute)


@pytest.mark.parametrize("family", CONFIGS)
def test_config_of_transformers_5_gives_the_same_spec(family: str) -> None:
    """transformers reads the old style and writes the new one."""
    rewritten = as_transformers_has_it(CONFIGS[family])
    without = (
        "kimi_linear",
        "bailing_hybrid",
        "deepseek_v4",
        "nemotron_h",
        "glm5_next_text",
        "cohere2_moe",
    )  # fields of their own, or no rope
    if family not in without:
        assert "rope_parameters" in rewritten and "rope_theta" not in rewritten
    assert model_spec(rewritten) == model_spec(CONFIGS[family])


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Fields that may be missing are filled as the configuration class fills them."""
    sizes = {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size"}
    sizes |= {"num_experts", "num_local_experts", "num_experts_per_tok", "model_type", "num_attention_heads"}
    sizes |= {"shared_expert_intermediate_size", "n_routed_experts", "moe_num_experts", "moe_k", "moe_topk"}
    sizes |= {"hidden_size_per_layer_input"}  # whose default is not computed
    if family == "qwen4_exp_text":  # whose indexers have no defaults, and whose heads must fit theirs
        sizes |= {name for name in CONFIGS[family] if name.startswith("indexer_")}
        sizes |= {"head_dim", "partial_rotary_factor"}
    sizes |= {"n_shared_experts"} if family == "dots1" else set()  # has none with which transformers computes
    config = {name: value for name, value in CONFIGS[family].items() if name in sizes}
    config |= {"hidden_size": 4096, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 32} if family == "glm5_next_text" else {}  # whose default does not fit
    for name in ("n_routed_experts", *(["num_experts"] if family == "bailing_hybrid" else [])):  # enough for groups
        config |= {name: 32} if name in config else {}
    filled = as_transformers_has_it(config)
    if "kv_lora_rank" in filled:
        del filled["num_key_value_heads"]  # which fits its own default of heads alone, and says nothing
    assert model_spec(config) == model_spec({**filled, "head_dim": filled.get("head_dim")})


def test_qwen3_moe_layers_may_be_dense() -> None:
    spec = _spec("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.feed_forward.is_moe for layer in spec.layers] == [False, True, False, False, False, True]
    assert [layer.feed_forward.intermediate for layer in spec.layers] == [72, 40, 72, 72, 72, 40]


def test_router_renormalises_as_the_family_does() -> None:
    assert _spec("mixtral").layers[0].feed_forward.router == Router(2, "softmax", renormalise=True)
    moe = {name: value for name, value in CONFIGS["qwen3_moe"].items() if name != "norm_topk_prob"}
    assert model_spec(moe).layers[0].feed_forward.router == Router(3, "softmax", renormalise=False)


def test_glm4_moe_chooses_among_groups_and_shares_an_expert() -> None:
    dense, *sparse = _spec("glm4_moe").layers
    assert not dense.feed_forward.is_moe and dense.mixer.rope.dim == 12
    router = Router(3, "sigmoid", scale=1.5, correction=True, groups=2, top_groups=1)
    assert [(layer.feed_forward.router, layer.feed_forward.shared_intermediate) for layer in sparse] == [
        (router, 80)
    ] * 2


def test_hunyuan_may_choose_more_experts_in_some_layers() -> None:
    layers = _spec("hunyuan_v1_moe", moe_topk=[2, 3]).layers
    assert [layer.feed_forward.router.top_k for layer in layers] == [2, 3]
    assert all(layer.mixer.norm_last for layer in layers)


def test_the_stretched_base_of_hunyuan_is_that_of_transformers() -> None:
    rope = (
        _spec("hunyuan_v1_moe", rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0}).layers[0].mixer.rope
    )
    assert rope.kind == "default" and rope.theta == 10000.0 * 1000.0 ** (24 / 22)


def test_ernie_has_experts_in_a_run_of_layers() -> None:
    spec = _spec(
        "ernie4_5_moe", num_hidden_layers=6, moe_layer_start_index=1, moe_layer_end_index=4, moe_layer_interval=2
    )
    assert [layer.feed_forward.is_moe for layer in spec.layers] == [False, True, False, True, False, False]


def test_gpt_oss_has_its_own_router_and_experts() -> None:
    spec = _spec("gpt_oss")
    for layer in spec.layers:
        assert layer.feed_forward.router == Router(3, "topk_softmax", bias=True)
        assert (layer.feed_forward.activation, layer.feed_forward.bias) == ("swiglu_clamped", True)
        assert layer.mixer.sinks and layer.mixer.qkv_bias and layer.mixer.out_bias
    assert not _spec("gpt_oss", attention_bias=False).layers[0].mixer.out_bias


def test_gpt_oss_turns_by_yarn_unless_it_is_told_otherwise() -> None:
    """As its configuration class does; `test_defaults_are_those_of_transformers` compares the numbers."""
    for nothing in ({"rope_scaling": None}, {"rope_scaling": None, "rope_parameters": None}):
        rope = _spec("gpt_oss", **nothing).layers[0].mixer.rope
        assert rope is not None and rope.kind == "yarn"
        assert dict(rope.parameters)["factor"] == 32.0 and dict(rope.parameters)["truncate"] is False
    plain = _spec("gpt_oss", rope_scaling={"rope_type": "default"}).layers[0].mixer.rope
    assert plain is not None and plain.kind == "default"


def test_qwen2_moe_has_a_shared_expert_with_a_gate() -> None:
    first, dense, _ = _spec("qwen2_moe").layers
    assert (first.feed_forward.shared_intermediate, first.feed_forward.shared_gate) == (56, True)
    assert (dense.feed_forward.shared_intermediate, dense.feed_forward.is_moe) == (0, False)
    assert first.mixer.qkv_bias and not first.mixer.out_bias
    assert not _spec("qwen2_moe", qkv_bias=False).layers[0].mixer.qkv_bias


def test_sarvam_has_words_of_its_own() -> None:
    """Those of the published configurations."""
    config = CONFIGS["sarvam_mla"]
    words = {"num_shared_experts": config["n_shared_experts"], "score_function": "sigmoid", "n_group": None}
    named = {**config["rope_scaling"], "type": "deepseek_yarn"}
    del named["rope_type"]
    own = {name: value for name, value in config.items() if name != "n_shared_experts"}
    assert model_spec({**own, **words, "rope_scaling": named}) == model_spec(config)
    assert model_spec({**CONFIGS["sarvam_moe"], "use_qkv_bias": True}).layers[0].mixer.qkv_bias  # type: ignore[attr-defined]


def test_lfm2_layers_attend_or_convolve() -> None:
    """By name, or by the numbers of those that attend; the published files have the older names of sizes."""
    config = {name: value for name, value in CONFIGS["lfm2"].items() if name not in ("layer_types", "conv_bias")}
    published = {"full_attn_idxs": [1], "block_ff_dim": 96, "tie_embedding": True, "conv_bias": False}
    spec = model_spec({**config, "tie_word_embeddings": None, **published})
    kinds = [type(layer.mixer).__name__ for layer in spec.layers]
    assert kinds == ["ShortConv", "GroupedQueryAttention", "ShortConv", "ShortConv"]
    assert spec.tied and spec.layers[0].mixer == ShortConv(96, 4) and spec.layers[1].mixer.qk_norm == "head"
    assert [layer.feed_forward.intermediate for layer in spec.layers] == [64] * 4  # two thirds of 96
    kept = model_spec({**config, "block_auto_adjust_ff_dim": False})
    assert kept.layers[0].feed_forward.intermediate == 72
    assert model_spec(config).layers[0].mixer.__class__.__name__ == "GroupedQueryAttention"
    with pytest.raises(ConfigError, match="conv_L_cache is 9; it must be an integer from 2 to 8"):
        model_spec({**config, "conv_L_cache": 9})


def test_experts_are_counted_under_both_names() -> None:
    config = dict(CONFIGS["qwen3_moe"])
    config["num_local_experts"] = config.pop("num_experts")
    assert model_spec(config).layers[0].feed_forward.experts == 10


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 16}, [None, None]),
        ("mixtral", {"sliding_window": None}, [None, None]),
        ("mixtral", {"sliding_window": 16}, [16, 16]),
        ("qwen3_moe", {"sliding_window": 16}, [None, None, None]),
        ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": True}, [16, 16, 16]),
        ("qwen3_moe", {"use_sliding_window": True}, [4096, 4096, 4096]),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, [None, 16]),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, [None, None]),
        ("qwen3", {"sliding_window": 16, "max_window_layers": 0}, [None, None]),
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [16, None],
        ),
        ("qwen2_moe", {"sliding_window": 16}, [None, None, None]),
        ("qwen2_moe", {"sliding_window": 16, "use_sliding_window": True}, [16, None, 16]),
        ("qwen2_moe", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, [16, None, None]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, [20, 20]),
        ("mistral", {"model_type": "ministral", "layer_types": ["sliding_attention", "full_attention"]}, [20, None]),
        ("mistral", {"model_type": "ministral"}, [20, 20]),
        ("mistral", {"model_type": "ministral", "sliding_window": None}, [None, None]),
        ("smollm3", {"sliding_window": 16, "use_sliding_window": True}, [None, None, None, 16]),
        ("dots1", {"sliding_window": 16, "max_window_layers": 1}, [None, 16]),
        ("olmo3", {"layer_types": None}, [20, 20, 20, None]),
        ("olmo3", {"layer_types": None, "sliding_window": None}, [None] * 4),
        ("exaone4", {"layer_types": None}, [20, 20, 20, None]),
        ("exaone4", {"sliding_window_pattern": 2}, [20, None, 20, None]),
        ("exaone4", {"sliding_window": None}, [None] * 4),
        ("exaone4", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, [None, None, None, 20]),
        ("exaone_moe", {"layer_types": None}, [20, 20, 20, None]),
        ("mellum", {"sliding_window": 16}, [16, None, 16]),
        ("mellum", {"layer_types": None}, [None] * 3),
        ("laguna", {"sliding_window": 16}, [None, 16, None]),
        ("laguna", {"layer_types": None}, [None] * 3),
        ("afmoe", {}, [20, None, 20, None]),
        ("afmoe", {"global_attn_every_n_layers": None, "sliding_window": None}, [1024, 1024, 1024, None]),
        ("gpt_oss", {"num_hidden_layers": 3}, [20, None, 20]),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, [None, 20]),
        ("gpt_oss", {"sliding_window": None, "layer_types": ["full_attention"] * 2}, [None, None]),
    ],
)
def test_windows_are_those_of_the_family(family: str, changes: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.mixer.window for layer in _spec(family, **changes).layers] == windows


@pytest.mark.parametrize(("family", "length"), [("ministral3", 16_384), ("mistral4", 8192)])
def test_a_rope_of_which_nothing_is_said_is_that_of_the_family(family: str, length: int) -> None:
    """As transformers has it, whatever `rope_theta` says."""
    rope = _spec(family, rope_scaling=None, rope_theta=5.0).layers[0].mixer.rope
    assert (rope.kind, rope.growth) == ("yarn", Growth(0.1, length)) and rope.theta > 5


@pytest.mark.parametrize("family", ["mistral", "ministral3", "mistral4"])
def test_the_text_of_mistral3_is_of_one_of_several_families(family: str) -> None:
    whole = model_spec({"model_type": "mistral3", "text_config": CONFIGS[family]})
    assert [layer.mixer for layer in whole.layers] == [
        layer.mixer for layer in _spec(family).inside("language_model").layers
    ]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be an integer from 1 to 1000000"),
        ({"hidden_size": -96}, "hidden_size is -96"),
        ({"hidden_size": "96"}, "hidden_size is '96'"),
        ({"hidden_size": 96.0}, "hidden_size is 96.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 10**7}, "hidden_size is 10000000"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"vocab_size": None}, "vocab_size is missing"),
        (
            {"num_attention_heads": 5},
            "num_attention_heads 5 is not a multiple of (swa_)?num_key_value_heads [26]|num_key_value_heads is 6.*or 5"
            "|o_groups 2 of 5 heads",
        ),
        ({"head_dim": 23, "qk_rope_head_dim": 23}, "odd|even|qk_rope_head_dim is 23; it must be absent or 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*silu"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ],
)
def test_bad_values_are_named_in_one_line(family: str, changes: dict[str, Any], message: str) -> None:
    if family in ("gemma2", "gemma3_text", "gemma4_text") and "hidden_act" in changes:
        changes, message = {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'.*gelu_pytorch_tanh"
    if family in ("kimi_linear", "glm5_next_text") and "rope_theta" in changes:
        pytest.skip("it has no rope")
    if family == "nemotron_h" and "hidden_act" in changes:
        changes, message = {"mlp_hidden_act": "gelu"}, "mlp_hidden_act is 'gelu'.*relu2"
    with pytest.raises(ConfigError, match=message) as error:
        _spec(family, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm is True; it must be absent or False"),
        ("cohere2", {"head_dim": 20}, "head_dim is 20; it must be absent or 16"),
        ("bamba", {"attn_layer_indices": [3]}, r"attn_layer_indices is \[3\]; .* numbers of layers, from 0 to 2"),
        ("sarvam_mla", {"score_function": "softmax"}, "scoring_func is 'softmax'"),
        ("sarvam_moe", {"use_bias": True}, "use_bias is True; it must be absent or False"),
        ("granitemoehybrid", {"mamba_d_head": 25}, "mamba_n_heads 8 of mamba_d_head 25 are not mamba_expand times hid"),
        ("granitemoehybrid", {"residual_multiplier": 1e-320}, "residual_multiplier is 1e-320; .* from 1e-15 to 1e"),
        ("granitemoehybrid", {"normalization_function": "layernorm"}, "normalization_function is 'layernorm'"),
        ("granitemoehybrid", {"mamba_n_groups": 3}, "8 heads of Mamba-2 in 3 groups are not as many in each"),
        ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba_proj_bias is True; it must be absent or False"),
        ("granitemoehybrid", {"time_step_limit": [1.0, 0.5]}, "time_step_limit is .* must be two numbers from 0 on"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ("nemotron_h", {"moe_latent_size": "32"}, "moe_latent_size is '32'; it must be an integer from 1 to 1000000"),
        ("nemotron_h", {"layers_block_type": ["conv"]}, "a list of mamba, linear_attention, attention"),
        ("nemotron_h", {"layers_block_type": []}, "a list of mamba, linear_attention, attention"),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias is True; it must be absent or False"),
        ("nemotron_h", {"mamba_head_dim": 257}, "mamba_head_dim is 257; it must be an integer from 1 to 256"),
        ("qwen3_moe", {"num_experts_per_tok": 11}, "num_experts_per_tok is 11.*from 1 to 10"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("qwen3_moe", {"num_experts": None}, "num_experts is missing"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is missing"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, r"no_rope_layers is \[1, 0, 1\], 3 numbers"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}, r"no_rope_layers is \[1, 0, 1, 2\], 4 numbers"),
        ("dots1", {"n_group": 3}, "8 experts in n_group 3 groups"),
        ("glm4_moe", {"n_group": 3}, "8 experts in n_group 3 groups"),
        ("glm4_moe", {"n_group": 8}, "8 experts in n_group 8 groups"),
        ("glm4_moe", {"num_experts_per_tok": 5}, "topk_group 1 are chosen among, cannot give each token 5"),
        ("glm4_moe", {"topk_group": 3}, "topk_group is 3"),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 of heads of 24 dimensions"),
        ("glm4_moe", {"partial_rotary_factor": 0.01}, "turns 0"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern is 'LLLG'"),
        ("olmo3", {"sliding_window": None}, "layer_types is .*a list of 4 of full_attention"),
        ("mistral", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta is 0.1; .* absent or 0"),
        ("laguna", {"num_attention_heads_per_layer": [6, 4]}, r"per_layer is \[6, 4\]; .*a list of 3 multiples of .*2"),
        ("laguna", {"num_attention_heads_per_layer": [6, 4, 7]}, r"per_layer is \[6, 4, 7\]; .*a list of 3 multiples"),
        ("laguna", {"gating": False}, "gating is False; .*one of the supported per-head, per-element"),
        ("laguna", {"attention_bias": True}, "attention_bias is True; .*absent or False"),
        ("laguna", {"norm_topk_prob": False}, "norm_topk_prob is False; .*absent or True"),
        ("laguna", {"swa_attention_sink_enabled": True}, "swa_attention_sink_enabled is True; .*absent or False"),
        ("laguna", {"gating_types": ["per_element"] * 3}, "gating_types is .*, and gating per-head, which are not the"),
        ("laguna", {"gating_types": 0.5}, "gating_types is 0.5, and gating per-head"),
        ("laguna", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; .*absent or 1"),
        (
            "laguna",
            {"rope_parameters": None, "rope_scaling": {"type": "yarn"}},
            "rope_scaling is .*; it must be absent",
        ),
        ("laguna", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object with one for each kind"),
        ("gemma4_text", {"rope_parameters": {"rope_theta": 7.0}}, "must be an object with one for each kind of layer"),
        ("laguna", {"moe_apply_router_weight_on_input": True}, "weight_on_input is True; .*absent or False"),
        ("laguna", {"moe_router_logit_softcapping": -1.0}, "softcapping is -1.0; .*a number above 0"),
        ("afmoe", {"attention_bias": True}, "attention_bias is True; .*absent or False"),
        ("afmoe", {"score_func": "softmax"}, "score_func is 'softmax'; .*one of the supported sigmoid"),
        ("afmoe", {"route_norm": False}, "route_norm is False; .*absent or True"),
        ("afmoe", {"n_group": 2}, "n_group is 2; .*absent or 1"),
        ("afmoe", {"num_expert_groups": 2}, "num_expert_groups is 2; .*absent or 1"),
        ("hy_v3", {"mlp_bias": True}, "mlp_bias is True; .* absent or False"),
        ("hy_v3", {"mlp_layer_types": ["dense"]}, "mlp_layer_types is .*a list of 3 of dense, sparse"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("lfm2_moe", {"num_dense_layers": -1}, "num_dense_layers is -1"),
        ("mistral4", {"n_group": 2}, "n_group is 2; .* absent or 1"),
        (
            "mistral4",
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"rope_scaling\.partial_rotary_factor is 0\.5; .* absent or 0\.375",
        ),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank is null; it must be a number, the size of the latents"),
        ("glm_moe_dsa", {"q_lora_rank": None}, "q_lora_rank is null"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("minimax_m2", {"n_group": 2}, "n_group is 2"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias is True"),
        ("hunyuan_v1_moe", {"moe_topk": [2]}, "moe_topk has 1 entries, and there is a layer 1"),
        ("hunyuan_v1_moe", {"moe_topk": [2, "x"]}, "moe_topk is 'x'"),
        ("hunyuan_v1_moe", {"rope_scaling": {"type": "linear", "alpha": 2.0}}, "type is 'linear'"),
        ("granitemoe", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("llama", {"head_dim": None, "hidden_size": 97}, "97 is not a multiple of num_attention_heads 6"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types.*a list of 2"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mixtral", {"sliding_window": 0}, "sliding_window is 0"),
        ("gpt_oss", {"sliding_window": None}, "layer_types is .*sliding_attention.*a list of 2 of full_attention"),
        ("gpt_oss", {"swiglu_limit": 8.0}, r"swiglu_limit is 8\.0; it must be absent or 7\.0"),
        ("gpt_oss", {"swiglu_alpha": 1.7}, r"swiglu_alpha is 1\.7; it must be absent or 1\.702"),
    ],
)
def test_bad_values_of_a_family_are_named(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _spec(family, **changes)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen3", "gpt_oss", "smollm3"])
def test_null_means_a_key_head_for_each_query_head_and_an_even_share(family: str) -> None:
    """What a family takes for a field that is missing is another matter."""
    attention = _spec(family, num_key_value_heads=None, head_dim=None).layers[0].mixer
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (6, 6, 16)


def test_null_numbers_are_those_of_transformers() -> None:
    """Where its classes take them."""
    for family in ("mistral", "mixtral", "llama"):
        rewritten = as_transformers_has_it({**CONFIGS[family], "head_dim": None})
        assert model_spec(rewritten) == _spec(family, head_dim=None)


@pytest.mark.parametrize(("family", "rank"), [("deepseek_v3", 0), ("deepseek_v2", 0), ("glm4_moe_lite", 0)])
def test_queries_without_latents(family: str, rank: int) -> None:
    assert _spec(family, q_lora_rank=None).layers[0].mixer.q_rank == rank


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"])
def test_magnitudes_of_zero_say_nothing(family: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    zeros = {**yarn, "mscale": 0, "mscale_all_dim": 0.0}
    attention = _spec(family, rope_scaling=zeros).layers[0].mixer
    assert attention == _spec(family, rope_scaling=yarn).layers[0].mixer
    assert attention.scale == pytest.approx((attention.nope_dim + attention.rope.dim) ** -0.5)


def test_head_dim_defaults_to_an_even_share() -> None:
    attention = _spec("llama", head_dim=None).layers[0].mixer
    assert (attention.head_dim, attention.heads, attention.kv_heads) == (16, 6, 2)


def _spec(family: str, **changes: Any) -> ModelSpec:
    return model_spec({**CONFIGS[family], **changes})
