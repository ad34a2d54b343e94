"""NaN and infinity in weights reach the logits of the rows that use them, in every family, and are reported there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import as_fp8, mxfp4_tensors, random_tensors, write_tensors
from configs import CONFIGS as ALL
from steps import open_engine, step

from hybrid.core import Batch, SamplingParams
from hybrid.errors import KernelError, WeightsError
from hybrid.models import model_spec
from hybrid.serving.sampler import Sampler
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import cached_store

# Of models that select tokens, all but two rows of a sequence do.
CONFIGS = {family: config | ({"index_topk": 2} if "index_topk" in config else {}) for family, config in ALL.items()}
CONFIGS["deepseek_v4"] |= {  # so that they do of entries
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 2},
    "index_topk": 1,
}
CONFIGS["glm5_next_text"] |= {"index_kpool": 2}  # so that they do of pools
CONFIGS["qwen4_exp_text"] |= {"indexer_compress_ratio": 2, "indexer_budget": 2}
FAMILIES = list(CONFIGS)
KINDS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
TOKENS = {0: [3, 1, 4, 1, 5, 9], 1: [2, 6, 5, 3]}  # by sequence


def logits(path: Path, packed: Path, **choices: object) -> dict[int, np.ndarray]:
    """By sequence, [tokens, vocab]: one step of both sequences."""
    with open_engine(path, packed, **choices) as engine:
        made = step(engine, *((sequence, 0, np.array(tokens)) for sequence, tokens in TOKENS.items()))
    return {0: made[: len(TOKENS[0])], 1: made[len(TOKENS[0]) :]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_checkpoint(family, tmp_path) -> None:
    """Where a tensor is refused it is named; where it is not, rows that use it have no logit that is a number.

    Tensors of integers hold none of these values: what they may hold is `test_gguf_selecting.py`'s.
    """
    tensors = random_tensors(CONFIGS[family])
    floats = [name for name, values in tensors.items() if values.dtype.kind != "i"]
    kinds = {_kind(name) for name in floats if ".self_attn.index_" not in name}  # of blocks: more than these have
    for turn, kind in enumerate(sorted(kinds)):
        value = list(KINDS.values())[turn % 3]
        planted = {name: np.full_like(x, value) if _kind(name) == kind else x for name, x in tensors.items()}
        path = write_tensors(tmp_path / f"{turn}", CONFIGS[family], planted)
        try:
            made = logits(path, tmp_path / f"{turn}-packed")
        except WeightsError as error:
            assert "NaN or infinity" in str(error)  # noqa: PT017
            continue
        last = np.concatenate([rows[-1:] for rows in made.values()])
        assert not np.isfinite(last).any(), kind


def _kind(name: str) -> str:
    """Tensors of one kind, of whichever layer and expert."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


