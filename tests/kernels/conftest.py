"""Every weight format in turn; and a choice of cases for processors on which each takes seconds."""

from __future__ import annotations

import os

import pytest
from rig import TRIED

# Between them they enter the kernels of every format.
EVERY_FORMAT = {"test_a_product_is_within_rounding", "test_random_routing", "test_decode_and_prefill_in_one_step"}


@pytest.fixture(params=TRIED)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """HYBRID_TEST_BRIEF keeps the first case of each test, and of some in each format."""
    if "HYBRID_TEST_BRIEF" not in os.environ:
        return
    first: dict[object, pytest.Function] = {}
    for item in items:
        first.setdefault((item.location[0], item.originalname, *_formats(item)), item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _formats(item: pytest.Function) -> tuple[object, ...]:
    params = item.callspec.params if item.originalname in EVERY_FORMAT else {}
    return params.get("format"), params.get("kv_format")
