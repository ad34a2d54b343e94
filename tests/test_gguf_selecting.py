"""GGUF files of models that select what they attend to: what may differ in them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf
from test_gguf_models import model

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


def test_an_early_file_of_minimax_m3_without_indexers_is_refused(tmp_path: Path) -> None:
    config, tensors = model("minimax_m3_vl_text")
    found = {name: array for name, array in gguf_tensors(config, tensors).items() if ".indexer." not in name}
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), found)
    with pytest.raises(WeightsError, match=r"tensor blk\.1\.indexer\.q_proj\.weight is missing"):
        open_checkpoint(path).check()