@pytest.mark.parametrize(("kv_format", "kind"), [("bf16", "-inf"), ("fp8", "nan")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_token_is_that_of_its_sequence(family, kv_format, kind, tmp_path) -> None:
    """The embedding of a token: tokens before it and the other sequence have the bits that they have without it."""
    config = {**CONFIGS[family], "tie_word_embeddings": False}
    tensors = random_tensors(config)
    write_tensors(tmp_path / "clean", config, tensors)
    name = next(name for name in tensors if "embed" in name)
    tensors[name][4, 7] = KINDS[kind]
    write_tensors(tmp_path / "planted", config, tensors)
    clean, made = (logits(tmp_path / which, tmp_path / "packed", kv_format=kv_format) for which in ("clean", "planted"))
    assert made[1].tobytes() == clean[1].tobytes()
    assert made[0][:2].tobytes() == clean[0][:2].tobytes()
    assert not np.isfinite(made[0][2:]).any()


@pytest.mark.parametrize("mix", ["int8", "int4"])
def test_rows_of_int8_activations(mix, tmp_path) -> None:
    config = {**CONFIGS["qwen3_moe"], "tie_word_embeddings": False}
    tensors = random_tensors(config)
    write_tensors(tmp_path / "clean", config, tensors)
    tensors["model.embed_tokens.weight"][4, 90] = np.nan
    write_tensors(tmp_path / "planted", config, tensors)
    clean, made = (logits(tmp_path / which, tmp_path / "packed", weight_format=mix) for which in ("clean", "planted"))
    assert made[1].tobytes() == clean[1].tobytes() and not np.isfinite(made[0][2:]).any()


@pytest.mark.parametrize(
    "family", ["lfm2", "qwen3_next", "qwen3_5_text", "granitemoehybrid", "kimi_linear", "deepseek_v4"]
)
def test_a_state_is_sound_again_once_its_sequence_is_released(tmp_path, family) -> None:
    config = {**CONFIGS[family], "tie_word_embeddings": False}
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"][4] = np.nan
    path = write_tensors(tmp_path / "planted", config, tensors)
    with open_engine(path, tmp_path / "packed") as engine:
        tokens = np.array([3, 1, 5])
        clean = step(engine, (0, 0, tokens))
        engine.release(0)
        assert not np.isfinite(step(engine, (0, 0, np.array([3, 4, 1, 5])))[-1]).any()
        engine.release(0)
        assert np.isfinite(clean).all() and step(engine, (0, 0, tokens)).tobytes() == clean.tobytes()


def published_fp8() -> tuple[dict[str, object], dict[str, np.ndarray], str]:
    config = {
        **CONFIGS["qwen3_moe"],
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    tensors = as_fp8(random_tensors(CONFIGS["qwen3_moe"]))
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    tensors[name].view(np.uint8)[2, 3] = 0xFF
    return config, tensors, name


def published_mxfp4() -> tuple[dict[str, object], dict[str, np.ndarray], str]:
    config = {**CONFIGS["gpt_oss"], "quantization_config": {"quant_method": "mxfp4"}}
    tensors = mxfp4_tensors(model_spec(CONFIGS["gpt_oss"]))
    name = next(name for name in tensors if name.endswith("down_proj_scales"))
    tensors[name][1, 2, 0] = 0xFF
    return config, tensors, name.removesuffix("_scales")


@pytest.mark.parametrize("publish", [published_fp8, published_mxfp4])
def test_codes_that_stand_for_no_number_are_refused_unasked(publish: Callable, tmp_path) -> None:
    """The kernels read them as numbers, which costs nothing: so they never come there."""
    config, tensors, name = publish()
    path = write_tensors(tmp_path / "published", config, tensors)
    assert Checkpoint.open(path).native
    with pytest.raises(WeightsError, match=f"{name} holds? NaN or infinity"):
        cached_store(path, tmp_path / "packed", "auto")


@pytest.mark.parametrize("value", KINDS.values())
def test_the_sampler_names_what_is_damaged(value) -> None:
    """-inf too, which else would only keep a token from being chosen."""
    sampler = Sampler(SamplingParams(), np.array([1], np.int32), 9)
    scores = np.zeros(9, np.float32)
    scores[6] = value
    with pytest.raises(KernelError, match=f"{value} as the logit of token 6: its weights are damaged"):
        sampler.choose(scores)


def test_a_generation_ends_with_the_report(tmp_path) -> None:
    tensors = random_tensors(CONFIGS["gpt_oss"])
    name = next(name for name in tensors if name.endswith("0.mlp.experts.gate_up_proj"))
    tensors[name][:] = np.array(np.inf, ml_dtypes.bfloat16)
    path = write_tensors(tmp_path / "planted", CONFIGS["gpt_oss"], tensors)
    with open_engine(path, tmp_path / "packed") as engine:
        one = np.zeros(1, np.int32)
        row = engine.forward(Batch(one, one, one, one)).logits[0]
        sampler = Sampler(SamplingParams(temperature=0), np.array([0], np.int32), len(row))
        with pytest.raises(KernelError, match="weights are damaged"):
            sampler.choose(row)
