"""What the experts of a model have in common, without which one cache cannot hold them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybrid.errors import ConfigError
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import StoreTensor


@dataclass(frozen=True)
class ExpertShape:
    """What the experts of all MoE layers have in common: how many there are, how many a row takes, and their bytes.

    pieces: (last word of the tensor, bytes of one expert), the matrices first. weights: numbers in its matrices.
    """

    layers: tuple[int, ...]  # those of the model that have experts
    experts: int
    top_k: int
    pieces: tuple[tuple[str, int], ...]
    weights: int

    @property
    def nbytes(self) -> int:
        """Bytes of one expert, including biases."""
        return sum(size for _, size in self.pieces)


def expert_shape(spec: ModelSpec, tensors: dict[str, StoreTensor]) -> ExpertShape:
    """Raises ConfigError for a model without experts, or with experts of several sizes."""
    if not spec.moe_layers:
        raise ConfigError(f"model_type {spec.model_type!r} has no experts to cache; use --device cpu")
    if any(spec.layers[index].feed_forward.bound for index in spec.moe_layers):
        raise ConfigError("the layers bound what experts make, which no cache knows of; use --device cpu")
    shapes = {_layer_shape(spec, index, tensors) for index in spec.moe_layers}
    if len(shapes) > 1:
        raise ConfigError("the layers have experts of several sizes, which one cache cannot hold; use --device cpu")
    formats = sorted({tensors[f"layers.{index}.ffn.experts"].format or "" for index in spec.moe_layers})
    if len(formats) > 1 or "/" in formats[0]:
        raise ConfigError(
            f"the experts have several formats ({', '.join(formats)}), which one cache cannot hold; use --device cpu, "
            "or one format, as --format experts=int4"
        )
    return replace(shapes.pop(), layers=spec.moe_layers)


def _layer_shape(spec: ModelSpec, index: int, tensors: dict[str, StoreTensor]) -> ExpertShape:
    ffn = spec.layers[index].feed_forward
    assert ffn.router is not None
    names = ["experts", "gate_up_bias", "down_bias"]
    found = [(name, tensors.get(f"layers.{index}.ffn.{name}")) for name in names]
    pieces = tuple((name, tensor.nbytes // ffn.experts) for name, tensor in found if tensor)
    return ExpertShape((), ffn.experts, ffn.router.top_k, pieces, (ffn.wide + 1) * spec.hidden * ffn.intermediate)
