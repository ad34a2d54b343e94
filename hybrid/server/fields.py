"""What the endpoints take, with the bounds of every number; docs/server.md has the same as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hybrid.core import SamplingParams, ToolCall
from hybrid.server.chat_tools import AnyTool, call_for_client, check_choice, may_be_called, with_functions
from hybrid.server.constraints import Constrained
from hybrid.server.numbers import ALL, LARGEST, WHOLE, Count, CountOrAll, Finite, Limit, No, Seed, Yes
from hybrid.server.prompt_logprobs import PromptScored
from hybrid.server.refusals import Refusal
from hybrid.server.shapes import CALLS_NEED, CHOICE, MESSAGES, ONE_TEXT, PROMPTS, SCORED_WHOLE, TOKEN_IDS, TOP_NEEDS
from hybrid.server.strict import Strict
from hybrid.server.thinking import Thoughtful
from hybrid.server.usual import Usual

MAX_N, MAX_PROMPTS, MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS = 8, 128, 16, 1024, 20
MAX_BIASES, MAX_TOOLS, MAX_MESSAGES = 1024, 128, 10_000
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(Constrained, Usual):
    """What chats and completions share."""

    model: str | None = Field(None, max_length=1000)
    temperature: Finite | None = Field(None, ge=0, le=2)
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: CountOrAll | None = None
    min_p: Finite | None = Field(None, ge=0, le=1)
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(None, ge=0.01, le=100)
    repeat_penalty: Finite | None = Field(None, ge=0.01, le=100)
    seed: Seed | None = None
    random_seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: list[Count] | None = Field(None, max_length=MAX_STOPS)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, max_length=MAX_BIASES, json_schema_extra=TOKEN_IDS
    )
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N), WHOLE] | None = None
    max_tokens: CountOrAll | None = None
    priority: Annotated[int, Field(ge=-LARGEST, le=LARGEST), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def told_usage(self) -> StreamOptions:
        """What a stream tells of the usage."""
        return self.stream_options or StreamOptions()

    def params(self, vocab: int, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """For one completion of each prompt or conversation. Raises Refusal."""
        if self.best_of not in (None, 1, self.n or 1):
            raise Refusal(400, "best_of: all completions are told; give as many as n", param="best_of")
        seed = self.random_seed if self.seed is None else self.seed
        penalty = self.repetition_penalty if self.repetition_penalty is not None else self.repeat_penalty
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if penalty is None else penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if seed is None else seed % 2**64,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            logit_bias=_biases(self.logit_bias or {}, vocab),
            logprobs=logprobs,
            priority=self.priority or 0,
            grammar=self.grammar(),
        )


class CompletionBody(Sampling, PromptScored):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"allOf": [SCORED_WHOLE]})

    prompt: str | list[str] | list[Count] | list[list[Count]] = Field(json_schema_extra=PROMPTS)
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Raises Refusal for none or too many."""
        given: Any = self.prompt
        one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts = [given] if one else list(given)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise Refusal(400, f"prompt has {len(prompts)} prompts; give 1 to {MAX_PROMPTS}", param="prompt")
        return prompts


class ChatInputBody(Thoughtful):
    """What makes the prompt of a chat."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES, json_schema_extra=MESSAGES)
    tools: list[AnyTool] | None = Field(None, max_length=MAX_TOOLS)

    def given_tools(self) -> list[dict[str, Any]] | None:
        return [tool.plain() for tool in self.tools] if self.tools else None

    def plain_messages(self) -> list[dict[str, Any]]:
        """As chat templates read them. Raises Refusal."""
        return with_functions(self.messages)


class ChatBody(ChatInputBody, Sampling, PromptScored):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra={"allOf": [SCORED_WHOLE, TOP_NEEDS, CALLS_NEED]})

    tool_choice: Any = Field(None, json_schema_extra=CHOICE)
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    modalities: list[Literal["text"]] | None = None
    echo: No | None = None
    include_reasoning: bool | None = None
    reasoning_format: Literal["auto", "deepseek", "parsed", "hidden"] | None = None
    separate_reasoning: Yes | None = None
    stream_reasoning: Yes | None = None

    def check(self) -> None:
        """Raise Refusal for what is known, and cannot be done."""
        check_choice(self.tool_choice)
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true", param="top_logprobs")

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Raises Refusal."""
        return may_be_called(self.given_tools(), self.tool_choice)

    def call(self, call: ToolCall) -> dict[str, Any]:
        """A call that the model has made, as a reply has it."""
        return call_for_client(call, self.tools or ())

    def params_for(self, vocab: int) -> SamplingParams:
        """For one completion of the conversation. Raises Refusal."""
        return self.params(vocab, self.limit(), (self.top_logprobs or 0) if self.logprobs else None)

    def limit(self) -> int | None:
        """The most tokens of an answer; None: to its end."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if limit == ALL else limit

    @property
    def tells_reasoning(self) -> bool:
        """Whether the reply has what the model thought before it answered."""
        hidden = self.include_reasoning is False or self.reasoning_format == "hidden"
        return not (hidden or (self.reasoning and self.reasoning.exclude))


def completions_asked(body: Mapping[str, Any]) -> int:
    """How many completions a body asks for that is not checked yet; 1 where what it says cannot be."""
    count, prompt = body.get("n"), body.get("prompt")
    several = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (list, str)) else 1
    return min(several, MAX_PROMPTS) * (count if type(count) is int and 1 <= count <= MAX_N else 1)


class TokenizeBody(Strict):
    """POST /tokenize: a text, by one of two names."""

    model_config = ConfigDict(json_schema_extra=ONE_TEXT)

    model: str | None = Field(None, max_length=1000)
    content: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    with_pieces: bool = False


class DetokenizeBody(Strict):
    """POST /detokenize."""

    model: str | None = Field(None, max_length=1000)
    tokens: list[Count] = Field(max_length=1 << 20)


class TemplateBody(ChatInputBody):
    """POST /apply-template."""

    model: str | None = Field(None, max_length=1000)


def _biases(given: Mapping[str, float], vocab: int) -> dict[int, float]:
    biases = {}
    for name, value in given.items():
        token = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else -1
        if not 0 <= token < vocab:
            message = f"logit_bias: {name[:20]!r} is not a token id of this model; allowed: 0 to {vocab - 1}"
            raise Refusal(400, message, param="logit_bias")
        biases[token] = value
    return biases
