"""Model families: one file each, named after the `model_type` of config.json and found by that name."""

from __future__ import annotations

import importlib
import pkgutil
import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models import families
from hybrid.models.spec import ModelSpec


@cache
def supported_models() -> tuple[str, ...]:
    """The values of `model_type` that can be loaded, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The model that the contents of a config.json describe. Raises `ConfigError` on the first bad value."""
    model_type = config.get("model_type")
    if model_type not in supported_models():
        raise ConfigError(
            f"config.json: model_type {reprlib.repr(model_type)} is not supported; "
            f"supported: {', '.join(supported_models())}"
        )
    family = importlib.import_module(f"{families.__name__}.{model_type}")
    spec: ModelSpec = family.spec(config)
    return spec
