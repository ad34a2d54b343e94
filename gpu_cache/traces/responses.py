"""Answers of servers that return the experts of their tokens (`--enable-return-routed-experts`): vLLM's and SGLang's.

One answer, a list of them, or one a line. Every answer is a sequence, whose prompt is one step.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import Trace
from gpu_cache.traces.arrays import read_array, trace_of_arrays
from gpu_cache.traces.base import Sizes, Source, TraceFormat

_EXPERTS, _PROMPT = "routed_experts", "prompt_routed_experts"
_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")

Ids = NDArray[np.integer[Any]]


def _is_vllm(source: Source) -> bool:
    return any(isinstance(answer, dict) and "choices" in answer for answer in source.documents[:1])


def _is_sglang(source: Source) -> bool:
    return any(isinstance(answer, dict) and "meta_info" in answer for answer in source.documents[:1])


def _read_vllm(source: Source, sizes: Sizes) -> Trace:
    """Prompt and answer apart, as nested lists (0.21), or together, as text of a .npy or packed with its shape."""
    arrays, prompts = [], []
    for number, answer in enumerate(source.documents):
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise _wrong(source, number, "no choices")
        prompt = _ids(answer.get(_PROMPT), source, number)
        for choice in answer["choices"]:
            ids = _ids(choice.get(_EXPERTS) if isinstance(choice, dict) else None, source, number)
            if ids is None:
                raise _wrong(source, number, f"no {_EXPERTS}; start the server with --enable-return-routed-experts")
            if prompt is not None and prompt.shape[1:] != ids.shape[1:]:
                raise _wrong(source, number, f"experts of the shapes {prompt.shape} and {ids.shape}")
            arrays.append(ids if prompt is None else np.concatenate([prompt, ids]))
            prompts.append(_prompt_tokens(answer.get("usage"), arrays[-1]) if prompt is None else len(prompt))
    return trace_of_arrays(arrays, sizes, source.name, prompts)


def _read_sglang(source: Source, sizes: Sizes) -> Trace:
    """Text of the int32 of all tokens but the last, layers and ranks, whose numbers are not said."""
    arrays, prompts = [], []
    for number, answer in enumerate(source.documents):
        about = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(about, dict) or not isinstance(about.get(_EXPERTS), str):
            raise _wrong(source, number, f"no text meta_info.{_EXPERTS}; ask for it with return_routed_experts")
        prompt, produced = about.get("prompt_tokens"), about.get("completion_tokens")
        if type(prompt) is not int or type(produced) is not int or prompt < 0 or produced < 0:
            raise _wrong(source, number, "no whole numbers prompt_tokens and completion_tokens in meta_info")
        if sizes.layers is None:
            raise CacheError(
                f"{source.name}: does not say how many layers the model has; say it: --layers N, dense too"
            )
        ids = _decoded(about[_EXPERTS], source, number)
        width = len(ids) // 4 // max(prompt + produced - 1, 1) // sizes.layers
        shape = max(prompt + produced - 1, 1), sizes.layers, width
        arrays.append(_shaped(ids, "int32", shape, source, number))
        prompts.append(prompt)
    return trace_of_arrays(arrays, Sizes(None, sizes.experts), source.name, prompts)


def _ids(said: Any, source: Source, number: int) -> Ids | None:
    """[tokens, layers, k] of one of the ways in which it is said, None for none."""
    if said is None:
        return None
    name = f"{source.name}: answer {number}"
    if isinstance(said, str):
        return read_array(_decoded(said, source, number), name)
    if isinstance(said, dict):
        data, dtype, shape = said.get("data"), said.get("dtype"), said.get("shape")
        if not isinstance(data, str) or dtype not in _TYPES or not isinstance(shape, list):
            raise _wrong(source, number, f"{_EXPERTS} without data, dtype and shape")
        return _shaped(_decoded(data, source, number), dtype, tuple(shape), source, number)
    try:
        ids = np.array(said)
    except (ValueError, OverflowError):
        raise _wrong(source, number, f"{_EXPERTS} whose lists differ in length") from None
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise _wrong(source, number, f"{_EXPERTS} of the shape {ids.shape}, not [tokens, layers, k] of whole numbers")
    return ids


def _decoded(text: str, source: Source, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(source, number, f"{_EXPERTS} that is no base64 ({error})") from None


def _shaped(data: bytes, dtype: str, shape: tuple[Any, ...], source: Source, number: int) -> Ids:
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise _wrong(source, number, f"{_EXPERTS} of the shape {shape}, not [tokens, layers, k]")
    if shape[0] * shape[1] * shape[2] * np.dtype(dtype).itemsize != len(data):
        raise _wrong(source, number, f"{len(data)} bytes of {_EXPERTS}, which are not {shape} of {dtype}")
    return np.frombuffer(data, dtype).reshape(shape)


def _prompt_tokens(usage: Any, ids: Ids) -> int:
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and 0 <= tokens <= len(ids) else 0


def _wrong(source: Source, number: int, found: str) -> CacheError:
    return CacheError(f"{source.name}: answer {number} has {found}")


FORMATS = (
    TraceFormat(
        "vllm",
        "answers of vLLM with routed_experts (JSON, or one a line)",
        "",
        "scores, and which tokens were computed together",
        _is_vllm,
        _read_vllm,
    ),
    TraceFormat(
        "sglang-answers",
        "answers of SGLang's /generate with routed_experts (JSON, or one a line)",
        "",
        "scores, and which tokens were computed together",
        _is_sglang,
        _read_sglang,
    ),
)
