"""Every weight format in turn."""

from __future__ import annotations

import pytest

from hybrid.weights.formats import FORMATS


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)
