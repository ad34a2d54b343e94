"""Grammars compiled for the tokens of a model, and which tokens may come next."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import RequestError
from hybrid.text.grammar_check import Part, reason, tried
from hybrid.text.token_texts import TokenTexts
from hybrid.text.tokenizer import Tokenizer
from hybrid.text.tokenizer_backend import backend_errors

_KEPT = 32  # compiled grammars
ANSWER = "answer"  # the name by which an outer grammar refers to the first part


class TokenMask:
    """Which tokens may come next in one text, and what has come."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocab]. Raises RequestError where the grammar has become too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        """This token has come, which was allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed any further: {reason(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles grammars for one tokenizer; any thread may call it.

    vocab: the number of logits. ends: tokens that may come where a grammar may end, besides the tokenizer's own. Tokens
    that were added to the tokenizer come where a grammar names them, and never as a part of a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Collection[int]) -> None:
        self._source, self._vocab = tokenizer, vocab
        self._ends = ends
        self._lock = Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def masks(self, parts: Sequence[Part], frame: str | None = None, count: int = 1) -> list[TokenMask]:
        """For so many texts. frame: a grammar of Lark's around the parts, which it calls @answer0 and so on; None:
        the first part is all. Raises RequestError.
        """
        if frame is not None and len(parts):
            parts = [{"name": f"{ANSWER}{place}", **part} for place, part in enumerate(tried(parts))]
        else:
            parts = tried(parts)
        grammars = parts if frame is None else [{"lark_grammar": frame}, *parts]
        text = json.dumps({"grammars": grammars})
        advice = "make the grammar simpler"
        with self._lock, backend_errors("the grammar cannot be compiled", advice, RequestError):
            matcher = self._compiled.get(text) or self._compile(text)
            self._compiled[text] = matcher
            self._compiled.move_to_end(text)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return [TokenMask(matcher.deep_copy(), self._vocab) for _ in range(count)]

    def _compile(self, text: str) -> Any:
        from llguidance import LLMatcher

        self._tokenizer = self._tokenizer or self._wrapped()
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise RequestError(reason(matcher.get_error()))
        return matcher

    def _wrapped(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = sorted(end for end in {*self._ends, *self._source.eos_ids} if end < self._vocab)
        if not ends:
            raise RequestError("this model has no token that ends a text")
        wrapper = TokenizerWrapper(_Tokens(self._source, self._vocab, ends))
        return LLTokenizer(wrapper, n_vocab=self._vocab, eos_token=ends)


class _Tokens:
    """What the compiler wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Sequence[int]) -> None:
        texts = TokenTexts(tokenizer)
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.special_token_ids = sorted({*ends, *(id for id in tokenizer.added.values() if id < vocab)})
        self.tokens = [texts.bytes_of(token) for token in range(vocab)]
        self._tokenizer = tokenizer
        self._texts = {raw: token for token, raw in reversed(list(enumerate(self.tokens))) if raw}
        self._longest = max(map(len, self._texts), default=1)

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of exactly this text: those of the tokenizer, unless it changes the text or puts a space before it."""
        raw = text.encode() if isinstance(text, str) else bytes(text)
        tokens = self._tokenizer.encode(raw.decode(errors="replace"), special_tokens=False)
        if b"".join(self.tokens[token] for token in tokens if token < len(self.tokens)) == raw:
            return tokens
        return self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(raw):
            ends = range(min(len(raw), at + self._longest), at, -1)
            end = next((end for end in ends if raw[at:end] in self._texts), None)
            if end is None:  # a byte without a token: nothing behind it can be said
                break
            tokens.append(self._texts[raw[at:end]])
            at = end
        return tokens
