"""Whose request is answered: that of an API key, by its number; all are one client where no key is demanded."""

from __future__ import annotations

from contextvars import ContextVar

# `Gate` sets both before anything reads the request.
CLIENT: ContextVar[str] = ContextVar("client", default="")
URGENT: ContextVar[bool] = ContextVar("urgent", default=True)  # whether it may ask for a priority below 0
NOBODY = "nobody"  # a client that no request is from, where what it costs is no matter: keys have numbers
