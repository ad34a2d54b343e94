"""What a caller gives, turned into requests or refused before any of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np

from hybrid.core import SamplingParams
from hybrid.errors import RequestError
from hybrid.serving.guesses import Tokens
from hybrid.serving.params import check_params
from hybrid.serving.perplexity import Windows, scored_bytes
from hybrid.serving.request import Limits, LogitsScore, LogprobScore, Request
from hybrid.text.answer import AnswerStream
from hybrid.text.answer_format import AnswerFormat, choose_format
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.detokenizer import TextStream
from hybrid.text.grammar import GrammarCompiler, TokenMask
from hybrid.text.grammar_check import part_of
from hybrid.text.grammar_frame import Frame, answer_frame, demands_call, offered_tools
from hybrid.text.messages import ChatInput, Message
from hybrid.text.openings import Openings, choose_openings
from hybrid.text.roles import Roles, odd_roles
from hybrid.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams | None] | None
DEFAULT_TOKENS = 128  # that a prompt is continued by


class Intake:
    """Makes the requests of one model; on any thread. What it refuses is a RequestError.

    answers: how answers in a chat are written; None: as the template and the tokenizer say.
    """

    def __init__(
        self,
        limits: Limits,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        template: ChatTemplate | None,
        answers: AnswerFormat | None = None,
    ) -> None:
        self._limits, self._tokenizer, self._eos_ids, self._template = limits, tokenizer, eos_ids, template
        if answers is None and template and tokenizer:
            answers = choose_format(template.sources, tokenizer.added)
        self.answers = answers or AnswerFormat()
        self._openings = Openings()
        if template and tokenizer:
            tokens = (tokenizer.specials, tokenizer.added)
            self._openings = choose_openings(template.sources, *tokens, self.answers.dialect)
        self._compiler = GrammarCompiler(tokenizer, limits.vocab, eos_ids) if tokenizer else None

    def requests(self, prompts: Prompt | Sequence[Prompt], params: Params) -> list[Request]:
        """`n` for each prompt, or none at all. params: for all prompts, or as many as there are prompts."""
        listed = _prompt_list(prompts)
        each = _params_list(params, len(listed))
        return [
            request
            for index, (prompt, one) in enumerate(zip(listed, each, strict=True))
            for request in self._samples(prompt, one, index)
        ]

    def request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        """For a stream, which has one completion."""
        first, *others = self._samples(prompt, params, 0)
        if others:
            raise RequestError(f"n is {1 + len(others)}, and a stream has one completion; use generate, or n=1")
        return first

    def _samples(self, prompt: Prompt, params: SamplingParams | None, index: int) -> list[Request]:
        tokens = self.encode(prompt) if isinstance(prompt, str) else _token_array(prompt)
        if not len(tokens) and self._tokenizer and self._tokenizer.bos_id is not None:
            tokens = _token_array([self._tokenizer.bos_id])
        params = self._checked(params, tokens)
        masks, requests = self._masks(params), []
        for sample in range(params.n):
            answer = None
            if self._tokenizer:
                text = TextStream(self._tokenizer, params.stop, tokens.tolist(), isinstance(prompt, str))
                answer = AnswerStream(text)
            requests.append(Request(tokens, params, self._eos_ids, answer, index, sample=sample, mask=masks[sample]))
            requests[-1].completion.prompt = prompt if isinstance(prompt, str) else None
        return requests

    def chat_requests(self, chat: ChatInput, params: SamplingParams | None, keep: bool = False) -> list[Request]:
        """One for each conversation, or none at all; `messages` may be a list of conversations."""
        conversations: Sequence[Any] = chat.messages if is_many(chat) else [chat.messages]
        chats = [replace(chat, messages=messages) for messages in conversations]
        return [self.chat_request(each, params, index, keep) for index, each in enumerate(chats)]

    def chat_request(
        self, chat: ChatInput, params: SamplingParams | None, index: int = 0, keep: bool = False
    ) -> Request:
        """A request for the assistant's answer, whose parts are told apart. Its text begins with its own first token:
        a space that only joins it to the prompt is no part of it. It ends at the tokenizer's end of a text as well.
        """
        if check_params(params or SamplingParams()).n != 1:
            raise RequestError(
                f"n is {params and params.n}, and a chat has one answer; give n=1, or generate(encode_chat(...))"
            )
        return self.chat_samples(chat, params, index, keep)[0]

    def chat_samples(
        self, chat: ChatInput, params: SamplingParams | None, index: int = 0, keep: bool = False
    ) -> list[Request]:
        """`n` such requests for one conversation."""
        tokenizer, prompt = self._rendered(chat)
        tokens = _token_array(tokenizer.encode(prompt, special_tokens=False))
        params = self._checked(params, tokens, self._limits.tokens)
        frame = answer_frame(self.answers, chat, prompt, params.grammar, tokenizer.added)
        masks = self._masks(params, frame)
        shown, requests = self.answers.shown(tokenizer.specials), []
        bound = params.grammar is not None or demands_call(chat)
        answers = replace(self.answers, dialect=None) if chat.tool_choice == "none" else self.answers
        for sample in range(params.n):
            text = TextStream(tokenizer, params.stop, shown=shown)
            answer = AnswerStream(text, answers.parser(offered_tools(chat), prompt, bound))
            ends = self._eos_ids | tokenizer.eos_ids
            openings = self._openings
            requests.append(Request(tokens, params, ends, answer, index, keep, sample, masks[sample], openings))
            requests[-1].completion.prompt = prompt
        return requests

    def _masks(self, params: SamplingParams, frame: Frame | None = None) -> Sequence[TokenMask | None]:
        """One for each of `n` texts; frame: what is around the grammar of an answer in a chat."""
        if frame is None and params.grammar is None:
            return [None] * params.n
        if self._compiler is None:
            raise RequestError("this model has no tokenizer, so no grammar can be kept to; remove it")
        if frame is not None:
            return self._compiler.masks(frame.parts, str(frame), params.n)
        assert params.grammar is not None
        return self._compiler.masks([part_of(params.grammar)], None, params.n)

    def logits_score(self, token_ids: Sequence[int]) -> LogitsScore:
        """Nothing is to be computed for one without tokens."""
        return LogitsScore(self._scored(token_ids), self._limits.vocab)

    def logprob_score(self, prompt: Prompt, top: Any = 0) -> LogprobScore:
        """Nothing is to be computed for one without tokens."""
        if isinstance(top, bool) or not isinstance(top, Integral) or int(top) < 0:
            raise RequestError(f"top is {top!r:.80}; it must be a whole number of at least 0")
        return LogprobScore(self._scored(self.encode(prompt) if isinstance(prompt, str) else prompt), int(top))

    def windows(self, prompt: Prompt, window: int | None, stride: int | None) -> tuple[Tokens, Windows, int | None]:
        """The tokens of a text, the windows that score them, and the bytes of what they score if they are a text."""
        tokens = self.encode(prompt) if isinstance(prompt, str) else _token_array(prompt)
        self._limits.check_ids(tokens)
        windows = Windows(len(tokens), window, stride, self._limits.tokens)
        size = scored_bytes(prompt, self.decode(tokens[:1].tolist())) if isinstance(prompt, str) else None
        return tokens, windows, size

    def _scored(self, token_ids: Any) -> Tokens:
        tokens = _token_array(token_ids)
        if len(tokens):
            self._limits.check(tokens)
        return tokens

    def fitted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages of whoever does not know this model, so that its chat template reads all of them."""
        return self._roles.fit(messages) if self._roles is not None and odd_roles(messages) else messages

    @cached_property
    def _roles(self) -> Roles | None:
        return None if self._template is None else Roles.of(self._template)

    def reads(self, variable: str) -> bool:
        """Whether the chat template of the model has such a variable."""
        return self._template is not None and self._template.reads(variable)

    def chat_prompt(self, chat: ChatInput) -> str:
        """Messages as the text of a prompt."""
        return self._rendered(chat)[1]

    def encode_chat(self, chat: ChatInput) -> list[int]:
        """Messages as the token ids of a prompt, by the model's chat template."""
        tokenizer, prompt = self._rendered(chat)
        return tokenizer.encode(prompt, special_tokens=False)

    def _rendered(self, chat: ChatInput) -> tuple[Tokenizer, str]:
        if self._template is None or self._tokenizer is None:
            raise RequestError("this model has no chat template; give a prompt (without --chat) instead of messages")
        messages = self.answers.sent_back(chat.messages)
        return self._tokenizer, self._template.render(messages, chat.tools, chat.documents, chat.template_kwargs)

    def _checked(
        self, params: SamplingParams | None, tokens: Tokens, max_tokens: int = DEFAULT_TOKENS
    ) -> SamplingParams:
        """Those that a request goes by. max_tokens: what no number means."""
        params = check_params(SamplingParams() if params is None else params)
        if params.max_tokens is None:
            params = replace(params, max_tokens=max_tokens)
        self._limits.check(tokens)
        if params.stop and self._tokenizer is None:
            raise RequestError("this model has no tokenizer, so stop strings cannot be found; remove them")
        return params

    def encode(self, text: str, special_tokens: bool = True) -> Tokens:
        """A text as the token ids of a prompt."""
        if not isinstance(text, str):
            raise RequestError(f"{text!r:.80} is no text; give one")
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer: add its tokenizer.json, or give a list of token ids")
        return _token_array(self._tokenizer.encode(text, special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        tokens = _token_array(token_ids)
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer: add its tokenizer.json")
        if len(tokens):
            self._limits.check_ids(tokens)
        return self._tokenizer.decode(tokens.tolist())


def check_callback(name: str, callback: Any) -> None:
    """Raise RequestError if it can be called neither now nor never."""
    if callback is not None and not callable(callback):
        raise RequestError(f"{name} is {callback!r:.80}; it must be a function, or None")


def is_many(chat: ChatInput) -> bool:
    """Whether its messages are a list of conversations."""
    messages = chat.messages
    return isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], (list, tuple))


