"""DeepSeek-V3.2 and GLM-5: sequences as long as attention to all tokens is what the model computes, and no longer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIGS, packed, random_tensors, write_checkpoint, write_tensors
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf
from test_gguf_models import packed as packed_file
from test_gguf_models import same_stores
from typer.testing import CliRunner

from hybrid.commands.fit import app
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError, RequestError
from hybrid.models import model_spec
from hybrid.plan.resolve import plan_model
from hybrid.serving.llm import LLM

FAMILIES = ("deepseek_v32", "glm_moe_dsa")
WHY = r"tokens: of more, \w+ attends to the 200 that its indexer selects \(index_topk\), which is not computed"


def indexers(config: dict, names: dict[str, str], layer: str) -> dict[str, np.ndarray]:
    """The tensors of the indexers of all layers."""
    heads, dim, hidden = config["index_n_heads"], config["index_head_dim"], config["hidden_size"]
    shapes = {
        "wq_b.weight": (heads * dim, config["q_lora_rank"]),
        "wk.weight": (dim, hidden),
        "k_norm.weight": (dim,),
        "k_norm.bias": (dim,),
        "weights_proj.weight": (heads, hidden),
    }
    return {
        f"{layer.format(index)}.{names.get(name, name)}": np.ones(shape, np.float32)
        for index in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_what_can_be_computed(tmp_path: Path, family: str) -> None:
    config, notes = CONFIGS[family], []
    path = write_tensors(tmp_path / "hf", config, {})
    plan = plan_model(EngineConfig(model_path=path, weight_format="bf16"), notes.append)
    assert plan.max_seq_len == 200 and len(notes) == 1
    with pytest.raises(ConfigError, match=f"--max-seq-len 201 is above 200 {WHY}"):
        plan_model(EngineConfig(model_path=path, weight_format="bf16", max_seq_len=201))
    assert plan_model(EngineConfig(model_path=path, weight_format="bf16", max_seq_len=200), notes.append)
    assert len(notes) == 1  # what was asked for needs no note
    result = CliRunner().invoke(app, [str(path / "config.json"), "--memory", "8GB", "--bandwidth", "10GB"])
    assert result.exit_code == 0 and "note: sequences have at most 200 tokens" in result.output
    result = CliRunner().invoke(app, [str(path / "config.json"), "--depth", "200"])
    assert result.exit_code != 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_never_selects_has_all_its_positions(family: str) -> None:
    spec = model_spec({**CONFIGS[family], "index_topk": 256})
    assert (spec.longest, spec.longest_text) == (256, "the model's 256 positions")


@pytest.mark.parametrize("index_topk", [200, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_indexers_are_not_read(tmp_path: Path, family: str, index_topk: int) -> None:
    """From neither kind of file, and whether or not a sequence can be so long that they select; other models have no
    such tensors.
    """
    config = {**CONFIGS[family], "index_topk": index_topk}
    tensors = random_tensors(config)
    plain = packed(write_tensors(tmp_path / "plain", config, tensors))
    more = indexers(config, {}, "model.layers.{}.self_attn.indexer")
    found = packed(write_tensors(tmp_path / "hf", config, {**tensors, **more}))
    names = {"wq_b.weight": "attn_q_b.weight", "wk.weight": "attn_k.weight", "weights_proj.weight": "proj.weight"}
    more = indexers(config, names, "blk.{}.indexer")
    metadata, tensors = gguf_metadata(config), gguf_tensors(config, tensors)
    file = packed_file(write_gguf(tmp_path / "model.gguf", metadata, {**tensors, **more}))
    with plain, found, file:
        assert same_stores(plain, found) and same_stores(plain, file)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v32", {"rope_interleave": False}, "rope_interleave is False; it must be absent or True"),
        ("glm_moe_dsa", {"index_topk": 0}, "index_topk is 0"),
        ("glm_moe_dsa", {"mlp_layer_types": ["dense"]}, "a list of 3 of dense, sparse"),
    ],
)
def test_what_is_not_computed_is_refused(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[family], **changes})


@pytest.mark.parametrize(("length", "advice"), [(199, "or raise max_seq_len"), (200, f"shorten it to 200 {WHY}")])
def test_a_prompt_that_is_too_long_is_told_what_can_be_done(tmp_path: Path, length: int, advice: str) -> None:
    path = write_checkpoint(tmp_path / "hf", "glm_moe_dsa")
    with LLM(path, max_seq_len=length, threads=1, cache_dir=tmp_path / "cache") as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()
        with pytest.raises(RequestError, match=f"the prompt has 201 tokens, .* may have {length} here: .*{advice}"):
            llm.logits([1] * 201)
