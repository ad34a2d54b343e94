"""Passive types shared by every layer. A leaf: imports nothing of the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Grammar:
    """What a text must be, made by one of the methods. `hybrid.text.grammar` checks and compiles it."""

    kind: Literal["json", "regex", "choice", "lark", "gbnf"]
    source: str  # JSON of a schema or of a list of texts; else as it was given

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str | None = None) -> Grammar:
        """JSON that satisfies a schema, which may be JSON text itself; None: any object."""
        schema = {"type": "object"} if schema is None else schema
        return cls("json", schema if isinstance(schema, str) else dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that a regular expression matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of these."""
        return cls("choice", dumps(list(texts)))

    @classmethod
    def rules(cls, text: str) -> Grammar:
        """What a grammar describes: that of Lark, whose first rule is `start`, or GBNF, whose first is `root`."""
        return cls("gbnf" if "::=" in text else "lark", text)


SpanObserver = Callable[[str, float, float], None]  # what happened, from when to when: seconds of time.perf_counter


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Checked by `hybrid.serving.params.check_params`, not on construction. The `metadata` are
    attributes of `hybrid.settings.Setting`.

    max_tokens None is 128 for a prompt; an answer in a chat then goes on to its end or to that of the context.
    temperature 0 is greedy. top_k 0, top_p 1.0 and min_p 0.0 switch those filters off; repetition_penalty 1.0,
    presence_penalty 0.0 and frequency_penalty 0.0 switch the penalties off. logprobs: None, or how many of the most
    likely tokens to report beside the chosen one (0 reports the chosen one alone). seed None draws a fresh one.
    stop: a text or several. n: completions of each prompt, which differ where they are drawn. min_tokens: before there
    are so many, no token ends the text; a stop string does. logit_bias: what is added to the logits of token ids.
    logits_processor: called on the engine's thread with all token ids so far, int32 [n], and the logits, float32
    [vocab], which it may change or replace by what it returns; penalties, bias and filters come after it.
    priority: requests of a lower number are begun before others that wait, in the place of others that run where there
    is none, and give up their memory after them.
    grammar: what the text must be, see `Grammar`; tokens that do not go on with it cannot come, and it ends with
    it. In a chat it begins behind the reasoning.
    """

    GROUP: ClassVar[str] = "sampling"

    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens to generate at most, for each prompt.",
            "minimum": 0,
            "shown": "128, but in a chat to the end of the answer or of the context",
        },
    )
    temperature: float = field(
        default=0.0,
        metadata={"help": "Randomness; 0 takes the likeliest token.", "minimum": 0.0, "maximum": 100.0},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Keep the likeliest tokens that reach this probability.",
            "minimum": 0.0,
            "above": True,
            "maximum": 1.0,
        },
    )
    top_k: int = field(
        default=0, metadata={"help": "Keep this many of the likeliest tokens; 0 keeps all.", "minimum": 0}
    )
    min_p: float = field(
        default=0.0,
        metadata={"help": "Keep tokens this likely, relative to the likeliest.", "minimum": 0.0, "maximum": 1.0},
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={"help": "Above 1 avoids tokens seen before.", "minimum": 0.01, "maximum": 100.0},
    )
    presence_penalty: float = field(
        default=0.0,
        metadata={"help": "Above 0 avoids tokens made before.", "minimum": -2.0, "maximum": 2.0},
    )
    frequency_penalty: float = field(
        default=0.0,
        metadata={"help": "The same for each time they were.", "minimum": -2.0, "maximum": 2.0},
    )
    seed: int | None = field(default=None, metadata={"help": "Makes sampling repeatable.", "minimum": 0})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "End before this text"})
    ignore_eos: bool = field(default=False, metadata={"help": "Go on after the end of the text."})
    logprobs: int | None = field(
        default=None, metadata={"help": "Likely tokens to report beside the chosen one.", "flag": False, "minimum": 0}
    )
    stop_token_ids: tuple[int, ...] = field(default=(), metadata={"help": "End at this token"})
    min_tokens: int = field(default=0, metadata={"help": "Tokens before which no token ends the text.", "minimum": 0})
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        metadata={"help": 'Added to the logits of tokens, as JSON: {"15": -100}.', "minimum": -1e6, "maximum": 1e6},
    )
    n: int = field(default=1, metadata={"help": "Completions of each prompt.", "minimum": 1, "maximum": 1024})
    priority: int = field(
        default=0,
        metadata={"help": "Lower comes first.", "flag": False, "minimum": -(2**31), "maximum": 2**31 - 1},
    )
    logits_processor: Callable[..., Any] | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of the chosen token and of the most likely ones, before temperature and filters.

    rank: its place among all tokens, the likeliest has 1; 0 where a text was made and not scored.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = field(default=0, compare=False)


@dataclass(frozen=True)
class ToolCall:
    """A tool that a model wants to be called. arguments: JSON of an object, unless the model wrote something else."""

    name: str
    arguments: str
    id: str

    def to_dict(self) -> dict[str, Any]:
        """As messages hold it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class RequestTimes:
    """Seconds since a request was made: when its prompt began to be computed, its first token, its end. None: never."""

    started: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a completion. cached_tokens: of the prompt, whose keys and values an earlier request had left."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass
