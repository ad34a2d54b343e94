"""The files of a checkpoint: config.json and the safetensors files that hold its tensors, or GGUF files."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid.errors import WeightsError
from hybrid.files import is_file, read_json_object
from hybrid.files.gguf import is_gguf
from hybrid.weights.checkpoints.gguf_files import gguf_files
from hybrid.weights.shard import Entry, read_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Where older programs wrote the quantization_config, and which quant_method that is.
BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_LONGEST_NAME = 255  # that a file system allows
# Where text models lie in models of more than text, and where transformers 5 places them.
_OTHER_PLACES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "backbone.": "model.",  # Nemotron-H
}
# As DeepSeek publishes DeepSeek-V4, beside layers of which the names begin with their number.
_PLAIN = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}
# Its norms of keys, as published; transformers 5 writes them with the name that its compressors have for theirs.
_NORM_OF_KEYS = re.compile(r"(model\.)?(layers\.\d+\.attn\.)kv_norm\.weight")
# What Step-3.5-Flash is published with, and what transformers 5 has for it.
_OF_STEP = (
    (re.compile(r"\.moe\.(gate|up|down)_proj(?=\.|$)"), r".mlp.experts.\1_proj"),
    (re.compile(r"\.moe\.router_bias$"), ".mlp.gate.e_score_correction_bias"),
    (re.compile(r"\.moe\.gate(?=\.|$)"), ".mlp.gate"),
    (re.compile(r"\.share_expert(?=\.|$)"), ".mlp.shared_experts"),
)
_TO_STEP = (  # and back, of modules
    (re.compile(r"\.mlp\.experts(\.\d+)?(?=\.|$)"), ".moe"),
    (re.compile(r"\.mlp\.gate(?=\.|$)"), ".moe.gate"),
    (re.compile(r"\.mlp\.shared_experts(?=\.|$)"), ".share_expert"),
)
_WITHOUT_MODULE = re.compile(r"model\.(?=(embed_tokens|layers|norm)\.)")  # as Qwen2.5-VL is published


def read_config(path: Path) -> dict[str, Any]:
    """The contents of config.json in a model directory; raises `WeightsError` when there is none."""
    try:
        if not path.exists():
            raise WeightsError(
                f"{path}: no such directory; give the directory of a model, with its config.json, "
                "or a repository as org/name"
            )
        if not path.is_dir():
            raise WeightsError(
                f"{path}: is not a directory and no GGUF file; give the directory of a model, with its config.json"
            )
        empty = not any(path.iterdir())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{path}: cannot be read ({reason}); allow reading it") from None
    if empty:
        raise WeightsError(f"{path}: the directory is empty; it must hold config.json and safetensors files")
    if not is_file(path / CONFIG):
        raise WeightsError(f"{path}: has no config.json; give the directory of a Hugging Face model")
    config = read_json_object(path / CONFIG)
    found = _file_beside(path, config)
    if found is None:
        return config
    words = read_json_object(found)
    own = words.get("quantization")
    words = own if isinstance(own, dict) else words
    return {**config, "quantization_config": {"quant_method": BESIDE[found.name], **words}}


def _file_beside(path: Path, config: Mapping[str, Any]) -> Path | None:
    """The file of its own to which older programs wrote the quantization_config that config.json lacks."""
    if quantisation_of(config) is not None:
        return None
    return next((path / name for name in BESIDE if is_file(path / name)), None)


def quantisation_of(config: Mapping[str, Any]) -> Any:
    """quantization_config, which models of more than text may have beside their text_config or in it; or None."""
    found, text = config.get("quantization_config"), config.get("text_config")
    return text.get("quantization_config") if found is None and isinstance(text, Mapping) else found


def has_weights(path: Path) -> bool:
    """Whether there are tensors here, or only a config.json."""
    return is_gguf(path) or is_file(path / SINGLE) or is_file(path / INDEX)


def may_read_weights(path: Path) -> bool:
    """Whether this user has the right to, where there are any."""
    return has_weights(path) and all(os.access(file, os.R_OK, effective_ids=True) for file in weight_files(path))


def config_files(path: Path) -> list[Path]:
    """The files beside the tensors that say what they are."""
    if is_gguf(path):
        return []
    index = [] if is_file(path / SINGLE) else [path / INDEX]
    beside = _file_beside(path, read_json_object(path / CONFIG))
    return [path / CONFIG, *index, *([beside] if beside else [])]


def weight_files(path: Path) -> list[Path]:
    """The files that hold the tensors, sorted. Raises `WeightsError` if one is missing."""
    if is_gguf(path):
        return gguf_files(path)
    return [path / SINGLE] if is_file(path / SINGLE) else _shards(path, _read_index(path))


def find_tensors(path: Path, module: str) -> dict[str, Entry]:
    """Where each tensor lies, by its name as `own_name` has it. module: of another model that the text model is,
    or "". Raises `WeightsError` for files that are damaged or missing, and for a tensor under two names.
    """
    found = _tensors(path)
    renamed: dict[str, Entry] = {}
    first: dict[str, str] = {}
    for theirs, entry in found.items():
        name = own_name(theirs, module)
        if name in renamed:
            one, other = sorted((theirs, first[name]), key=name.__eq__)
            raise WeightsError(f"{path}: has tensor {one:.200} twice, also as {other:.200}; fetch all files again")
        renamed[name], first[name] = entry, theirs
    return renamed


def own_name(name: str, module: str) -> str:
    """The name that transformers 5 has for a tensor of a text model within another, which others place apart."""
    if ".moe." in name or ".share_expert" in name:
        for theirs, ours in _OF_STEP:
            name = theirs.sub(ours, name)
    return placed(name, module)


def name_of_step(module: str) -> str:
    """What Step-3.5-Flash calls a module that transformers 5 calls so: of experts, their stack."""
    for ours, theirs in _TO_STEP:
        module = ours.sub(theirs, module)
    return module


def placed(name: str, module: str) -> str:
    """`own_name` but for the words of Step-3.5-Flash, which patterns may hold in pieces."""
    if module and _WITHOUT_MODULE.match(name):
        return f"model.{module}.{name.removeprefix('model.')}"
    for place, own in _OTHER_PLACES.items():
        if name.startswith(place):
            return own + name.removeprefix(place)
    if keys := _NORM_OF_KEYS.fullmatch(name):
        return f"model.{keys[2]}norm.weight"
    return f"model.{name}" if name.startswith("layers.") else _PLAIN.get(name, name)


def _tensors(path: Path) -> dict[str, Entry]:
    if is_file(path / SINGLE):
        return read_header(path / SINGLE)
    weight_map = _read_index(path)
    headers = {file.name: read_header(file) for file in _shards(path, weight_map)}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise WeightsError(
                f"{path / file}: has no tensor {name:.200}, which {INDEX} places there; fetch both files again"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    """Shard file by tensor name; the files must lie in the directory of the index."""
    index = path / INDEX
    if not is_file(index):
        raise WeightsError(f"{path}: has neither {SINGLE} nor {INDEX}; {_instead(path)}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: has no weight_map from tensor names to files; fetch the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_name(file):
            raise WeightsError(
                f"{index}: places tensor {name:.200} in {reprlib.repr(file)}; it must be a file name without a "
                "directory: fetch the file again"
            )
    return weight_map


def _is_name(file: str) -> bool:
    return file not in ("", ".", "..") and Path(file).name == file and "\0" not in file and len(file) <= _LONGEST_NAME


def _shards(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    files = [path / file for file in sorted(set(weight_map.values()))]
    for file in files:
        if not is_file(file):
            raise WeightsError(f"{file}: named in {INDEX} but missing; fetch all files of the model again")
    return files


def _instead(path: Path) -> str:
    if any(path.glob("*.bin")):
        return "pytorch .bin files are not read: convert them to safetensors"
    return "fetch all files of the model again"
