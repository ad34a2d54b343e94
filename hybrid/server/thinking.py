"""How much a model thinks before it answers, and how long it answers: what clients send, as variables of templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from hybrid.server.numbers import Count, CountOrAll
from hybrid.server.refusals import Refusal
from hybrid.server.shapes import names_alone
from hybrid.server.strict import Strict

TEMPLATE_KWARGS = (
    "enable_thinking",
    "thinking",
    "reasoning_effort",
    "preserve_thinking",
    "thinking_budget",
    "verbosity",
)


class Thinking(BaseModel):
    """As clients of Anthropic, DeepSeek and GLM say it. What else they send of it does not change the prompt."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None

    @property
    def on(self) -> bool | None:
        """None: as the model likes."""
        return None if self.type == "adaptive" else self.type == "enabled"


class Reasoning(Strict):
    """As OpenAI's responses say it. No summary is made: the reasoning itself is told."""

    effort: str | None = Field(None, max_length=32)
    summary: Any = None
    generate_summary: Any = None
    context: Literal["auto", "current_turn"] | None = None
    mode: Literal["standard"] | None = None


class ChatReasoning(Reasoning):
    """As clients of OpenRouter say it. exclude: the model reasons, and the reply does not tell it."""

    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: Count | None = None


class Thoughtful(Strict):
    """The fields of what makes a prompt; `reasoning_effort` is OpenAI's, `enable_thinking` and its budget Qwen's."""

    reasoning_effort: str | None = Field(None, max_length=32)
    reasoning: ChatReasoning | None = None
    enable_thinking: bool | None = None
    thinking: bool | Thinking | None = None
    thinking_budget: CountOrAll | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, bool | int | Annotated[str, Field(max_length=100)] | None] | None = Field(
        None, json_schema_extra=names_alone(TEMPLATE_KWARGS)
    )

    def template_kwargs(self, reads: Callable[[str], bool]) -> dict[str, Any]:
        """reads: whether the template of the model has a variable. Raises Refusal for a name that is not allowed, for
        fields that contradict each other, and for a verbosity that the model would not know of.
        """
        given = self.chat_template_kwargs or {}
        kwargs = {name: value for name, value in given.items() if value is not None}
        if strange := sorted(set(kwargs) - set(TEMPLATE_KWARGS)):
            allowed = ", ".join(TEMPLATE_KWARGS)
            message = f"chat_template_kwargs: {strange[0][:50]!r} is not allowed here; allowed: {allowed}"
            raise Refusal(400, message, param="chat_template_kwargs")
        if self.verbosity in ("low", "high") and not reads("verbosity"):
            message = "verbosity: the chat template of this model has none; leave it out, and ask for it in a message"
            raise Refusal(400, message, param="verbosity")
        wished = {name: value for name, value in self._wishes().items() if value is not None}
        return {**wished, **kwargs}

    def _wishes(self) -> dict[str, Any]:
        reasoning = self.reasoning or ChatReasoning.model_validate({})
        thinking = self.thinking.on if isinstance(self.thinking, Thinking) else self.thinking
        effort = _agreed({"reasoning_effort": self.reasoning_effort, "reasoning": reasoning.effort})
        on = _agreed({"enable_thinking": self.enable_thinking, "thinking": thinking, "reasoning": reasoning.enabled})
        budget = _agreed({"thinking_budget": self.thinking_budget, "reasoning": reasoning.max_tokens})
        said = {"reasoning_effort": effort, "enable_thinking": on, "thinking": on, "thinking_budget": budget}
        return {**said, "verbosity": self.verbosity}


def _agreed(given: dict[str, Any]) -> Any:
    """The one thing that several fields say, None where none does. Raises Refusal."""
    said = {name: value for name, value in given.items() if value is not None}
    if len(set(said.values())) > 1:
        raise Refusal(400, f"{' and '.join(said)} say different things; give one of them", param=list(said)[1])
    return next(iter(said.values()), None)
