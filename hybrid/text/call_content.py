"""Messages that call tools and say nothing, with the content that a chat template reads of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hybrid.errors import RequestError
from hybrid.text.rendering import render

_NAME, _ID = "zqxjkv", "123456abc"  # the one is in no template; the other is as Mistral's templates want it
_CALL = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": {}}}
_FORMS: tuple[dict[str, Any], ...] = ({"content": None}, {"content": ""}, {})  # the first that is read is taken


def with_call_contents(
    messages: list[dict[str, Any]], source: str, variables: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The same. Whether the content of such a message is null, empty or left out is as it was given, as long as the
    template writes the calls then; else as it writes them. variables: of the template.
    """
    if not any(map(_calls_alone, messages)):
        return messages
    read = _read_forms(source, tuple(sorted((name, text) for name, text in variables.items() if type(text) is str)))
    return [_as_read(message, read) if _calls_alone(message) else message for message in messages]


def _calls_alone(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls")) and not message.get("content")


def _as_read(message: dict[str, Any], read: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    given = {"content": message["content"]} if "content" in message else {}
    form = given if given in read or not read else read[0]
    return {**{name: value for name, value in message.items() if name != "content"}, **form}


@lru_cache(maxsize=8)
def _read_forms(source: str, variables: tuple[tuple[str, str], ...]) -> tuple[dict[str, Any], ...]:
    """Found by trying: those that the template takes, that it writes no null of, and with which it writes the calls, if
    there are such.
    """
    written = [(form, _written(source, dict(variables), form)) for form in _FORMS]
    nulls = min((text.count("None") for _, text in written if text is not None), default=0)
    taken = [(form, text) for form, text in written if text is not None and text.count("None") == nulls]
    return tuple(form for form, text in taken if _NAME in text) or tuple(form for form, _ in taken)


def _written(source: str, variables: dict[str, str], form: dict[str, Any]) -> str | None:
    """A prompt with such a message, None where the template refuses it."""
    calls = {"role": "assistant", **form, "tool_calls": [_CALL]}
    messages = [{"role": "user", "content": "a"}, calls, {"role": "tool", "content": "b", "tool_call_id": _ID}]
    fixed = {"add_generation_prompt": True, "tools": None, "documents": None}
    try:
        return render(source, {**fixed, **variables, "messages": messages})
    except RequestError:
        return None
