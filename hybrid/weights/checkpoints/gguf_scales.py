"""The scale of a whole matrix in NVFP4, which GGUF files have beside it, in a tensor of its own."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from hybrid.errors import WeightsError
from hybrid.weights.shard import Entry

_SCALE = re.compile(r"(.+?)(?:\.weight)?\.(scale|input_scale)")  # the latter is of activations, and not needed
_OF_EXPERTS = "_exps.weight"  # what names of tensors of all experts end with


@dataclass(frozen=True)
class ScaledTensor(Entry):
    """A tensor whose values are to be multiplied. scale: F32, one for all of them or, of experts, one for each."""

    scale: Entry = field(kw_only=True)

    def of_expert(self, expert: int) -> ScaledTensor:
        """The same with the scale of this expert alone."""
        start, size = self.scale.start, np.dtype(np.float32).itemsize
        if self.scale.end - start > size:
            start += expert * size
        return replace(self, scale=replace(self.scale, shape=(), start=start, end=start + size))


def with_scales(tensors: Mapping[str, Entry], others: Collection[str], whole: bool) -> dict[str, Entry]:
    """The tensors of a model, those of scales joined to the matrices that they multiply.

    others: names of tensors that are scales of something else. whole: whether no file is missing. Raises
    `WeightsError` for scales that do not fit their matrix.
    """
    found = dict(tensors)
    for name, scale in tensors.items():
        match = _SCALE.fullmatch(name)
        if match is None or name in others:
            continue
        weight = f"{match[1]}.weight"
        if weight in tensors:
            if match[2] == "scale":
                found[weight] = _scaled(weight, found[weight], name, scale)
            del found[name]
        elif not whole:  # the matrix is in another file
            del found[name]
    return found


def _scaled(weight: str, matrix: Entry, name: str, scale: Entry) -> ScaledTensor:
    if matrix.dtype != "NVFP4" or isinstance(matrix, ScaledTensor):
        reason = "has two scales" if isinstance(matrix, ScaledTensor) else f"of {matrix.dtype} has a scale, {name:.100}"
        raise WeightsError(
            f"{scale.path}: tensor {weight:.100} {reason}; one is read beside NVFP4 alone: take another quantisation "
            "of the model"
        )
    shapes = [(), (1,), *([matrix.shape[:1]] if weight.endswith(_OF_EXPERTS) else [])]
    if scale.dtype != "F32" or scale.shape not in shapes:
        each = " or one for each expert" if len(shapes) > 2 else ""
        raise WeightsError(
            f"{scale.path}: tensor {name:.100} is {scale.dtype} {reprlib.repr(list(scale.shape))}; it must be one F32"
            f"{each}: fetch or make the file again"
        )
    return ScaledTensor(matrix.path, matrix.dtype, matrix.shape, matrix.start, matrix.end, scale=scale)
