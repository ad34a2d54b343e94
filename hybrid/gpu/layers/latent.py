"""Latent attention on a device: one mirrored row a token, whose keys and values no head makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.gpu.attention import State
from hybrid.gpu.home import Home
from hybrid.gpu.inputs import StepInputs
from hybrid.gpu.layers.base import Shared
from hybrid.gpu.layers.mirrored import MirroredMixer, StateShape
from hybrid.gpu.loader import Loader
from hybrid.gpu.mirror import LatentRings
from hybrid.gpu.parts import NormWeights, grown, norm, rms_norm, rotate
from hybrid.gpu.products import linear, product
from hybrid.models.layers.base import Place
from hybrid.models.layers.latent import ABSORBED, LATENT_EPS, LatentAttention
from hybrid.models.layers.older_tokens import NEW_KV
from hybrid.models.layers.products import rows_name

Projected = tuple[Tensor, Tensor]  # queries of rows [rows, heads, row_dim], and rows [rows, row_dim], float32


@dataclass(frozen=True)
class Weights:
    """low: queries or their latents, and the latents of keys and values with what turns. keys [heads, rank, nope_dim],
    values [heads, value_dim, rank] and the other matrices are bf16, norms and biases float32. q_norm, q_up: None where
    queries have no latents.
    """

    norm: NormWeights
    low: Tensor
    low_bias: Tensor | None
    q_norm: Tensor | None
    q_up: Tensor | None
    kv_norm: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    out_bias: Tensor | None


def load(half: LatentAttention, place: Place, load: Loader) -> Weights:
    at, hidden = f"layers.{place.layer}.attention", place.hidden
    return Weights(
        norm=load.norm(f"{at}.norm"),
        low=load.matrix(f"{at}.low", half.low_width, hidden),
        low_bias=load.some_floats(f"{at}.low_bias", half.low_width),
        q_norm=load.some_floats(f"{at}.q_norm"),
        q_up=load.matrix(f"{at}.q_up", half.query_width, half.q_rank) if half.q_rank else None,
        kv_norm=load.floats(f"{at}.kv_norm"),
        keys=load.of_heads(f"{at}.keys", half.heads, half.rank, half.nope_dim),
        values=load.of_heads(f"{at}.values", half.heads, half.value_dim, half.rank),
        out=load.matrix(f"{at}.out", hidden, half.width),
        out_bias=load.some_floats(f"{at}.out_bias", hidden),
    )


def whole_shape(half: LatentAttention) -> None:
    """None: its values are narrower than its keys, for which `attend` is used always."""


def open_half(half: LatentAttention, place: Place, weights: Weights, shared: Shared) -> MirroredLatents:
    return MirroredLatents(half, place, weights, shared)


class MirroredLatents(MirroredMixer):
    """A `DeviceMixer`."""

    def __init__(self, half: LatentAttention, place: Place, weights: Weights, shared: Shared) -> None:
        self._half, self._eps, self._weights = half, place.eps, weights
        assert half.rope, "no device computes latent attention without rope"
        self._rope, self._turning = place.ropes.index(half.rope), half.rope
        sizes = (shared.sequences, shared.capacity, half.row_dim, half.rank)
        self._rings = LatentRings(*sizes, device=weights.low.device)
        super().__init__(shared, self._rings, StateShape(half.heads, half.rank, half.state_floats), None, half.scale)

    def project(self, residual: Tensor, inputs: StepInputs) -> Projected:
        """Queries and rows, which are also sent to the threads: the latter are stored."""
        half, weights, buffers, link = self._half, self._weights, self._shared.buffers, self._shared.link
        normed = norm(residual, weights.norm, self._eps).bfloat16()
        queries, latents = linear(normed, weights.low, weights.low_bias).split(half.low_parts, 1)
        rows = self._rows(latents, inputs)
        link.to_host(buffers.rows(NEW_KV, torch.float32, *rows.shape), rows)
        q = self._queries(queries, inputs)
        if self.sees_older(inputs):
            padded = pad(q, (0, half.key_dim - half.row_dim)).bfloat16().flatten(1)
            link.to_host(buffers.rows(rows_name(ABSORBED, half.key_dim), torch.bfloat16, *padded.shape), padded)
        return q, rows

    def mix(self, projected: Projected, inputs: StepInputs) -> State:
        q, rows = projected
        self._rings.write(inputs.sequences, inputs.places, rows)
        return self._attend(q.bfloat16(), inputs)

    def _mirror_home(self, home: Home, sequence: int, start: int, end: int, places: Tensor) -> None:
        rows = home.keys(sequence, start, end)[:, 0, : self._half.row_dim]
        self._rings.write(torch.full_like(places, sequence), places, rows)

    def output(self, mixed: State, inputs: StepInputs) -> Tensor:
        weights, latents = self._weights, self._finished(mixed, inputs).bfloat16()
        made = _of_heads(latents, weights.values).flatten(1).bfloat16()
        return linear(made, weights.out, weights.out_bias)

    def _rows(self, latents: Tensor, inputs: StepInputs) -> Tensor:
        low, turned = latents.split([self._half.rank, self._half.shared_dim], 1)
        turned = rotate(turned[:, None], inputs.tables[self._rope], self._turning)[:, 0]
        return torch.cat([rms_norm(low, self._weights.kv_norm, LATENT_EPS), turned], 1)

    def _queries(self, queries: Tensor, inputs: StepInputs) -> Tensor:
        half, weights = self._half, self._weights
        if weights.q_norm is not None and weights.q_up is not None:
            queries = linear(rms_norm(queries, weights.q_norm, LATENT_EPS).bfloat16(), weights.q_up)
        heads, growth = queries.unflatten(1, (half.heads, -1)), inputs.growths[self._rope]
        plain, turned = grown(heads, growth).split([half.nope_dim, half.shared_dim], 2)
        turned = rotate(turned, inputs.tables[self._rope], self._turning)
        return torch.cat([_of_heads(plain.bfloat16(), weights.keys), turned], 2)


def _of_heads(rows: Tensor, matrices: Tensor) -> Tensor:
    """float32 [rows, heads, outputs] of bf16 rows [rows, heads, inputs] and matrices [heads, outputs, inputs]."""
    return product(rows.transpose(0, 1), matrices.transpose(1, 2)).transpose(0, 1)
