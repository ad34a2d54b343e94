"""Small random checkpoints of every family, with odd sizes: written with numpy alone, or by transformers."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from configs import APART, CONFIGS, STACKED
from safetensors.numpy import save_file

from hybrid.formats.mix import parse_mix
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.matrices import Source
from hybrid.weights.pack import pack
from hybrid.weights.store import Store

STREAM_SCALES = ("hc_attn_scale", "hc_ffn_scale", "hc_scale")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# Text models of which transformers has the whole alone: where that is, and how the names of its classes begin.
HEADLESS = {"glm5_next_text": ("glm5_next", "Glm5Next"), "step3p5": ("step3p7", "Step3p7")}
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


def auto_model(family: str) -> Any:
    """The class of transformers that makes its models: mistral4 is listed among models of images and text alone."""
    import transformers

    if family == "minimax_m3_vl_text":
        read_as_published()
    if family in HEADLESS:
        return with_head(*HEADLESS[family])
    return transformers.AutoModelForImageTextToText if family == "mistral4" else transformers.AutoModelForCausalLM


@functools.cache
def with_head(folder: str, word: str) -> Any:
    """A text model with a head. folder: of transformers, where it is. word: how the names of its classes begin."""
    import torch
    import transformers

    modeling, configuration = (
        importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}")
        for kind in ("modeling", "configuration")
    )

    class TextForCausalLM(getattr(modeling, f"{word}PreTrainedModel")):  # type: ignore[misc]
        config_class = getattr(configuration, f"{word}TextConfig")

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = getattr(modeling, f"{word}TextModel")(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any, **others: Any) -> Any:
            hidden = self.model(input_ids, **others).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))

        @classmethod
        def from_config(cls, config: Any) -> Any:
            return cls._from_config(config)

    return TextForCausalLM


def read_as_published() -> None:
    """Have transformers read MiniMax-M3's text alone with the names that it knows of the whole."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    of_whole = get_checkpoint_conversion_mapping("minimax_m3_vl")
    register_checkpoint_conversion_mapping("minimax_m3_vl_text", of_whole, overwrite=True)


def random_tensors(
    config: dict[str, Any], dtype: str = "bf16", fused: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name: matrices of spread 0.1, norms around 1."""
    random = np.random.default_rng(seed)
    stacked = (fused and config["model_type"] not in APART) or config["model_type"] in STACKED
    return {
        name: table_of_experts(random, shape, config["n_routed_experts"])
        if name.endswith("tid2eid")
        else rounded(_random(random, name, shape), DTYPES[dtype])
        for name, shape in model_spec(config).checkpoint_shapes("fused" if stacked else "apart")
    }


def mxfp4_tensors(spec: ModelSpec, exponents: tuple[int, int] = (110, 125), seed: int = 2) -> dict[str, np.ndarray]:
    """The same as published in mxfp4: experts of random codes, and of exponents from the first up to the second."""
    random, found = np.random.default_rng(seed), {}
    for name, shape in spec.checkpoint_shapes("mxfp4"):
        if name.endswith("_blocks"):
            found[name] = random.integers(0, 256, shape, np.uint8)
        elif name.endswith("_scales"):
            found[name] = random.integers(*exponents, shape, np.uint8)
        else:
            found[name] = rounded(_random(random, name, shape), ml_dtypes.bfloat16)
    return found


def mxfp4_values(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Experts of `mxfp4_tensors` as float32 [experts, outputs, inputs]."""
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype("f4") * 2.0 ** (scales[..., None].astype("f4") - 127)
    return values.reshape(*scales.shape[:2], -1)


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return is_around_one(name) + 0.1 * random.standard_normal(shape)


def rounded(values: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
    """float64 as another type; bf16 by way of float32, as every version of ml_dtypes rounds that alike."""
    return (values.astype(np.float32) if dtype == ml_dtypes.bfloat16 else values).astype(dtype)


def is_around_one(name: str) -> bool:
    """Whether a tensor multiplies: norms and the scales of Gemma 4."""
    return "norm" in name or name.endswith(("layer_scalar", "router.scale", "per_expert_scale", *STREAM_SCALES))


def table_of_experts(random: np.random.Generator, shape: tuple[int, ...], experts: int) -> np.ndarray:
    """Of every token some different experts, int64 [vocab, top_k]."""
    return random.permuted(np.tile(np.arange(experts), (shape[0], 1)), axis=1)[:, : shape[1]].copy()


def write_tensors(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A checkpoint directory of these tensors, in one file or in several under an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for index, names in enumerate(np.array_split(sorted(tensors), shards), start=1):
        file = f"model-{index:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[name] for name in names}, path / file)
        weight_map.update({str(name): file for name in names})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def as_fp8(tensors: dict[str, np.ndarray], scales: str = "f4", keep: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The same tensors with random e4m3 codes and scales in place of every projection, as checkpoints publish them."""
    random, found = np.random.default_rng(5), dict(tensors)
    for name in tensors:
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not any(word in name for word in keep):
            shape = tensors[name].shape
            codes = random.integers(0, 127, shape, np.uint8) | random.choice([0, 128], shape).astype(np.uint8)
            found[name] = codes.view(ml_dtypes.float8_e4m3fn)
            squares = [-(-size // 128) for size in shape]
            found[f"{name}_scale_inv"] = random.uniform(1e-4, 1e-3, squares).astype(DTYPES.get(scales, scales))
    return found


def dequantised(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor of `as_fp8` as float32."""
    values = tensors[name].astype(np.float32)
    if f"{name}_scale_inv" not in tensors:
        return values
    squares = tensors[f"{name}_scale_inv"].astype(np.float32).repeat(128, 0).repeat(128, 1)
    return values * squares[: values.shape[0], : values.shape[1]]


def write_checkpoint(
    path: Path, family: str, *, dtype: str = "bf16", fused: bool = False, shards: int = 1, **changes: Any
) -> Path:
    """A random checkpoint of a family, its config changed by the keywords. Needs no torch."""
    config = {**CONFIGS[family], **changes}
    return write_tensors(path, config, random_tensors(config, dtype, fused), shards)


def save_with_transformers(
    path: Path, family: str, *, dtype: str = "fp32", max_shard_size: str = "1GB", fused: bool = False, **changes: Any
) -> Any:
    """Write a random checkpoint with `save_pretrained`; returns the transformers model, in that dtype."""
    import torch
    from transformers import AutoConfig

    config = {**CONFIGS[family], **changes}
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    torch.manual_seed(0)
    model = auto_model(family).from_config(AutoConfig.for_model(**{**config, "torch_dtype": "float32"}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name))
    model = model.to(torch_dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=not fused)
    return model


def gated(checkpoint: Checkpoint, layer: int, expert: int) -> tuple[Source, Source, Source]:
    """Gate, up and down of one expert, or of a dense layer."""
    spec = checkpoint.spec
    return checkpoint.gated(spec.layers[layer].feed_forward.origin(spec.place(layer, checkpoint.native)), expert)


def packed(source: Path, mix: str = "auto") -> Store:
    """The store of a checkpoint, packed beside it and checked."""
    store, checkpoint = source.with_name(f"{source.name}-store"), Checkpoint.open(source)
    pack(checkpoint, store, parse_mix(mix, checkpoint.native))
    return Store.open(store, check=True)


def flip_bit(path: Path, position: int) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
