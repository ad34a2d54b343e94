"""Writes a Qwen3-MoE checkpoint as GGUF, so that llama.cpp runs the very weights that this engine runs.

Every matrix has the file's type, embedding and output head included; norms and routers stay F32. In bf16 every bit is
that of the checkpoint. A tokenizer of byte-level BPE comes with it if there is one (`bench/server_slice.py`); else
llama.cpp takes `no_vocab` with the number of tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
from comparison import Progress

from hybrid.errors import CapacityError, ConfigError
from hybrid.files import disk_errors
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import in_layer
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.matrices import Source
from hybrid.weights.source import source_fingerprint

TYPES = {"BF16": gguf.GGMLQuantizationType.BF16, "Q8_0": gguf.GGMLQuantizationType.Q8_0,
         "Q4_0": gguf.GGMLQuantizationType.Q4_0}  # fmt: skip
FILE_TYPES = {"BF16": gguf.LlamaFileType.MOSTLY_BF16, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
              "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}  # fmt: skip
END = "<|im_end|>"
F32 = gguf.GGMLQuantizationType.F32
CHUNK_ROWS = 2048  # converted at a time: some tens of MB of float32

AnyTensor = TypeVar("AnyTensor", bound="Outline")


@dataclass(frozen=True)
class Outline:
    """A tensor of the file: its name and shape there."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        return int(np.prod(gguf.quant_shape_to_byte_shape(self.shape, self.type)))


@dataclass(frozen=True)
class Tensor(Outline):
    """And the rows of the checkpoint that it is made of, in order."""

    source: tuple[Source, ...]


def cached_gguf(checkpoint: Checkpoint, folder: Path, type_name: str, progress: Progress | None = None) -> Path:
    """The file of this checkpoint in `folder`, written unless it is there already."""
    name = f"{checkpoint.path.name}-{source_fingerprint(checkpoint.path)[:12]}-{type_name}.gguf"
    if not (folder / name).is_file():
        write_gguf(checkpoint, folder / name, type_name, progress)
    return folder / name


def write_gguf(checkpoint: Checkpoint, path: Path, type_name: str, progress: Progress | None = None) -> None:
    """Write the whole file or nothing, holding one tensor at a time; type_name: a key of TYPES.

    Raises ConfigError for a model that llama.cpp's qwen3moe cannot be, CapacityError for a full disk.
    """
    tensors = file_tensors(checkpoint, type_name)

    def describe(writer: gguf.GGUFWriter) -> None:
        _add_metadata(writer, checkpoint.spec, type_name)
        _add_tokenizer(writer, checkpoint.path / "tokenizer.json")

    write_whole(path, "qwen3moe", describe, tensors, _encoded, progress)