def _prompt_list(prompts: Any) -> list[Any]:
    """One text or one list of token ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) and not (isinstance(prompts, np.ndarray) and prompts.ndim):
        raise RequestError(f"prompts must be a text, a list of token ids or a list of these, not {prompts!r:.80}")
    return [prompts] if len(prompts) and isinstance(prompts[0], Integral) else list(prompts)


def _params_list(params: Any, prompts: int) -> list[SamplingParams | None]:
    """One for each prompt."""
    if not isinstance(params, (list, tuple)):
        return [params] * prompts
    if len(params) != prompts:
        raise RequestError(f"params has {len(params)} for {prompts} prompts; give one for all, or one for each")
    return list(params)


def _token_array(token_ids: Any) -> Tokens:
    try:
        values = np.asarray(token_ids if len(token_ids) else np.empty(0, np.int32))
    except (TypeError, ValueError):  # no sequence, or lists of several lengths
        values = np.empty((0, 0))
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise RequestError(f"a prompt must be a text or a list of whole numbers, not {token_ids!r:.80}")
    wrong = values[(values < 0) | (values >= 2**31)]
    if len(wrong):
        raise RequestError(f"{wrong[0]} is not a token id; ids begin at 0 and are smaller than the vocabulary")
    return values.astype(np.int32)
