"""How well a model foretells a text: windows over its tokens, and what their log probabilities sum up to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isfinite, log
from numbers import Integral
from typing import Any

from hybrid.core import TokenLogprob
from hybrid.errors import KernelError, RequestError

WINDOW = 2048  # tokens, unless a sequence must be shorter


@dataclass(frozen=True)
class Perplexity:
    """nats: of the tokens that were scored, which are all but the first. bytes: of their text, if there is one."""

    tokens: int
    windows: int
    window: int
    stride: int
    nats: float
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """e to the mean; infinity where a float cannot hold it."""
        mean = self.nats / self.tokens
        return exp(mean) if mean < 709 else float("inf")

    @property
    def bits_per_token(self) -> float:
        return self.nats / self.tokens / log(2)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / self.bytes / log(2) if self.bytes else None


@dataclass(frozen=True)
class Window:
    """Tokens [first, last) of a text, of which those from `scored` on are scored."""

    first: int
    scored: int
    last: int


class Windows(Sequence[Window]):
    """Windows of at most `window` tokens, each `stride` further than the one before. A token is scored once, in the
    first window that holds it, behind at least `window - stride` others if there are so many.
    """

    def __init__(self, tokens: int, window: Any, stride: Any, longest: int) -> None:
        """window, stride: None: the longest that a sequence may be, up to `WINDOW`; half a window. Raises
        RequestError.
        """
        if tokens < 2:
            raise RequestError(f"the text has {tokens} tokens, and the first is not foretold; give at least 2")
        self.window = _checked("window", min(longest, WINDOW) if window is None else window, 2, longest)
        self.stride = _checked("stride", self.window // 2 if stride is None else stride, 1, self.window - 1)
        ends = [min(self.window, tokens)]
        while ends[-1] < tokens:
            ends.append(min(ends[-1] + self.stride, tokens))
        firsts = [self.stride * index for index in range(len(ends))]
        self._windows = [Window(0, 1, ends[0])]
        self._windows += [Window(first, *ends_) for first, ends_ in zip(firsts[1:], pairwise(ends), strict=True)]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: Any) -> Any:
        return self._windows[index]

    def __iter__(self) -> Iterator[Window]:
        return iter(self._windows)


def nats_of(window: Window, logprobs: Sequence[TokenLogprob | None]) -> float:
    """What the scored tokens of a window cost. KernelError where the model computed what is no number."""
    nats = -sum(one.logprob for one in logprobs[window.scored - window.first :] if one)
    if not isfinite(nats):
        raise KernelError(
            f"the model computed {nats} as the log probability of tokens {window.scored} to {window.last - 1}: "
            "its weights are damaged or its numbers overflow; load it with check=True (--check)"
        )
    return nats


def scored_bytes(text: str, first: str) -> int:
    """Bytes of a text behind its first token. first: what that decodes to."""
    return max(len(text.encode()) - len(first.encode()), 1)


def _checked(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise RequestError(f"{name} is {value!r:.80}; it must be a whole number from {least} to {most}")
    return int(value)
