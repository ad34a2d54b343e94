"""Hooks of policies and admission rules: those that do nothing are not called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Hook = TypeVar("Hook", bound=Callable[..., object])


def overridden(method: Hook, default: Callable[..., object]) -> Hook | None:
    """A method of an object, or None if it is the default, which does nothing."""
    return None if getattr(method, "__func__", None) is default else method
