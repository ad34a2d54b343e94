"""Nemotron 3 Super: experts that read latents, and whose sum is projected back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS
from steps import in_chunks, open_engine, step

from hybrid.config import CacheConfig
from hybrid.formats.mix import MIXES
from hybrid.formats.rows import row_stride
from hybrid.models import model_spec
from hybrid.models.layers.latent_experts import LatentExperts
from hybrid.plan.passes.place_experts import CONTRIBUTIONS, placement_buffers

CONFIG = CONFIGS["nemotron_h"] | {"moe_latent_size": 44, "num_experts_per_tok": 8, "topk_group": 2}  # all experts
TOKENS = np.arange(3, 73, dtype=np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tensors(tmp_path_factory.mktemp("latent") / "hf", CONFIG, random_tensors(CONFIG))


def test_routed_experts_are_as_narrow_as_latents_and_the_shared_one_is_not() -> None:
    half = model_spec(CONFIG).layers[1].feed_forward
    assert isinstance(half, LatentExperts) and half.latent == 44
    shapes = dict(model_spec(CONFIG).checkpoint_shapes())
    mixer = "model.layers.1.mixer"
    assert shapes[f"{mixer}.experts.7.up_proj.weight"] == (40, 44)
    assert shapes[f"{mixer}.shared_experts.up_proj.weight"] == (56, 96)
    assert shapes[f"{mixer}.fc1_latent_proj.weight"] == (44, 96)
    assert not isinstance(model_spec(CONFIGS["nemotron_h"]).layers[1].feed_forward, LatentExperts)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "q4_k", "nvfp4", "bf16,dense=int8/int4,shared=int4"])
def test_bits_are_the_same_in_chunks_on_nodes_and_with_an_expert_cache(model: Path, format: str) -> None:
    """And near to bf16, as far as so few bits allow."""
    cache = model.parent / "cache"
    with open_engine(model, cache, weight_format="bf16") as engine:
        exact = step(engine, (0, 0, TOKENS))
    with open_engine(model, cache, weight_format=format) as engine:
        whole = step(engine, (0, 0, TOKENS))
        assert np.array_equal(whole, in_chunks(engine, TOKENS, 7, slot=1))
    assert np.linalg.norm(whole - exact) < 0.5 * np.linalg.norm(exact)
    experts = {"device": "simulated", "cache": CacheConfig(nblocks=2, nways=2)}
    with open_engine(model, cache, weight_format=format, **experts) as engine:
        for slot in range(3):  # the device computes experts from the second on
            assert np.array_equal(whole, step(engine, (slot, 0, TOKENS)))
    with open_engine(model, cache, weight_format=format, numa="2") as engine:
        on_nodes = step(engine, (0, 0, TOKENS))
        assert np.array_equal(on_nodes, in_chunks(engine, TOKENS, 50, slot=1))
    assert np.linalg.norm(on_nodes - whole) < 0.02 * np.linalg.norm(whole)


def test_what_experts_make_of_rows_has_room_where_latents_are_wider_than_rows() -> None:
    spec = model_spec(CONFIG | {"moe_latent_size": 400})
    sizes = placement_buffers(5, 8, spec, MIXES["bf16"])
    assert sizes[CONTRIBUTIONS] == 5 * 8 * row_stride(400) * 4
