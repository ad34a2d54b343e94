"""As DeepSeek-V4 is published: e4m3 with a scale for each 128 by 128, experts in e2m1 with one for each 32 inputs.

Scales are powers of two, in tensors named `scale`; e2m1 lies two in a byte of int8. What has no scale is not quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hybrid.weights.checkpoints.schemes.base import MatrixEntry
from hybrid.weights.checkpoints.schemes.scaled import E2M1, E4M3, INT, scaled_matrix
from hybrid.weights.shard import Entry


@dataclass(frozen=True)
class DeepSeekScheme:
    """experts: the packed format of experts, where no tensors are at hand; format: that of all else."""

    experts: str
    format: str = "fp8"

    def matrices(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, MatrixEntry]]:
        for name, numbers in entries.items():
            module = name.removesuffix(".weight")
            if module != name and numbers.dtype in (E4M3, INT) and f"{module}.scale" in entries:
                pairs = replace(numbers, dtype=E2M1) if numbers.dtype == INT else numbers
                yield name, scaled_matrix(module, pairs, {f"{module}.weight_scale": entries[f"{module}.scale"]})


def read_scheme(config: Mapping[str, Any], quantisation: Mapping[str, Any]) -> DeepSeekScheme | None:
    """None if config.json does not say what experts are."""
    experts = config.get("expert_dtype") or quantisation.get("expert_dtype")
    return DeepSeekScheme("mxfp4" if experts == "fp4" else "fp8") if experts else None
