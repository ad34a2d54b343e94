"""Messages to a prompt, through the chat template of a model directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError, RequestError
from hybrid.files import Reading, is_file, read_file
from hybrid.text.call_content import with_call_contents
from hybrid.text.messages import (
    RARE_ROLES,
    ROLES,
    Document,
    Message,
    Tool,
    join_text_parts,
    plain_data,
    plain_messages,
    plain_objects,
)
from hybrid.text.rendering import render
from hybrid.text.special_tokens import read_json, read_special_tokens

FILES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
_FILE = Reading(16 << 20, "restore the file", streams=False)
_OWN_NAMES = ("messages", "tools", "documents")  # what a template gets from arguments of their own
_READS_PARTS = re.compile(r"\{%-?\s*for\s[^%]*content")  # a template that goes through the parts of a content


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the variables it may use besides the messages (bos_token, eos_token, ...).

    with_tools: another template, for requests with tools; some models have two.
    """

    source: str
    variables: dict[str, str] = field(default_factory=dict)
    with_tools: str | None = None

    @property
    def sources(self) -> str:
        """All that its templates say, of how answers are written too."""
        return self.source + (self.with_tools or "")

    def reads(self, variable: str) -> bool:
        """Whether its templates speak of a variable."""
        return re.search(rf"\b{re.escape(variable)}\b", self.sources) is not None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Document] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that asks for the assistant's next message; it holds its special tokens already.

        A message has a `role`, and a `content`, which is a text or a list of parts, or `tool_calls`; it may have the
        model's reasoning, and whatever else the template reads. tools: JSON schemas of functions. documents: objects
        with a title and a text. template_kwargs: variables of this template, such as `enable_thinking` or
        `reasoning_effort`; `add_generation_prompt` is one too. Raises RequestError.
        """
        source = self.with_tools if tools is not None and self.with_tools is not None else self.source
        try:
            plain = with_call_contents(plain_messages(messages, _allowed_roles(source)), source, self.variables)
            variables = {
                "add_generation_prompt": True,
                **self.variables,
                **_check_template_kwargs(template_kwargs),
                "messages": plain if _READS_PARTS.search(source) else join_text_parts(plain),
                "tools": plain_objects("tools", tools, '{"type": "function", "function": {...}}'),
                "documents": plain_objects("documents", documents, '{"title": "...", "text": "..."}'),
            }
        except RecursionError:
            raise RequestError("the messages are nested too deeply, or hold themselves; give plain data") from None
        return render(source, variables)


def load_template(model_path: Path) -> ChatTemplate | None:
    """The chat template of a model directory, None where it has none."""
    named = _configured(read_json(model_path / "tokenizer_config.json").get("chat_template"))
    if files := {name: _read_text(model_path / file) for name, file in FILES.items() if is_file(model_path / file)}:
        named = files  # they count more than the configuration, as a whole
    if "default" not in named:
        return None
    tokens = read_special_tokens(model_path)
    variables = {**tokens.defaults, **tokens.texts()}
    return ChatTemplate(named["default"], variables, named.get("tool_use"))


def _read_text(path: Path) -> str:
    try:
        return read_file(path, _FILE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}); restore the file") from None


def _configured(template: Any) -> dict[str, str]:
    """One template, or a list of named ones: `default` is for chat, `tool_use` for chat with tools."""
    entries = template if isinstance(template, list) else [{"name": "default", "template": template}]
    named = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}


def _allowed_roles(source: str) -> tuple[str, ...]:
    """Those of all templates, and those that only some know, where this one names them."""
    return ROLES + tuple(role for role in RARE_ROLES if f"'{role}'" in source or f'"{role}"' in source)


def _check_template_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RequestError(f'template_kwargs must be an object like {{"enable_thinking": false}}, not {given!r:.80}')
    if taken := sorted(set(given) & set(_OWN_NAMES)):
        raise RequestError(f"template_kwargs has {taken[0]!r}, which is an argument of its own; give it there")
    variables: dict[str, Any] = plain_data(given)
    return variables
