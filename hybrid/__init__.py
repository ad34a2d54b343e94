"""A runtime that serves Mixture-of-Experts language models on the machine people already have.

    from hybrid import LLM, SamplingParams

Names are resolved on first use, so that `import hybrid` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.config import CacheConfig as CacheConfig
    from hybrid.config import EngineConfig as EngineConfig
    from hybrid.core import Completion as Completion
    from hybrid.core import Grammar as Grammar
    from hybrid.core import SamplingParams as SamplingParams
    from hybrid.core import TextDelta as TextDelta
    from hybrid.errors import HybridError as HybridError
    from hybrid.serving.async_llm import AsyncLLM as AsyncLLM
    from hybrid.serving.llm import LLM as LLM

_HOMES = {
    "AsyncLLM": "hybrid.serving.async_llm",
    "CacheConfig": "hybrid.config",
    "Completion": "hybrid.core",
    "EngineConfig": "hybrid.config",
    "Grammar": "hybrid.core",
    "HybridError": "hybrid.errors",
    "LLM": "hybrid.serving.llm",
    "SamplingParams": "hybrid.core",
    "TextDelta": "hybrid.core",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hybrid-moe")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
