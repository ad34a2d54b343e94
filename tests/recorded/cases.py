"""The cases of the record: a key, and what is computed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from recorded.answers import PARAMS, answers, cached, near_answers, open_model, texts
from recorded.errors import error_cases
from recorded.models import EMBEDDED, FAMILIES, FORMATS, VARIANTS, WITH_EXPERTS, Workshop, store_record
from recorded.names import ON_HOST
from recorded.outputs import output_cases, trace_case, warm_case

from hybrid import CacheConfig

KV_FORMATS = ("int8", "fp8")  # besides bf16
CACHES: dict[str, dict[str, Any]] = {
    **{
        policy: {"policy": policy, "seed": 5}
        for policy in ("LRU", "FIFO", "LFU", "LFRU", "SIEVE", "S3-FIFO", "MRS", "least-stale", "random")
    },
    "prefix": {"mapping": "prefix"},
    "hash": {"mapping": "hash"},
    "second-touch": {"admission": "second-touch"},
    "break-even": {"admission": "break-even", "counted": False},  # by costs that are measured
    "quota 0": {"quota": 0},
    "quota 1": {"quota": 1},
    "quota 3, delay 0": {"quota": 3, "delay": 0, "poison": True},
    "delay 7": {"delay": 7, "poison": True},
    "one index": {"nblocks": 1, "delay": 0, "poison": True},
    "all fit": {"nblocks": "auto", "nways": None},
    "stream on": {"stream": "on", "poison": True},
    "stream on, quota 0": {"stream": "on", "quota": 0},
    "next-gate": {"prefetch": "next-gate"},
    "next-gate, stream on": {"prefetch": "next-gate", "stream": "on", "delay": 2, "quota": 9},
    "auto": {"mode": "auto", "counted": False},  # by times that are measured
}
SOME_CACHES = ("LRU", "quota 1", "stream on", "next-gate")  # with every family
FEW_CACHES = ("LFU", "stream on")  # on every instruction set
SPLIT = {"numa": "2", "load": "copy", "threads": 2}


@dataclass(frozen=True)
class Case:
    """isa: the instruction set that it needs, None if it is the same on all."""

    key: str
    make: Callable[[Workshop], Any]
    isa: str | None = None


def all_cases(isas: list[str]) -> Iterator[Case]:
    """isas: the best one first; some cases are of that alone."""
    yield from _stores()
    for key, make in (*error_cases(), *output_cases()):
        yield Case(key, make)
    best = isas[0]
    for isa in isas:
        for key, make in _runs(isa, isa == best):
            yield Case(f"{key[0]}/{isa}/{'/'.join(key[1:])}", make, isa)
    if find_spec("torch"):
        for key, make in _on_torch(best):
            yield Case(f"torch/{best}/{key}", make, best)


def _stores() -> Iterator[Case]:
    for name in [*FAMILIES, EMBEDDED]:
        for format in FORMATS:
            yield Case(f"store/{name}/{format}", partial(_store, name=name, format=format))
    for name in VARIANTS:
        yield Case(f"store/{name}/auto", partial(_store, name=name, format="auto"))


def _store(workshop: Workshop, name: str, format: str) -> dict[str, Any]:
    with open_model(workshop, name, format, check=True):
        return store_record(workshop.stores(name, format))


Run = tuple[tuple[str, ...], Callable[[Workshop], Any]]


def _runs(isa: str, best: bool) -> Iterator[Run]:
    """What depends on the instruction set."""
    families = [*FAMILIES, EMBEDDED]
    for name in families:
        for format in FORMATS:
            yield ("run", name, format), partial(answers, name=name, format=format, isa=isa)
            if best:
                yield ("numa", name, format), partial(answers, name=name, format=format, isa=isa, **SPLIT)
    for name in VARIANTS:
        yield ("run", name, "auto"), partial(answers, name=name, isa=isa)
    for name in [*families, *(VARIANTS if best else ())]:
        for kv in KV_FORMATS:
            yield ("kv", name, kv), partial(answers, name=name, isa=isa, kv_format=kv)
    yield (
        ("kv", "qwen3_moe-long", "int4 int8"),
        partial(answers, name="qwen3_moe-long", format="int4", isa=isa, kv_format="int8"),
    )
    if not best:
        yield from ((("numa", name, "auto"), partial(answers, name=name, isa=isa, **SPLIT)) for name in families)
    yield from _ways(isa, best)
    yield from _caches(isa, best)


def _ways(isa: str, best: bool) -> Iterator[Run]:
    """Other ways to the same bits, and the texts of the embedded model."""
    ways: dict[str, dict[str, Any]] = {
        "two threads": {"threads": 2},
        "three threads": {"threads": 3},
        "copied": {"load": "copy"},
        "small chunks": {"chunk_size": 7},
        "one at a time": {"max_batch": 1},
        "varying": {"batch_invariant": False},
    }
    for way, choices in ways.items():
        for name in ("qwen2_moe", "gpt_oss") if best else ("qwen2_moe",):
            yield ("way", name, way), partial(answers, name=name, isa=isa, **choices)
    for params in PARAMS if best else ("greedy",):
        yield ("text", params), partial(texts, params=params, isa=isa)
    yield ("text", "int4 fp8"), partial(texts, params="greedy", isa=isa, format="int4", kv_format="fp8")
    yield ("text", "traced"), partial(trace_case, isa=isa)
    yield ("text", "warm cache"), partial(warm_case, isa=isa)


def _caches(isa: str, best: bool) -> Iterator[Run]:
    for name in WITH_EXPERTS:
        settings = CACHES if name in ("qwen3_moe", EMBEDDED) else SOME_CACHES
        for setting in settings if best else FEW_CACHES:
            yield ("cache", name, setting), partial(cached, name=name, isa=isa, **CACHES[setting])
    for name in ("qwen2_moe", "gpt_oss") if best else ():
        for format in FORMATS:
            yield (
                ("cache", name, f"stream on, {format}"),
                partial(cached, name=name, format=format, isa=isa, **CACHES["stream on"]),
            )


def _on_torch(isa: str) -> Iterator[tuple[str, Callable[[Workshop], Any]]]:
    """Steps of torch's CPU device, which stands for a GPU."""
    for name in [*(name for name, model in FAMILIES.items() if model.family not in ON_HOST), EMBEDDED]:
        yield f"{name}/auto", _torch(name=name, isa=isa)
    for format in FORMATS:
        yield f"qwen2_moe/{format}", _torch(name="qwen2_moe", format=format, isa=isa)
    for kv in KV_FORMATS:
        yield f"gpt_oss-long/kv {kv}", _torch(name="gpt_oss-long", isa=isa, kv_format=kv, gpu_kv_tokens=64)
    cache = CacheConfig(14, 4, delay=1, stream="off")
    yield "embedded/cached", _torch(name=EMBEDDED, isa=isa, device="simulated", cache=cache)


def _torch(**choices: Any) -> Callable[[Workshop], Any]:
    def make(workshop: Workshop) -> Any:
        with _one_torch_thread():
            return near_answers(workshop, step_on="torch-cpu", **choices)

    return make


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """More would wait for the processors on which the threads of the executor spin."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