def write_whole(
    path: Path,
    architecture: str,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: Sequence[AnyTensor],
    data: Callable[[AnyTensor], npt.NDArray[np.uint8]],
    progress: Progress | None = None,
) -> None:
    """Write the whole file or nothing, holding one tensor at a time.

    describe: adds the metadata; data: the bytes of a tensor, flat. Raises CapacityError for a full disk.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    _require_disk(path, total)
    temporary, done = path.with_name(path.name + ".tmp"), 0
    try:
        with disk_errors(path):
            writer = gguf.GGUFWriter(temporary, architecture)
            describe(writer)
            _write_header(writer, tensors)
            for tensor in tensors:
                writer.write_tensor_data(data(tensor))
                done += tensor.nbytes
                if progress:
                    progress(path.name, done, total)
            writer.close()
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_tensors(checkpoint: Checkpoint, type_name: str) -> list[Tensor]:
    """The tensors of the file in the order in which they are written. Raises ConfigError; reads no weight."""
    spec = checkpoint.spec
    _check_model(spec)
    tensors = [*_outer(checkpoint, TYPES[type_name])]
    for layer in range(len(spec.layers)):
        tensors += _attention(checkpoint, layer, TYPES[type_name])
        tensors += _experts(checkpoint, layer, TYPES[type_name])
    for tensor in tensors:
        block = gguf.GGML_QUANT_SIZES[tensor.type][0]
        if tensor.shape[-1] % block:
            raise ConfigError(
                f"{type_name} takes groups of {block} inputs, {tensor.name} has {tensor.shape[-1]}: compare bf16 only"
            )
    return tensors


def _check_model(spec: ModelSpec) -> None:
    """Raise ConfigError for a model that the architecture qwen3moe of llama.cpp does not describe."""
    layer = spec.layers[0]
    attention, router = layer.mixer, layer.feed_forward.router
    plain = not (attention.qkv_bias or attention.out_bias or attention.window)
    reasons = {
        f"model_type {spec.model_type!r} is not 'qwen3_moe'": spec.model_type != "qwen3_moe",
        "its layers differ": any(other != layer for other in spec.layers),
        "it has layers without experts": router is None,
        "its attention has biases or a window": not plain,
        "its rope is scaled": attention.rope is None or attention.rope.kind != "default",
        "its router does not renormalise (norm_topk_prob)": router is not None and not router.renormalise,
    }
    for reason, refused in reasons.items():
        if refused:
            raise ConfigError(f"this model cannot be compared: {reason}; take a plain Qwen3-MoE checkpoint")


def _outer(checkpoint: Checkpoint, type_: gguf.GGMLQuantizationType) -> Iterator[Tensor]:
    names = checkpoint.spec.names
    yield _tensor(checkpoint, "token_embd", names.embedding, type_)
    yield _tensor(checkpoint, "output_norm", names.final_norm, F32)
    if not checkpoint.spec.tied:
        yield _tensor(checkpoint, "output", names.head, type_)


def _attention(checkpoint: Checkpoint, layer: int, type_: gguf.GGMLQuantizationType) -> Iterator[Tensor]:
    names = in_layer(checkpoint.spec.layers[layer].mixer.names, layer)
    matrices = {"attn_q": names.q, "attn_k": names.k, "attn_v": names.v, "attn_output": names.out}
    norms = {"attn_norm": names.norm, "attn_q_norm": names.q_norm, "attn_k_norm": names.k_norm}
    for role, name in (matrices | norms).items():
        kind = type_ if role in matrices else F32
        yield _tensor(checkpoint, f"blk.{layer}.{role}", name, kind)


def _experts(checkpoint: Checkpoint, layer: int, type_: gguf.GGMLQuantizationType) -> Iterator[Tensor]:
    ffn, hidden = checkpoint.spec.layers[layer].feed_forward, checkpoint.spec.hidden
    names, origin = in_layer(ffn.names, layer), ffn.origin(checkpoint.spec.place(layer, checkpoint.native))
    yield _tensor(checkpoint, f"blk.{layer}.ffn_norm", names.norm, F32)
    yield _tensor(checkpoint, f"blk.{layer}.ffn_gate_inp", names.router, F32)
    experts = [checkpoint.gated(origin, expert) for expert in range(ffn.experts)]
    wide, narrow = (ffn.intermediate, hidden), (hidden, ffn.intermediate)
    for index, (role, shape) in enumerate((("gate", wide), ("up", wide), ("down", narrow))):
        source = tuple(expert[index] for expert in experts)
        yield Tensor(f"blk.{layer}.ffn_{role}_exps.weight", (ffn.experts, *shape), type_, source)


def _tensor(checkpoint: Checkpoint, role: str, name: str, type_: gguf.GGMLQuantizationType) -> Tensor:
    shape = checkpoint.shape(name)
    rows = int(np.prod(shape[:-1]))
    return Tensor(f"{role}.weight", shape, type_, (checkpoint.rows(name, 0, rows),))


def _require_disk(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise CapacityError(
            f"{path}: writing needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free: "
            "free some, lower --layers, or give another --work-dir"
        )


def _write_header(writer: gguf.GGUFWriter, tensors: Sequence[Outline]) -> None:
    for tensor in tensors:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add_metadata(writer: gguf.GGUFWriter, spec: ModelSpec, type_name: str) -> None:
    attention, ffn = spec.layers[0].mixer, spec.layers[0].feed_forward
    assert attention.rope is not None and ffn.router is not None  # checked by _check_model
    writer.add_file_type(FILE_TYPES[type_name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(spec.vocab)
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(ffn.intermediate)
    writer.add_expert_feed_forward_length(ffn.intermediate)
    writer.add_expert_count(ffn.experts)
    writer.add_expert_used_count(ffn.router.top_k)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.rope.dim)
    writer.add_rope_freq_base(attention.rope.theta)
    writer.add_layer_norm_rms_eps(spec.eps)


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    if not path.is_file():
        return writer.add_tokenizer_model("no_vocab")
    model = json.loads(path.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(model["vocab"][END])


def _encoded(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor as the file holds them, flat."""
    data, at = np.empty(tensor.nbytes, np.uint8), 0
    for values in _chunks(tensor.source):
        encoded = encode(values, tensor.type).reshape(-1)
        data[at : at + encoded.size] = encoded
        at += encoded.size
    return data


def _chunks(sources: tuple[Source, ...]) -> Iterator[npt.NDArray[Any]]:
    for source in sources:
        for start in range(0, source.count, CHUNK_ROWS):
            yield source.floats(start, min(start + CHUNK_ROWS, source.count))


def encode(values: npt.NDArray[Any], type_: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Values [rows, k] of bf16, fp16 or fp32 as the bytes [rows, n] of a GGUF type."""
    if type_ == gguf.GGMLQuantizationType.BF16:
        return np.ascontiguousarray(values.astype(ml_dtypes.bfloat16, copy=False)).view(np.uint8)
    encoded: npt.NDArray[Any] = gguf.quants.quantize(values.astype(np.float32), type_)
    return encoded.view(np.uint8)
