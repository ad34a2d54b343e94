"""Whose request is answered: that of an API key, by its number; all are one client where no key is demanded."""

from __future__ import annotations

from contextvars import ContextVar

CLIENT: ContextVar[str] = ContextVar("client", default="")  # `Gate` sets it before anything reads the request
