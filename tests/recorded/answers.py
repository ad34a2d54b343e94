"""What a model answers: checksums of its logits, its greedy tokens, and what its expert cache counted."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from configs import CONFIGS
from recorded.models import FORMATS, Workshop, prompts_of
from recorded.names import cache_counts, watch_steps

from hybrid import LLM, CacheConfig, SamplingParams

LENGTH = 8  # tokens of an answer
MARGIN = 0.05  # of log-probability: nearer than this, another rounding may choose another token
SIZES = {"threads": 1, "max_batch": 3, "chunk_size": 32, "batch_invariant": True, "max_itl_ms": 0.0, "speculate": False}


def open_model(workshop: Workshop, name: str, format: str = "auto", **choices: Any) -> LLM:
    """Packed the first time. Nothing that the bits depend on is left to the machine; more threads would spin, and wait
    for each other on a machine that is shared.
    """
    length = 512 if len(prompts_of(name)[-1]) > 90 else 256
    if name != "deepseek_v4":  # which selects of entries
        length = min(length, CONFIGS.get(name, {}).get("index_topk", length))
    fixed = {**SIZES, "device": "cpu", "numa": "off", "max_seq_len": length}
    return LLM(
        workshop.checkpoint(name),
        weight_format=FORMATS.get(format, format),
        cache_dir=workshop.stores(name, format),
        **{**fixed, **choices},
    )


def answers(workshop: Workshop, name: str, format: str = "auto", **choices: Any) -> dict[str, Any]:
    """Two sequences that decode while a prompt comes in chunks; then the logits of the whole of the longest text.

    bits: a checksum of the logits of every step, and one of those of the text. tokens: up to the first near-tie.
    """
    prompts, seen = prompts_of(name), [0]
    with open_model(workshop, name, format, **choices) as llm:
        watch_steps(llm, lambda logits: seen.append(zlib.crc32(np.ascontiguousarray(logits).data, seen[-1])))
        completions = llm.generate(prompts, SamplingParams(max_tokens=LENGTH, ignore_eos=True, logprobs=2))
        score = llm.logits(completions[-1].prompt_token_ids + completions[-1].token_ids)
        assert np.isfinite(score).all() and score.std() > 0
        counts = _counted(llm, prompts[0]) if "cache" in choices else {}
        steps = seen[-1]
    return {"bits": f"{steps:08x} {crc(score):08x}", "tokens": tokens(completions), **counts}


def _counted(llm: LLM, prompt: list[int]) -> dict[str, str]:
    """What the cache counted in all, after a text that wanders enough to tell one policy from another."""
    llm.generate(prompt, SamplingParams(max_tokens=64, temperature=3.0, seed=1, ignore_eos=True))
    return {"counts": " ".join(map(str, cache_counts(llm)))}


def near_answers(workshop: Workshop, name: str, format: str = "auto", **choices: Any) -> dict[str, Any]:
    """Of steps whose bits are not the program's own: some logits, of three digits, in place of checksums."""
    prompts = prompts_of(name)
    with open_model(workshop, name, format, **choices) as llm:
        completions = llm.generate(prompts, SamplingParams(max_tokens=LENGTH, ignore_eos=True, logprobs=2))
        score = llm.logits(prompts[-1])
    some = score[:: len(score) // 4, ::41].reshape(-1)
    return {"logits": [float(f"{value:.3g}") for value in some[:16]], "tokens": tokens(completions)}


def tokens(completions: Sequence[Any]) -> str:
    """Greedy tokens of every answer, as long as each is clearly the likeliest: near-ties are a matter of rounding."""
    return "/".join(" ".join(map(str, _sure(completion))) for completion in completions)


def _sure(completion: Any) -> list[int]:
    found = []
    for token, chosen in zip(completion.token_ids, completion.logprobs, strict=True):
        (_, first), (_, second) = chosen.top[:2]
        if first - second < MARGIN:
            break
        found.append(token)
    return found


def crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


PARAMS = {
    "greedy": SamplingParams(max_tokens=40),
    "stop": SamplingParams(max_tokens=40, stop=(" seed", " found")),
    "warm": SamplingParams(max_tokens=24, temperature=0.8, seed=7),
    "filters": SamplingParams(max_tokens=24, temperature=1.2, top_k=40, top_p=0.9, min_p=0.02, seed=3),
    "penalties": SamplingParams(
        max_tokens=24, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.3, ignore_eos=True
    ),
}
TEXTS = ["Once upon a time, there was a little fox named", "The quick brown fox", "def add(a, b):\n    return"]


def texts(workshop: Workshop, params: str, **choices: Any) -> dict[str, Any]:
    """Texts of the embedded model."""
    with open_model(workshop, "embedded", **choices) as llm:
        completions = llm.generate(TEXTS, PARAMS[params])
        chat = llm.chat([{"role": "user", "content": "What is the capital of France?"}], PARAMS[params])
    return {"texts": [[completion.text, completion.finish_reason] for completion in [*completions, chat]]}


def cached(
    workshop: Workshop, name: str, format: str = "auto", counted: bool = True, isa: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Answers with an expert cache on a simulated device. counted: whether what it counts is repeatable."""
    nblocks, nways = (14, 4) if name == "embedded" else (2, 4)
    shape = {"nblocks": nblocks, "nways": nways, "delay": 1, "stream": "off"}
    cache = CacheConfig(**{**shape, **settings})
    found = answers(workshop, name, format, isa=isa, device="simulated", cache=cache)
    return found if counted else {part: value for part, value in found.items() if part != "counts"}
