"""bench/synthetic_gguf.py writes files with the tensors and types of published ones, which other engines read alike."""

from __future__ import annotations

import sys
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hybrid import LLM
from hybrid.commands.measure import Test as Work
from hybrid.errors import ConfigError
from hybrid.weights.checkpoints.opening import open_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import compare
import pairs
import synthetic_gguf

# Latents as published: ik_llama.cpp reads no others.
SMALL: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "vocab_size": 300,
    },
    "deepseek-v2-lite": {
        "hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "vocab_size": 300,
    },
}  # fmt: skip
TYPES = {
    "gpt-oss-20b": {"ffn_up_exps": "mxfp4", "attn_q": "q8_0", "ffn_gate_inp": "f32"},
    "deepseek-v2-lite": {"ffn_up_exps": "q4_k", "ffn_down_exps": "q8_0", "attn_k_b": "q5_0", "ffn_gate_inp": "f32"},
}


@pytest.fixture(params=SMALL)
def like(request, monkeypatch) -> str:
    monkeypatch.setitem(pairs.GGUF_SLICES, request.param, pairs.GGUF_SLICES[request.param] | SMALL[request.param])
    return request.param


def test_its_tensors_have_the_types_of_published_files_and_fill_the_disk_once(like, tmp_path) -> None:
    file = pairs.synthetic_file(like, None, tmp_path)
    written = file.stat().st_mtime_ns
    open_checkpoint(file).check()
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors}
    for name, expected in TYPES[like].items():
        assert types[f"blk.1.{name}.weight"] == expected
    assert pairs.synthetic_file(like, None, tmp_path) == file and file.stat().st_mtime_ns == written


def test_experts_differ_and_weights_have_the_deviation_of_a_model(like, tmp_path) -> None:
    checkpoint = open_checkpoint(pairs.synthetic_file(like, None, tmp_path))
    ffn = checkpoint.spec.layers[1].feed_forward
    origin = ffn.origin(checkpoint.spec.place(1, checkpoint.native))
    first, second = (checkpoint.gated(origin, expert)[0] for expert in (0, 1))
    values = first.floats(0, first.count)
    assert 0.015 < values.std() < 0.03 and abs(values.mean()) < 0.003
    assert not np.array_equal(values, second.floats(0, second.count))


@pytest.mark.parametrize("peer", compare.READERS)
def test_others_compute_the_same_logits(like, peer, tmp_path) -> None:
    """Names, keys and types mean to others what they mean here: any wrong one would change everything."""
    others = [compare.PACKAGES[name][0][0] for name in compare.READERS if name != peer]
    if not sys.modules.keys().isdisjoint(others):
        pytest.skip("both forks of llama.cpp cannot be in one process")
    pytest.importorskip(compare.PACKAGES[peer][0][0], reason="needs the extra [compare]")
    module, reader = compare.READERS[peer]
    file = pairs.synthetic_file(like, None, tmp_path)
    tokens = np.random.default_rng(1).integers(0, 300, 40).tolist()
    with closing(getattr(import_module(module), reader)(file, 1, [Work(0, 1, 0, 1)])) as theirs:
        found = theirs.logits(tokens[:20])
    with LLM(file, cache_dir=tmp_path, threads=1) as llm:
        expected, other = llm.logits(tokens[:20]), llm.logits(tokens[20:])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.03 < 0.5 < np.linalg.norm(other - expected) / np.linalg.norm(expected)


def test_a_number_of_layers_that_llama_cpp_does_not_read_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--layers 4: llama.cpp reads deepseek-v2-lite with 27"):
        pairs.synthetic_file("deepseek-v2-lite", 4, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_model_that_is_offered_can_be_written() -> None:
    assert synthetic_gguf.FAMILIES.keys() == {pairs.CONFIGS[like]["model_type"] for like in pairs.GGUF_SLICES}
