"""How a token is chosen from logits: penalties, temperature, filters, one draw."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.core import SamplingParams, TokenLogprob
from hybrid.errors import KernelError, RequestError
from hybrid.settings import Setting, settings_of

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_BLOCK = 512


def check_params(params: SamplingParams) -> None:
    """Raise RequestError naming the first field that is out of range, its value and the range."""
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
    for setting in settings_of(SamplingParams):
        value = setting.of(params)
        if value is not None or not setting.optional:
            _CHECKS[setting.kind](setting, value)


class Sampler:
    """Chooses the tokens of one request.

    Its random numbers are its own: the same seed gives the same tokens in whatever batch the request runs.
    """

    def __init__(self, params: SamplingParams, prompt: npt.NDArray[np.integer[Any]], vocab: int) -> None:
        """prompt: the token ids that the repetition penalty counts from the beginning."""
        self._params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._penalties: _Penalties | None = None
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            self._penalties = _Penalties(params, prompt, vocab)

    def choose(self, logits: Floats) -> tuple[int, TokenLogprob | None]:
        """The next token from logits [vocab], which stay as they are. KernelError on NaN or infinity."""
        if not isfinite(logits.sum()):  # one pass that finds NaN and both infinities
            raise _damaged(logits)
        scores = self._penalties.apply(logits) if self._penalties else logits
        best = int(scores.argmax())
        token = best if self._params.temperature == 0 else self._draw(scores, best)
        if self._penalties:
            self._penalties.count(token)
        top = self._params.logprobs
        return token, None if top is None else token_logprob(logits, token, top)

    def _draw(self, scores: Floats, best: int) -> int:
        params = self._params
        # The smallest normal float32 stands for every smaller temperature, which would divide 0 by 0.
        temperature = max(np.float32(params.temperature), np.finfo(np.float32).tiny)
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp((scores - scores[best]) / temperature)
        kept: Ids | None = None  # None: the whole vocabulary
        if 0 < params.top_k < len(weights):
            kept = _top_k(weights, params.top_k)
        if params.top_p < 1:
            kept = _top_p(weights, kept, params.top_p)
        if params.min_p > 0:
            kept = _min_p(weights, kept, params.min_p)
        uniform = self._random.random()
        if kept is None:
            return _inverse_cdf(weights, uniform)
        return int(kept[_inverse_cdf(weights[kept], uniform)])


def _damaged(logits: Floats) -> KernelError:
    """An error that names the first logit that is NaN or infinite."""
    token = int(np.isfinite(logits).argmin())
    return KernelError(
        f"the model computed {logits[token]} as the logit of token {token}: its weights are damaged "
        "or its numbers overflow; load it with --check"
    )


def token_logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """The log probability of the chosen token and of the `top` most likely, best first, ties by id."""
    peak = logits.max()
    normaliser = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    best = _by_weight(logits, _top_k(logits, top))[:top] if top else ()
    return TokenLogprob(
        token, float(logits[token]) - normaliser, tuple((int(i), float(logits[i]) - normaliser) for i in best)
    )


class _Penalties:
    """Which tokens a request has seen and how often it has produced each, and what that costs them."""

    def __init__(self, params: SamplingParams, prompt: npt.NDArray[np.integer[Any]], vocab: int) -> None:
        self._params = params
        self._seen = np.zeros(vocab, dtype=bool)
        self._seen[prompt] = True
        self._counts = np.zeros(vocab, dtype=np.int32)

    def count(self, token: int) -> None:
        self._seen[token] = True
        self._counts[token] += 1

    def apply(self, logits: Floats) -> Floats:
        """Penalised logits, a new array."""
        params, scores = self._params, logits.copy()
        ids = np.flatnonzero(self._seen)
        seen = scores[ids]
        factor = np.float32(params.repetition_penalty)
        seen = np.where(seen < 0, seen * factor, seen / factor)
        counts = self._counts[ids]
        seen -= np.float32(params.presence_penalty) * (counts > 0)
        seen -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        scores[ids] = seen
        return scores


def _top_k(weights: Floats, k: int) -> Ids:
    """Ids of the k largest, and of all that equal the smallest of them."""
    if k >= len(weights):
        return np.arange(len(weights))
    return np.flatnonzero(weights >= np.partition(weights, -k)[-k])


def _top_p(weights: Floats, kept: Ids | None, top_p: float) -> Ids:
    """Ids of the fewest most likely tokens that together reach `top_p`, of those `kept`; of equals the first."""
    pool = weights if kept is None else weights[kept]
    mass = top_p * float(pool.sum(dtype=np.float64))
    k = 64  # a guess that grows: sorting a whole vocabulary takes longer than the rest of the choice
    while k < len(pool) and pool[_top_k(pool, k)].sum(dtype=np.float64) < mass:
        k *= 4
    best = np.sort(pool[_top_k(pool, k)])[::-1]
    count = int(np.searchsorted(np.cumsum(best, dtype=np.float64) - best, mass))
    last = best[count - 1]
    above, equal = np.flatnonzero(pool > last), np.flatnonzero(pool == last)
    ids = np.concatenate([above, equal[: count - len(above)]])
    return ids if kept is None else kept[ids]


def _min_p(weights: Floats, kept: Ids | None, min_p: float) -> Ids:
    """Ids, of those `kept`, whose probability is at least `min_p` times the greatest; its weight is 1."""
    if kept is None:
        return np.flatnonzero(weights >= np.float32(min_p))
    return kept[weights[kept] >= np.float32(min_p)]


def _by_weight(weights: Floats, ids: Ids) -> Ids:
    return ids[np.argsort(-weights[ids], kind="stable")]


def _inverse_cdf(weights: Floats, uniform: float) -> int:
    """The index that `uniform` in [0, 1) draws with the given weights: first its block, then its place."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    blocks = np.cumsum([*sums, weights[whole:].sum(dtype=np.float64)])
    target = min(uniform * blocks[-1], np.nextafter(blocks[-1], 0))  # rounding must not reach the end
    block = int(np.searchsorted(blocks, target, side="right"))
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    if block:
        target -= blocks[block - 1]
    return start + int(np.searchsorted(inside, min(target, np.nextafter(inside[-1], 0)), side="right"))


def _whole(setting: Setting, value: Any) -> None:
    least = int(setting.minimum or 0)
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise RequestError(f"{setting.field} is {value!r}; it must be a whole number of at least {least}")


def _real(setting: Setting, value: Any) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not setting.within(value):
        least = f"{'above' if setting.above else 'at least'} {setting.minimum:g}"
        raise RequestError(f"{setting.field} is {value!r}; it must be a number {least} and at most {setting.maximum:g}")


def _truth(setting: Setting, value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{setting.field} is {value!r}; it must be True or False")


def _texts(setting: Setting, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or not all(isinstance(text, str) and text for text in value):
        raise RequestError(f"{setting.field} is {value!r:.80}; it must be a tuple of strings that are not empty")


_CHECKS: dict[type, Callable[[Setting, Any], None]] = {int: _whole, float: _real, bool: _truth, tuple: _texts}
