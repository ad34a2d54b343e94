"""Compares logits with the CPU's, within rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_MEDIAN_ERROR = 0.02  # of the relative errors of tokens: more than this is not rounding
MAX_TOKEN_ERROR = 0.1  # a token above it is an outlier: two experts were nearly tied, and the other one was chosen
MAX_OUTLIER_SHARE = 0.1  # of tokens
QUANTISED_FACTOR = 3  # multiplies both error limits where the CPU rounds to 8 bits what a device leaves in bf16


@dataclass(frozen=True)
class LogitError:
    """Relative errors of the logits of tokens.

    outlier_share: share of tokens above MAX_TOKEN_ERROR. tolerance_factor multiplies both error limits.
    """

    median: float
    outlier_share: float
    tolerance_factor: int = 1

    @property
    def problem(self) -> str | None:
        """Why this is more than rounding; None if it is not."""
        median, outlier = self.tolerance_factor * MAX_MEDIAN_ERROR, self.tolerance_factor * MAX_TOKEN_ERROR
        if not self.median < median:
            return f"the logits are off by {self.median:.2g} in the median; less than {median:.2g} is rounding"
        if not self.outlier_share <= MAX_OUTLIER_SHARE:
            return (
                f"the logits of {self.outlier_share:.0%} of tokens are off by more than {outlier:.2g}; "
                f"{MAX_OUTLIER_SHARE:.0%} may be"
            )
        return None


def measure_logit_error(
    actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], quantised: bool = False
) -> LogitError:
    """Error of logits [tokens, vocab] relative to `expected`; 1 if any logit is not finite.

    quantised: the CPU rounds activations, or keys and values, to 8 bits.
    """
    factor = QUANTISED_FACTOR if quantised else 1
    if not np.isfinite(actual).all():
        return LogitError(1.0, 1.0, factor)
    errors = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return LogitError(float(np.median(errors)), float(np.mean(errors > factor * MAX_TOKEN_ERROR)), factor)
