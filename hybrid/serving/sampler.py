"""How a token is chosen from logits: penalties, temperature, filters, one draw."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.core import SamplingParams, TokenLogprob
from hybrid.errors import KernelError, RequestError
from hybrid.text.grammar import TokenMask

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_BLOCK = 512
_NO_TOKENS = np.empty(0, np.int32)


class Sampler:
    """Chooses the tokens of one request.

    Its random numbers are its own: the same seed gives the same tokens in whatever batch the request runs.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: npt.NDArray[np.integer[Any]],
        vocab: int,
        ends: Collection[int] = (),
        sample: int = 0,
        mask: TokenMask | None = None,
    ) -> None:
        """prompt: the token ids that the repetition penalty counts from the beginning. ends: those that end the text,
        which may not come before `min_tokens`. sample: which of `n` completions it is; each draws for itself.
        mask: of a grammar, which is told what comes.
        """
        self._params = params
        self._random = np.random.Generator(np.random.PCG64(_seed(params.seed, sample)))
        self._penalties: _Penalties | None = None
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            self._penalties = _Penalties(params, prompt, vocab)
        self._biased = _ids(params.logit_bias, vocab, "logit_bias")
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._ends = np.array(sorted(end for end in ends if end < vocab), np.intp) if params.min_tokens else np.empty(0)
        self._made = 0
        self._mask = mask

    def choose(self, logits: Floats, tokens: npt.NDArray[np.int32] = _NO_TOKENS) -> tuple[int, TokenLogprob | None]:
        """The next token from logits [vocab], which stay as they are. KernelError on NaN or infinity.

        tokens: all before it, for `logits_processor`.
        """
        _require_finite(logits)
        scores = self._change(logits, tokens)
        best = int(scores.argmax())
        if scores[best] == -np.inf:
            raise RequestError(
                "no token may come: "
                + ("the grammar allows none that logit_bias, min_tokens and logits_processor allow" if self._mask else
                   "min_tokens leaves none, for every one of them ends the text")
            )  # fmt: skip
        token = best if self._params.temperature == 0 else self._draw(scores, best)
        if self._penalties:
            self._penalties.count(token)
        self._made += 1
        if self._mask:
            self._mask.take(token)
        top = self._params.logprobs
        return token, None if top is None else token_logprob(logits, token, top)

    def _change(self, logits: Floats, tokens: npt.NDArray[np.int32]) -> Floats:
        """The logits after everything that changes single ones."""
        scores = logits
        if self._params.logits_processor:
            scores = _processed(self._params.logits_processor, tokens, logits)
        if self._penalties:
            scores = self._penalties.apply(scores)
        if len(self._biased):
            scores = scores.copy() if scores is logits else scores
            scores[self._biased] = _within_float32(scores[self._biased] + self._bias)
        if self._made < self._params.min_tokens and len(self._ends):
            scores = scores.copy() if scores is logits else scores
            scores[self._ends] = -np.inf
        return np.where(self._mask.allowed(), scores, np.float32(-np.inf)) if self._mask else scores

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


def token_logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """The log probability of the chosen token and of the `top` most likely, best first, ties by id."""
    peak = logits.max()
    normaliser = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    best = _by_weight(logits, _top_k(logits, top))[:top] if top else ()
    return TokenLogprob(
        token, float(logits[token]) - normaliser, tuple((int(i), float(logits[i]) - normaliser) for i in best)
    )


def _require_finite(logits: Floats) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        if isfinite(logits.sum()):  # one pass that finds NaN and both infinities
            return
    finite = np.isfinite(logits)
    if not finite.all():
        token = int(finite.argmin())
        raise KernelError(
            f"the model computed {logits[token]} as the logit of token {token}: its weights are damaged "
            "or its numbers overflow; load it with check=True (--check)"
        )


def _processed(processor: Callable[..., Any], tokens: npt.NDArray[np.int32], logits: Floats) -> Floats:
    """What a processor makes of a copy of the logits. Raises RequestError for what are no logits."""
    scores = logits.copy()
    result = processor(tokens.copy(), scores)
    try:
        made = scores if result is None else np.array(result, np.float32)
    except (TypeError, ValueError):
        made = np.empty(0, np.float32)
    if made.shape != logits.shape or not isfinite(made.max()):  # the maximum is NaN if there is one
        raise RequestError(
            f"logits_processor made {result if result is not None else made!r:.60}; it must change or return "
            f"{len(logits)} logits that are numbers below infinity, one of them above -infinity"
        )
    return made


def _within_float32(scores: Floats) -> Floats:
    """What became infinite is the greatest number there is; -infinity stays: such a token cannot come."""
    return np.minimum(scores, np.finfo(np.float32).max)


def _seed(seed: int | None, sample: int) -> int | np.random.SeedSequence | None:
    return np.random.SeedSequence(seed, spawn_key=(sample,)) if sample and seed is not None else seed


def _ids(ids: Collection[int], vocab: int, name: str) -> Ids:
    wrong = [token for token in ids if token >= vocab]
    if wrong:
        raise RequestError(f"{name} has token {wrong[0]}, which this model lacks; allowed: 0 to {vocab - 1}")
    return np.array(list(ids), np.intp)


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
        with np.errstate(over="ignore", invalid="ignore"):
            seen = _within_float32(np.where(seen < 0, seen * factor, seen / factor))
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
