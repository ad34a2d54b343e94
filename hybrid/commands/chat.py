"""`hybrid chat`: talk with a model; and what `hybrid run` shares with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hybrid.commands.console import progress_bar, say
from hybrid.commands.conversation import ChatInputs, Conversation
from hybrid.commands.flags import command, new_app
from hybrid.commands.form import FormOptions
from hybrid.config import EngineConfig, check_config
from hybrid.core import SamplingParams
from hybrid.errors import ConfigError
from hybrid.files.json import parse_json
from hybrid.files.reading import Reading, read_file
from hybrid.settings import check_settings, setting

app = new_app()
STOP, DROP = "stop", "drop"
_TOOLS = Reading(16 << 20, 'give a JSON list like [{"type": "function", "function": {"name": ...}}]', prefix="--tools")


@dataclass(frozen=True)
class ChatOptions:
    """What goes with the questions of a chat."""

    GROUP: ClassVar[str] = "chat"

    system: str | None = setting(None, "The system message.")
    tools: Path | None = setting(None, "JSON file with a list of tools that the model may call.")
    chat_template_kwargs: str | None = setting(
        None, 'Variables of the chat template, as a JSON object: {"enable_thinking": false}.'
    )
    when_full: str = setting(
        STOP, f"When the context is full: one of {STOP}, {DROP}; drop forgets the oldest turns.", choices=(STOP, DROP)
    )
    hide_reasoning: bool = setting(False, "Do not show what the model thinks before it answers.")

    def inputs(self) -> ChatInputs:
        """Raises ConfigError."""
        kwargs = _read_kwargs(self.chat_template_kwargs) if self.chat_template_kwargs else {}
        tools = _read_tools(self.tools) if self.tools else None
        return ChatInputs(self.system, tools, kwargs, self.when_full == DROP, self.hide_reasoning)


@command(app)
def chat(config: EngineConfig, params: SamplingParams, options: ChatOptions, form: FormOptions) -> None:
    """Talk with a model: questions from the keyboard, or one on each line of standard input."""
    from hybrid.serving.params import check_params

    check_settings(options)
    check_config(config)
    check_params(params := replace(params, grammar=form.read()))
    inputs = options.inputs()
    from hybrid.serving.llm import LLM

    with progress_bar() as progress:
        llm = LLM.from_config(config, progress, say)
    with llm:
        Conversation(llm, params, inputs).run()


def _read_tools(path: Path) -> list[dict[str, Any]]:
    tools = parse_json(read_file(path, _TOOLS), path, _TOOLS)
    if isinstance(tools, dict):
        tools = tools.get("tools", [tools])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _TOOLS.refuse(path, "holds no list of tools")
    return tools


def _read_kwargs(text: str) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except (ValueError, RecursionError):
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ConfigError(
            f"--chat-template-kwargs {text!r:.80} is no JSON object; write one, like '{{\"enable_thinking\": false}}'"
        )
    return kwargs
