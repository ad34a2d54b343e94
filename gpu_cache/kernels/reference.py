"""What the kernels compute, in plain torch and fp32: for tests, and to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gpu_cache.kernels.experts import ExpertLayout
from gpu_cache.kernels.formats import FORMATS, block_bytes
from gpu_cache.kernels.router import TopK


def matrices(expert: torch.Tensor, layout: ExpertLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate and up [intermediate, hidden] and down [hidden, intermediate], float32, of the bytes of a slot."""
    unpack = FORMATS[layout.format].unpack
    hidden, intermediate = layout.hidden_stride, layout.intermediate_stride
    gate_up = expert[: layout.down_offset].reshape(-1, 2, block_bytes(layout.format, hidden))
    down = expert[layout.down_offset : layout.nbytes].reshape(-1, block_bytes(layout.format, intermediate))
    gate, up = (unpack(gate_up[:, i].contiguous(), hidden)[: layout.intermediate, : layout.hidden] for i in (0, 1))
    return gate, up, unpack(down.contiguous(), intermediate)[: layout.hidden, : layout.intermediate]


def gate_up(
    x: torch.Tensor, slot_ids: torch.Tensor, memory: Sequence[torch.Tensor], layout: ExpertLayout
) -> torch.Tensor:
    """float32 [rows, top_k, intermediate]: gate, up and activation of each pair, 0 without a slot. x: bf16 rows."""
    out = torch.zeros((*slot_ids.shape, layout.intermediate))
    for slot, rows, ranks in _by_slot(slot_ids):
        gate, up, _ = matrices(memory[0][slot], layout)
        mine = x[rows, : layout.hidden].float()
        gates, ups = mine @ gate.T, mine @ up.T
        if layout.bias:
            biases = memory[1][slot].view(torch.float32).reshape(-1, 2, 16)
            gates += biases[:, 0].reshape(-1)[: layout.intermediate]
            ups += biases[:, 1].reshape(-1)[: layout.intermediate]
        out[rows, ranks] = activate(gates, ups, layout.activation)
    return out


def down(
    activation: torch.Tensor, slot_ids: torch.Tensor, memory: Sequence[torch.Tensor], layout: ExpertLayout
) -> torch.Tensor:
    """float32 [rows, top_k, hidden] of activations [rows, top_k, intermediate]; 0 without a slot."""
    out = torch.zeros((*slot_ids.shape, layout.hidden))
    for slot, rows, ranks in _by_slot(slot_ids):
        out[rows, ranks] = activation[rows, ranks].float() @ matrices(memory[0][slot], layout)[2].T
        if layout.bias:
            out[rows, ranks] += memory[2][slot].view(torch.float32)[: layout.hidden]
    return out


def _by_slot(slot_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(slot, rows, ranks) of every slot that is named."""
    for slot in sorted(set(slot_ids.reshape(-1).tolist()) - {-1}):
        yield slot, *(slot_ids == slot).nonzero(as_tuple=True)


def activate(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=7.0) + gate * 0, up.clamp(-7.0, 7.0) + up * 0  # infinity becomes NaN
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def weighted_sums(
    contributions: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_ids: torch.Tensor
) -> torch.Tensor:
    """float32 [rows, width] of contributions [rows, top_k, width], experts ascending."""
    sums = torch.zeros((len(ids), contributions.shape[2]))
    for row in range(len(ids)):
        for rank in ids[row].argsort().tolist():
            if slot_ids[row, rank] >= 0:
                sums[row] += weights[row, rank] * contributions[row, rank]
    return sums


def choose(
    logits: torch.Tensor, top: TopK, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gpu_cache.kernels.router.choose`."""
    logits = logits[:, : top.experts]
    sound = logits.isfinite().all(1) & (correction is None or correction.isfinite().all())
    ids, weights = _choose(logits, top, correction)
    return (
        torch.where(sound[:, None], ids, torch.arange(top.top_k, dtype=torch.int32)),
        torch.where(sound[:, None], weights, torch.nan),
    )


def _choose(logits: torch.Tensor, top: TopK, correction: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice of rows of finite logits."""
    if top.kind == "sparsemixer":
        return _sparsemixer(logits, top)
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}.get(top.kind, logits)
    keys = scores if correction is None else scores + correction
    if top.groups > 1:
        grouped = keys.reshape(len(keys), top.groups, -1)
        worth = grouped.topk(2 if top.kind == "sigmoid" else 1, dim=-1).values.sum(-1)
        best = worth.sort(dim=-1, descending=True, stable=True).indices[:, : top.top_groups]
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
        keys = torch.where(kept[..., None], grouped, -torch.inf).reshape(keys.shape)
    ids = keys.sort(dim=-1, descending=True, stable=True).indices[:, : top.top_k]
    weights = scores.gather(1, ids)
    if top.kind == "topk_softmax":
        weights = weights.softmax(-1)
    elif top.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights * top.scale


def _sparsemixer(logits: torch.Tensor, top: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights, left = [], [], logits
    for _ in range(top.top_k):
        best, expert = left.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * top.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, expert))
        ids.append(expert)
        left = left.scatter(1, expert, -torch.inf)
    return torch.cat(ids, 1).int(), torch.cat(weights, 1) * top.scale
