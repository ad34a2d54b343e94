"""What the tensors of latent attention are called in a checkpoint, and the formats of its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class LatentNames:
    """Names in a checkpoint. Biases take the name of their weight with `.weight` replaced by `.bias`."""

    norm: str = "model.layers.{layer}.input_layernorm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj.weight"
    q_down: str = "model.layers.{layer}.self_attn.q_a_proj.weight"
    q_norm: str = "model.layers.{layer}.self_attn.q_a_layernorm.weight"
    q_up: str = "model.layers.{layer}.self_attn.q_b_proj.weight"
    kv_down: str = "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"
    kv_norm: str = "model.layers.{layer}.self_attn.kv_a_layernorm.weight"
    kv_up: str = "model.layers.{layer}.self_attn.kv_b_proj.weight"
    keys: str = ""  # matrices of heads as they are multiplied, where a checkpoint has them so instead
    values: str = ""
    out: str = "model.layers.{layer}.self_attn.o_proj.weight"


class LatentFormats(NamedTuple):
    """low: of the first projection, for queries and for keys and values. q_up: empty where queries have no latents.
    keys, values: of the matrices of heads.
    """

    low: tuple[str, str]
    q_up: str
    out: str
    keys: str
    values: str
