"""Inverse frequencies agree with transformers, and bad parameters are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracle import recorded

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.models.rope import Growth, inverse_frequencies, read_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "default"},
    {"type": "linear", "factor": 3.0},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 512},
    YARN,
    {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1},
    {**YARN, "mscale": 1.0},
    {**YARN, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "truncate": False, "factor": 32.0},
    {**YARN, "mscale": 0, "mscale_all_dim": 0.0, "beta_fast": 0},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0},
    {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 131072},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16384},
]


def by_transformers(config: dict[str, Any], head_dim: int) -> np.ndarray:
    """Its frequencies, which are fp32, and then the factor on cosines and sines."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    llama = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim, **_copy(config))
    functions = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
    frequencies, factor = functions[llama.rope_parameters["rope_type"]](llama)
    return np.array([*frequencies.numpy(), factor], np.float64)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e6), (24, 10000.0), (64, 150000.0)])
def test_frequencies_equal_those_of_transformers(scaling: dict[str, Any] | None, head_dim: int, theta: float) -> None:
    config = {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": 131072}
    *expected, expected_factor = recorded("rope", [config, head_dim], lambda: by_transformers(config, head_dim))

    frequencies, factor = inverse_frequencies(_read(config, head_dim))

    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, np.float32(expected), rtol=4e-7, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_both_styles_of_config_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    assert _read(old) == _read(new)


def test_original_length_defaults_to_the_context_length() -> None:
    explicit = _read({"rope_scaling": {**YARN, "original_max_position_embeddings": 4096}})
    assert _read({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}) == explicit


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic"}}, "default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e300}}, "rope_scaling.factor is 1e.300; .* at most 1e.12"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate"),
        ({"rope_scaling": {**YARN, "mscale": -1}}, "mscale is -1"),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}, "rope_parameters.llama_4_scaling_beta is 0.1"),
    ],
)
def test_bad_parameters_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(config)


@pytest.mark.parametrize(
    ("scaling", "growth"),
    [
        ({**YARN, "llama_4_scaling_beta": 0.1}, Growth(0.1, YARN["original_max_position_embeddings"])),
        ({"rope_type": "default", "llama_4_scaling_beta": 0.2, "original_max_position_embeddings": 9}, Growth(0.2, 9)),
        ({"rope_type": "default", "llama_4_scaling_beta": 0.2}, Growth(0.2, 4096)),
        ({**YARN, "llama_4_scaling_beta": 0}, None),
        (YARN, None),
    ],
)
def test_late_queries_grow_where_a_family_has_it(scaling: dict[str, Any], growth: Growth | None) -> None:
    fields = Fields({"rope_parameters": scaling})
    assert read_rope(fields, 64, theta=10000.0, max_position=4096, grows=True).growth == growth


def test_growth_that_is_no_number_is_named() -> None:
    fields = Fields({"rope_parameters": {**YARN, "llama_4_scaling_beta": -0.1}})
    with pytest.raises(ConfigError, match=r"llama_4_scaling_beta is -0\.1; it must be a number above 0"):
        read_rope(fields, 64, theta=10000.0, max_position=4096, grows=True)


def test_a_kind_that_is_not_computed_is_refused() -> None:
    with pytest.raises(ConfigError, match="dynamic.*supported: default, linear, llama3, yarn"):
        inverse_frequencies(replace(_read({}), kind="dynamic"))


def _read(config: dict[str, Any], dim: int = 64):
    length = config.get("max_position_embeddings", 4096)
    return read_rope(Fields(config), dim, theta=10000.0, max_position=length)


def _copy(config: dict[str, Any]) -> dict[str, Any]:
    """transformers writes into the scaling it is given."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_angles_that_are_not_finite_are_refused(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """A factor so small is refused where it is read, too."""
    config = {"rope_scaling": {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 64}}
    rope = _read(config)
    parameters = tuple((name, 5e-324 if name == "factor" else value) for name, value in rope.parameters)
    with pytest.raises(ConfigError, match="not finite .*5e-324"):
        inverse_frequencies(replace(rope, parameters=parameters))
    with pytest.raises(ConfigError, match="factor is 5e-324; it must be a number from 1e-15"):
        _read({"rope_scaling": {**config["rope_scaling"], "factor": 5e-324}})
    assert not recwarn
