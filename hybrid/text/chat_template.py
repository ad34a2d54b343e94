"""Messages to a prompt, through the chat template of a model directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError, RequestError
from hybrid.text.tokenizer import import_transformers, read_json, token_text

Message = Mapping[str, str]
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the variables it may use besides the messages (bos_token, eos_token, ...)."""

    source: str
    variables: dict[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the assistant's next message; it holds its special tokens already.

        Each message has a `role` and a `content`. Raises RequestError.
        """
        _check_messages(messages)
        # Templates are untrusted programs: transformers runs them in a sandbox.
        renderer = import_transformers("transformers.utils.chat_template_utils")
        conversation = [dict(message) for message in messages]
        try:
            rendered, _ = renderer.render_jinja_template(
                [conversation], chat_template=self.source, add_generation_prompt=True, **self.variables
            )
        except Exception as error:  # whatever the template does wrong
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"the chat template refuses these messages: {reason}") from None
        return str(rendered[0])


def load_template(model_path: Path) -> ChatTemplate | None:
    """The chat template of a model directory, None where it has none."""
    config = read_json(model_path / "tokenizer_config.json")
    file = model_path / "chat_template.jinja"
    source = _read_text(file) if file.is_file() else _configured(config.get("chat_template"))
    return ChatTemplate(source, _special_tokens(config)) if source else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}); restore the file") from None


def _configured(template: Any) -> str | None:
    """One template, or a list of named ones of which `default` is for chat."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    texts = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _check_messages(messages: Sequence[Message]) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError('messages must be a list like [{"role": "user", "content": "..."}] with one or more entries')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise RequestError(f"message {index} must be an object with a role and a text content, not {message!r:.80}")
        if message.get("role") not in ROLES:
            raise RequestError(f"message {index} has the role {message.get('role')!r}; allowed: {', '.join(ROLES)}")