class Completion:
    """What one prompt produced. `text` never contains the stop string or half a character.

    Of a chat it is what the assistant says; `reasoning`, what it thought before, and `tool_calls` are apart. They are
    empty for a raw prompt, whose text is whatever the model wrote.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    index: int = 0  # position of the prompt in the list given to `generate`
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt, whose keys and values an earlier request had left
    prompt: str | None = None  # its text, if it was given as one
    sample: int = 0  # which of the n completions of its prompt
    times: RequestTimes = field(default=RequestTimes(), compare=False)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), len(self.token_ids), self.cached_tokens)

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, to be sent back with the next question. Its reasoning is there for chat templates
        that read it; those that do not want it leave it out.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message


@dataclass(frozen=True)
class TextDelta:
    """One piece of a streamed completion, whose fields it has; `finish_reason` is set on the last piece only. A call of
    a tool comes whole.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    index: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Batch:
    """One step: rows of decode and prefill mixed. Rows of one sequence are adjacent and their positions ascend by one.

    token_ids, sequences, positions: int32 [rows]. sequences: the place of each row's sequence, from 0 to the plan's
    number of sequences. logit_rows: int32 [n], ascending rows whose next-token logits are wanted. lengths: int32
    [rows], how many tokens of each row's sequence are known, those to be computed in later steps included; None: no
    others than these. Only a model whose rope depends on it looks at it: all steps of a sequence must agree there.
    """

    token_ids: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    logit_rows: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32] | None = None

    def known_lengths(self) -> npt.NDArray[np.int32]:
        """`lengths`, or those that the rows tell."""
        import numpy as np  # whose loading takes longer than `hybrid --help`

        if self.lengths is not None:
            return self.lengths
        last = np.flatnonzero(np.diff(self.sequences, append=-1))
        counts = np.diff(last, prepend=-1)
        return np.repeat(self.positions[last] + np.int32(1), counts)


@dataclass(frozen=True)
class StepTimes:
    """Seconds that one step spent in each part, measured inside the executor; `sampling` is set by the scheduler.

    `moe` holds what follows of the threads: cpu_experts, lookup, join and wait. The device computes and copies beside
    them, so that device_experts and copy are part of no other time.
    """

    attention: float = 0.0  # projections, norms, rope and attention itself
    moe: float = 0.0  # router, experts and dense feed-forward
    head: float = 0.0  # final norm and output head
    other: float = 0.0  # the rest: embedding, rope tables, waking the threads
    sampling: float = 0.0
    total: float = 0.0
    cpu_experts: float = 0.0  # experts that the threads computed
    device_experts: float = 0.0  # experts that the device computed
    copy: float = 0.0  # copies to the device
    lookup: float = 0.0  # asking the cache, and for copies
    join: float = 0.0  # adding up what threads and device made
    wait: float = 0.0  # for the device, and for processors that a simulated one takes


@dataclass(frozen=True)
class StepResult:
    """logits: float32 [len(batch.logit_rows), vocab], in the order of `logit_rows`; valid until the next step.

    cache: None without one, or int64 [MoE layers, 5]: calls, hits, loading, misses, evictions.
    """

    logits: npt.NDArray[np.float32]
    times: StepTimes
    cache: npt.NDArray[np.int64] | None = None
