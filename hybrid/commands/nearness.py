"""How near the logits of another arithmetic are to those of the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MEDIAN = 0.02  # relative error of a token's logits: what rounding makes of them
FAR = 0.1  # an error above it: two experts were nearly tied, and the other one was chosen
FAR_SHARE = 0.1  # of tokens
QUANTISED = 3  # times MEDIAN and FAR, where the CPU rounds to 8 bits what a device leaves in bf16


@dataclass(frozen=True)
class Nearness:
    """median: of the relative errors of tokens. far: share of tokens that are too far off. factor: of the limits."""

    median: float
    far: float
    factor: int = 1

    @property
    def problem(self) -> str | None:
        """Why this is not the same within rounding; None if it is."""
        median, far = self.factor * MEDIAN, self.factor * FAR
        if not self.median < median:
            return f"the logits are off by {self.median:.2g} in the median; less than {median:.2g} is rounding"
        if not self.far <= FAR_SHARE:
            return f"the logits of {self.far:.0%} of tokens are off by more than {far:.2g}; {FAR_SHARE:.0%} may be"
        return None


def nearness(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], quantised: bool = False) -> Nearness:
    """Of logits [tokens, vocab]; if one is no number, all are off by 1. quantised: whether the CPU rounds activations,
    or keys and values, to 8 bits.
    """
    factor = QUANTISED if quantised else 1
    if not np.isfinite(found).all():
        return Nearness(1.0, 1.0, factor)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return Nearness(float(np.median(errors)), float(np.mean(errors > factor * FAR)), factor)
