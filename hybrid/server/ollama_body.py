"""What /api/chat and /api/generate take, as the chat that they ask for."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hybrid.server.bodies import checked
from hybrid.server.chat_tools import Tool
from hybrid.server.fields import MAX_MESSAGES, MAX_TOOLS, MAX_TOP_LOGPROBS, ChatBody, Stops
from hybrid.server.numbers import LARGEST, WHOLE, CountOrAll, Finite, NoneOfThem, Seed
from hybrid.server.refusals import Refusal
from hybrid.server.shapes import CALLED_IN_ORDER, OLLAMA_FIELDS, TOP_NEEDS
from hybrid.server.strict import Strict

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class Options(Strict):
    """Of an answer. Those of how a model is loaded are taken, of no effect."""

    num_predict: Annotated[int, Field(ge=-2, le=LARGEST), WHOLE] | None = None
    temperature: Finite | None = Field(None, ge=0, le=2)
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: CountOrAll | None = None
    min_p: Finite | None = Field(None, ge=0, le=1)
    seed: Seed | None = None
    stop: Stops | None = None
    repeat_penalty: Finite | None = Field(None, ge=0.01, le=100)
    repeat_last_n: CountOrAll | None = None
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    mirostat: NoneOfThem | None = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    tfs_z: Finite | None = Field(None, ge=1, le=1)
    typical_p: Finite | None = Field(None, ge=1, le=1)
    num_ctx: Any = None
    num_keep: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    numa: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    logits_all: Any = None
    vocab_only: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    penalize_newline: Any = None
    embedding_only: Any = None

    def fields(self) -> dict[str, Any]:
        """Of a chat. Raises Refusal."""
        if self.repeat_last_n not in (None, -1) and self.repeat_penalty not in (None, 1):
            raise Refusal(400, "options.repeat_last_n: this server looks at the whole text; give -1", "options")
        limit = self.num_predict if self.num_predict is not None and self.num_predict >= 0 else None
        return {**{name: getattr(self, name) for name in _SAMPLING}, "max_tokens": limit}


class OllamaBody(Strict):
    """What both share."""

    model_config = ConfigDict(json_schema_extra=TOP_NEEDS)

    model: str = Field(max_length=1000)
    options: Options | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    think: bool | Effort | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    stream: bool | None = None
    keep_alive: Any = None
    truncate: Any = None
    shift: Any = None

    def chat_of(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> ChatBody:
        """Raises Refusal."""
        chat: dict[str, Any] = {"messages": messages, **(self.options or Options.model_validate({})).fields()}
        chat |= {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs}
        if tools:
            chat["tools"] = tools
        if isinstance(self.think, str):
            chat["reasoning_effort"] = self.think
        elif self.think is not None:
            chat["enable_thinking"] = self.think
        if self.format == "json":
            chat["response_format"] = {"type": "json_object"}
        elif self.format:
            schema = {"name": "answer", "schema": self.format}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        return checked(ChatBody, chat)


class OllamaChatBody(OllamaBody):
    """POST /api/chat."""

    messages: list[dict[str, Any]] = Field([], max_length=MAX_MESSAGES, json_schema_extra=CALLED_IN_ORDER)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)

    def chat_body(self) -> ChatBody:
        """Raises Refusal."""
        names = Names()
        messages = [names.message(message, f"messages.{index}") for index, message in enumerate(self.messages)]
        return self.chat_of(messages, [tool.plain() for tool in self.tools or ()])


class OllamaGenerateBody(OllamaBody):
    """POST /api/generate. raw: the prompt is continued as it is."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: list[int] | None = Field(None, max_length=0)
    images: list[str] | None = Field(None, max_length=0)

    def chat_body(self) -> ChatBody:
        """Raises Refusal."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.chat_of([*system, {"role": "user", "content": self.prompt}])


class ShowBody(Strict):
    """POST /api/show."""

    model: str | None = Field(None, max_length=1000)
    name: str | None = Field(None, max_length=1000)
    verbose: bool | None = None


class Names:
    """Calls have no names there, so they are counted, and the results of tools come in the same order."""

    def __init__(self) -> None:
        self._made = self._answered = 0

    def message(self, given: dict[str, Any], place: str) -> dict[str, Any]:
        """Raises Refusal."""
        if strange := sorted(name for name in given.keys() - {*OLLAMA_FIELDS} if given[name] is not None):
            raise Refusal(400, f"{place}: {strange[0][:50]!r} is unknown here")
        if given.get("images") not in (None, []):
            raise Refusal(400, f"{place}: this server reads text alone, no images")
        content = given.get("content")
        message: dict[str, Any] = {"role": given.get("role"), "content": "" if content is None else content}
        if given.get("thinking") is not None:
            message["reasoning_content"] = given["thinking"]
        if calls := self._calls([] if given.get("tool_calls") is None else given["tool_calls"], place):
            message["tool_calls"] = calls
        if given.get("role") == "tool":
            message["tool_call_id"] = given.get("tool_call_id") or _id(self._answered)
            message["name"] = given.get("tool_name") or given.get("name")
            self._answered += 1
        return message

    def _calls(self, given: Any, place: str) -> list[dict[str, Any]]:
        calls = []
        for call in given if isinstance(given, list) else [None]:
            call = call if isinstance(call, dict) else {}
            function = call.get("function")
            arguments = function.get("arguments") if isinstance(function, dict) else None
            arguments = {} if arguments is None else arguments
            if not isinstance(function, dict) or not isinstance(arguments, dict):
                raise Refusal(400, f"{place}: tool_calls must be functions whose arguments are objects")
            if not isinstance(name := function.get("name"), str):
                raise Refusal(400, f"{place}: the name of a function must be a text")
            made = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"type": "function", "id": call.get("id") or _id(self._made), "function": made})
            self._made += 1
        return calls


def _id(number: int) -> str:
    """As Mistral's templates want it: nine letters or digits."""
    return f"call{number:05d}"
