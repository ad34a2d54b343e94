"""A compact Qwen3-MoE for training on a CPU.

The architecture equals `transformers.Qwen3MoeForCausalLM`; only the execution differs: tokens are sorted by
expert, so that every expert is one dense matrix product per layer and nothing is padded or dropped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of the model; names follow the published config.json keys."""

    vocab_size: int = 1536
    hidden_size: int = 96
    num_hidden_layers: int = 16
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048

    def as_dict(self) -> dict[str, int | float]:
        """The fields as a plain dictionary, for checkpoints."""
        return asdict(self)


class GroupedExperts(torch.autograd.Function):
    """SwiGLU experts over tokens sorted by expert, with a hand-written backward pass.

    Autograd through sixteen slices per layer would allocate and add a full-size gradient per slice; writing
    into preallocated buffers avoids that.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        top_k = index.shape[1]
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=gate_up.shape[0]).tolist()
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        rows = x[order // top_k]
        hidden = _grouped_mm(rows, gate_up.transpose(1, 2), counts)
        gate, up = hidden.chunk(2, dim=-1)
        active = F.silu(gate) * up
        out = _grouped_mm(active, down.transpose(1, 2), counts)[inverse].view(*index.shape, -1)
        ctx.save_for_backward(rows, hidden, active, out, weight, order, inverse, gate_up, down)
        ctx.counts = counts
        return torch.bmm(weight.unsqueeze(1), out).squeeze(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, active, out, weight, order, inverse, gate_up, down = ctx.saved_tensors
        grad_weight = torch.bmm(out, grad.unsqueeze(2)).squeeze(2)
        grad_out = grad[order // weight.shape[1]] * weight.flatten()[order].unsqueeze(1)
        grad_down = _grouped_outer(grad_out, active, ctx.counts)
        grad_hidden = _swiglu_backward(hidden, _grouped_mm(grad_out, down, ctx.counts))
        grad_gate_up = _grouped_outer(grad_hidden, rows, ctx.counts)
        grad_rows = _grouped_mm(grad_hidden, gate_up, ctx.counts)
        grad_x = grad_rows[inverse].view(*weight.shape, -1).sum(1)
        return grad_x, None, grad_weight, grad_gate_up, grad_down


def _grouped_mm(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """Multiplies each block of `rows` by its own matrix."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for block, matrix, target in zip(rows.split(counts), matrices, out.split(counts), strict=True):
        torch.mm(block, matrix, out=target)
    return out


def _grouped_outer(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """Weight gradients: one `left.T @ right` per block."""
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    for a, b, target in zip(left.split(counts), right.split(counts), out, strict=True):
        torch.mm(a.T, b, out=target)
    return out


def _swiglu_backward(hidden: Tensor, grad_active: Tensor) -> Tensor:
    """Gradient of silu(gate) * up with respect to the concatenated [gate, up]."""
    gate, up = hidden.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad = torch.empty_like(hidden)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(grad_active, silu, out=grad_up)
    torch.mul(grad_active.mul_(up), sigmoid + silu * (1 - sigmoid), out=grad_gate)
    return grad


class Attention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        q_dim, kv_dim = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, cfg.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.rms_norm_eps)
        self.k_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.rms_norm_eps)
        for norm in (self.q_norm, self.k_norm):
            # With gain 1 a head of 32 cannot put much weight on one key of many; copying would come late.
            nn.init.constant_(norm.weight, 1.4)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.cfg.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), rope)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), rope)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        groups = self.cfg.num_attention_heads // self.cfg.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class SparseMlp(nn.Module):
    """Top-k router and experts; also returns the statistics the balance loss needs."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.top_k = cfg.num_experts_per_tok
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        inter, hidden = cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_up = nn.Parameter(torch.empty(cfg.num_experts, 2 * inter, hidden))
        self.down = nn.Parameter(torch.empty(cfg.num_experts, hidden, inter))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        probs = self.gate(flat).softmax(-1)
        weight, index = probs.topk(self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = GroupedExperts.apply(flat, index, weight, self.gate_up, self.down)
        return out.view_as(x), self.balance(probs, index), index

    def balance(self, probs: Tensor, index: Tensor) -> Tensor:
        """Switch-style loss: 1 when the load is even, larger when few experts take the tokens."""
        load = torch.bincount(index.flatten(), minlength=probs.shape[1]).to(probs.dtype) / index.numel()
        return probs.shape[1] * (load * probs.mean(0)).sum()


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.mlp = SparseMlp(cfg)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        out, balance, index = self.mlp(self.post_attention_layernorm(x))
        return x + out, balance, index


class TinyMoe(nn.Module):
    """The whole language model; the output head shares the embedding."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """Small variance, and smaller still where a block writes to the residual stream."""
        for name, param in self.named_parameters():
            if param.ndim > 1:
                writes = name.endswith(("o_proj.weight", "down"))
                nn.init.normal_(param, std=0.02 / (2 * self.cfg.num_hidden_layers) ** 0.5 if writes else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the final hidden states, the mean balance loss and the chosen experts of every layer."""
        rope = rope_tables(self.cfg, ids.shape[1])
        x, losses, routes = self.embed_tokens(ids), [], []
        for layer in self.layers:
            x, balance, index = layer(x, rope)
            losses.append(balance)
            routes.append(index)
        return self.norm(x), torch.stack(losses).mean(), routes

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary."""
        return F.linear(hidden, self.embed_tokens.weight)


def rope_tables(cfg: Config, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, in the two-halves layout of Qwen3."""
    half = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float32), cfg.rope_theta**-half)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
