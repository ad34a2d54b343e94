"""How many calls go to the most called experts of each layer."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_cache.coverage import coverage
from gpu_cache.errors import CacheError
from gpu_cache.trace import Calls


def alone(experts: list[int]) -> Calls:
    """One call a step, of one layer of 8 experts."""
    step = np.arange(len(experts))
    none, score = np.zeros_like(step), np.ones(len(step), np.float32)
    return Calls(step, none, none, np.arange(len(step) + 1), np.array(experts), score, 1, 8)


def test_the_most_called_are_chosen_from_all_or_from_the_first_half() -> None:
    calls = alone([1, 1, 2, 1, 3, 3, 3, 1])
    assert coverage(calls, 1 / 8) == 4 / 8 and coverage(calls, 2 / 8) == 7 / 8
    assert coverage(calls, 1 / 8, held_out=True) == 1 / 4 and coverage(calls, 1, held_out=True) == 1


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(CacheError, match="share of experts"):
        coverage(alone([1, 2]), share)


def test_one_step_has_no_second_half() -> None:
    with pytest.raises(CacheError, match="no second half"):
        coverage(alone([1]), 0.5, held_out=True)
