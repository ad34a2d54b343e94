"""A model from a GGUF file whose matrices have one to four bits, of every type: packed exactly, and multiplied."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import random_tensors
from configs import CONFIGS
from dequantised import write_dequantised
from gguf_rig import Blocks, gguf_metadata, gguf_tensors, write_gguf
from safetensors.numpy import load_file
from steps import open_engine, step
from test_formats_engine import bound, relative_error

from hybrid.errors import WeightsError
from hybrid.files.gguf_types import TYPES_BY_NAME
from hybrid.formats.mix import parse_mix
from hybrid.weights.checkpoints.gguf_blocks import values
from hybrid.weights.checkpoints.gguf_tabled import TABLED
from hybrid.weights.checkpoints.opening import open_checkpoint
from hybrid.weights.pack import cached_store, pack

SIZES = {
    "hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 256,
    "num_local_experts": 2, "num_experts_per_tok": 2, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip
TYPES = (
    {
        "attn_q": "IQ2_XXS", "attn_k": "IQ1_S", "attn_v": "Q2_K", "attn_output": "IQ3_S",
        "ffn_gate_exps": "IQ1_M", "ffn_up_exps": "IQ2_XS", "ffn_down_exps": "Q2_K",
    },
    {
        "attn_q": "TQ1_0", "attn_k": "TQ2_0", "attn_v": "IQ4_XS", "attn_output": "Q3_K",
        "ffn_gate_exps": "Q2_K", "ffn_up_exps": "Q2_K", "ffn_down_exps": "IQ3_XXS",
    },
)  # fmt: skip
HEAD = {"output": "IQ2_S"}
FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "TQ1_0": (52,), "TQ2_0": (64,)}  # where they lie, else at the beginning


def with_factor(type: str, blocks: np.ndarray, factor: float) -> np.ndarray:
    half = np.array([factor], np.float16)
    if type == "IQ1_M":  # four bits in each of four words
        words = blocks[:, 48:].copy().view(np.uint16)
        blocks[:, 48:] = (
            (words & 0xFFF | half.view(np.uint16) >> np.arange(0, 16, 4) << 12 & 0xF000)
            .astype(np.uint16)
            .view(np.uint8)
        )
    for at in () if type == "IQ1_M" else FACTORS.get(type, (0,)):
        blocks[:, at : at + 2] = half.view(np.uint8)
    return blocks


def in_blocks(name: str, array: np.ndarray) -> Blocks | np.ndarray:
    """Random blocks in place of a matrix, whose values have a root mean square of about 0.1."""
    kind = name.split(".")[-2]
    type = (TYPES[int(name.split(".")[1])] if name.startswith("blk") else HEAD).get(kind)
    if type is None:
        return array
    random, found = np.random.default_rng(len(name)), TYPES_BY_NAME[type]
    blocks = random.integers(0, 256, (array.size // found.block, found.bytes), np.uint8)
    size = float(np.sqrt(np.square(values(type, with_factor(type, blocks, 1.0))).mean()))
    return Blocks(type, array.shape, with_factor(type, blocks, 0.1 / size).tobytes())


def test_every_type_is_in_the_model() -> None:
    assert {*HEAD.values(), *(type for layer in TYPES for type in layer.values())} == {*TABLED, "Q2_K"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    config = CONFIGS["mixtral"] | SIZES
    tensors = {name: in_blocks(name, array) for name, array in gguf_tensors(config, random_tensors(config)).items()}
    return write_gguf(tmp_path_factory.mktemp("low") / "model.gguf", gguf_metadata(config), tensors), tensors, config


def test_they_are_packed_exactly(tmp_path, file) -> None:
    path, tensors, config = file
    checkpoint = open_checkpoint(path)
    assert checkpoint.notes(checkpoint.native) == []
    with cached_store(path, tmp_path) as store:
        mix = store.mix
        found = load_file(write_dequantised(tmp_path / "plain", store) / "model.safetensors")
    first, second = (mix.of_layer(layer) for layer in (0, 1))
    assert (first.experts, first.attention, first.head) == ("q4_t/q2_k", "q4_t/q4_t/q2_k/q4_t", "q4_t")
    assert (second.experts, second.attention) == ("q2_k/q4_t", "q4_t")
    stored = gguf_tensors(config, found)
    for name, tensor in tensors.items():
        if isinstance(tensor, Blocks):
            rows = np.frombuffer(tensor.data, np.uint8).reshape(int(np.prod(tensor.shape[:-1])), -1)
            np.testing.assert_array_equal(stored[name], values(tensor.type, rows).reshape(tensor.shape), name)


def test_logits_are_those_of_the_same_weights_in_bf16(tmp_path, file, isa) -> None:
    """Which rounds them, and activations less."""
    tokens, logits, allowed = np.arange(40) % 90, [], 0.0
    for text in ("auto", "bf16"):
        with open_engine(file[0], tmp_path, weight_format=text, isa=isa) as engine:
            logits.append(step(engine, (0, 0, tokens)))
            allowed += bound(engine.spec, engine.plan.formats) ** 2
    assert 0 < relative_error(*logits) <= np.sqrt(allowed)


@pytest.mark.parametrize("format", ["auto", "bf16", "q6_k"])
@pytest.mark.parametrize("factor", [np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_factors_must_be_finite(tmp_path, factor: float, format: str) -> None:
    """Whether blocks are packed as they are or opened, and without warnings."""
    config = CONFIGS["mixtral"] | SIZES
    tensors = gguf_tensors(config, random_tensors(config))
    for name in ("q", "k", "v"):
        name = f"blk.0.attn_{name}.weight"
        count = tensors[name].size // 256
        blocks = np.random.default_rng(0).integers(0, 256, (count, TYPES_BY_NAME["Q3_K"].bytes), np.uint8)
        tensors[name] = Blocks("Q3_K", tensors[name].shape, with_factor("Q3_K", blocks, factor).tobytes())
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), tensors)
    checkpoint = open_checkpoint(path)
    with pytest.raises(WeightsError, match=r"tensor blk\.0\.attn_q\.weight holds? NaN or infinity"):
        pack(checkpoint, tmp_path / "store", parse_mix(format, checkpoint.native))
