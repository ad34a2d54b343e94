"""The rows of a step: which tokens of which jobs it computes, as the engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid.core import Batch
from hybrid.serving.guesses import Tokens
from hybrid.serving.request import Job

Chunk = tuple[Job, int]  # the next so many pending tokens of a job


def make_batch(chunks: Sequence[Chunk]) -> Batch:
    """The rows of these jobs, one job after the other."""
    rows = [count for _, count in chunks]
    ends = np.cumsum(rows, dtype=np.int32)
    wanted = [np.arange(end - job.wanted(count), end) for (job, count), end in zip(chunks, ends.tolist(), strict=True)]
    return Batch(
        np.concatenate([job.tokens[job.computed : job.computed + count] for job, count in chunks]),
        np.repeat(_int32([job.sequence for job, _ in chunks]), rows),
        np.concatenate([np.arange(job.computed, job.computed + count, dtype=np.int32) for job, count in chunks]),
        _int32(np.concatenate(wanted)),
        np.repeat(_int32([job.length for job, _ in chunks]), rows),
    )


def is_decoding(job: Job) -> bool:
    """Whether the next row of a job is the token that it has produced last, rather than of a prompt."""
    return job.pending == 1 and job.computed >= len(job.prompt)


def _int32(values: Any) -> Tokens:
    return np.asarray(values, dtype=np.int32)
