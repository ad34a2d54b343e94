"""Random checkpoints saved by transformers, and what transformers itself makes of them in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Oracle:
    """A checkpoint directory, a prompt, and the logits [len, vocab] of transformers for it."""

    path: Path
    tokens: np.ndarray
    exact: np.ndarray
    bf16_error: float

    def error(self, logits: np.ndarray) -> float:
        """Relative to the fp32 logits, in the Frobenius norm."""
        return float(np.linalg.norm(logits - self.exact) / np.linalg.norm(self.exact))


def together(errors: Iterable[float]) -> float:
    """The error of several prompts: one alone may have the luck that its near-ties of experts fall the right way."""
    return float(np.sqrt(np.mean(np.square(list(errors)))))


def save(path: Path, family: str, *, dtype: str = "fp32", seed: int = 0, length: int = 70, **changes: Any) -> Oracle:
    """A checkpoint with the initial weights of transformers, in the sizes of `checkpoints.CONFIGS`."""
    torch.manual_seed(seed)
    changes = {"torch_dtype": "float32", "attn_implementation": "eager", **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**CONFIGS[family], **changes}))
    _spread_norms(model)
    model.to(DTYPES[dtype]).save_pretrained(path)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, length).astype(np.int32)
    unknown = Oracle(path, tokens, logits(path, tokens, "fp32"), bf16_error=0.0)
    return replace(unknown, bf16_error=unknown.error(logits(path, tokens, "bf16")))


def _spread_norms(model: Any) -> None:
    """transformers starts norms at 1, biases and sinks near 0: that would hide one left out or taken for another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter += 0.1 * torch.randn_like(parameter)
            if name.endswith("sinks"):
                parameter += 2 * torch.randn_like(parameter)
        for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith("e_score_correction_bias"):
                buffer += 0.1 * torch.randn_like(buffer)


def logits(path: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0].float().numpy()
