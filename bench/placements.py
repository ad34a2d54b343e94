"""Where experts should be: on the CPU alone, placed once in some slots, or in the cache, by policy and admission.

    python bench/placements.py --device simulated --output results.json --timeline timeline.svg

One model and set of prompts; every round opens each way in turn, so that all meet the same minutes. Placed once are
whole layers, or the experts that other prompts called most. A simulated device takes its processors from the threads:
look at its hits and bytes, and at what the cost model makes of them, not at its speed.
With --route-trace all ways take the experts of a trace: a sequence of it for the warm-up and for each prompt, in turn,
and the sequences that follow for the other prompts; give it as many as there are.
(The file is not called hybrid.py: scripts beside it would then import it in place of the package.)
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_cache.admission import ADMISSIONS
from gpu_cache.policies import POLICIES
from hybrid import LLM, SamplingParams
from hybrid.commands.console import exit_codes, say
from hybrid.commands.plot import check_target
from hybrid.commands.timeline import LANES, Timeline, busy_seconds, timeline_figure
from hybrid.config import OVERLAPS, CacheConfig, DeviceConfig, EngineConfig
from hybrid.core import Completion
from hybrid.engine.experts.verdict import most_called
from hybrid.errors import ConfigError
from hybrid.lab.figures import styled
from hybrid.machine.meters import Meters
from hybrid.serving.recorder import Recorder

PROMPTS = (
    "Once upon a time, there was a little fox named",
    "One day, a girl found a round seed in the",
    "What is the capital of France?",
    "def add(a, b):\n",
)
PROFILE_PROMPTS = (
    "The old owl lived in a",
    "It was raining in the village when",
    "for i in range(10):\n",
    "Who are you?",
)
WARM_UP = "The quick brown fox"
TIMED = 1 + len(PROMPTS)  # sequences of a run: the first is that of the warm-up
WATCHED = range(72, 96)  # tokens of an answer, one of which is drawn: late enough that a small mirror is full


@dataclass(frozen=True)
class Way:
    """A way to place experts. cache: None for the CPU alone. static: what slots hold for good, "layers" or "hot"."""

    name: str
    cache: CacheConfig | None = None
    static: str | None = None


@dataclass
class Outcome:
    """One value a round but for what does not change: bytes, fills and calls are those of the first."""

    way: str
    slots: int = 0
    decode_tokens_per_second: list[float] = field(default_factory=list)
    prompt_tokens_per_second: list[float] = field(default_factory=list)
    joules_per_token: list[float] = field(default_factory=list)
    hit_rate: list[float] = field(default_factory=list)
    copied_bytes_per_token: list[float] = field(default_factory=list)
    modelled_expert_ms_per_token: list[float] = field(default_factory=list)
    same_tokens: bool = True  # as the CPU alone chose


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    base: EngineConfig
    cache: CacheConfig
    rounds: int
    max_tokens: int
    policies: tuple[str, ...]
    admissions: tuple[str, ...]


def ways_of(options: Options, slots: int, experts: int, layers: int) -> Iterator[Way]:
    """slots: what the cache has; the static placements get no more. experts, layers: of the model."""
    yield Way("CPU only")
    whole = min(layers, slots // experts)
    fixed = replace(options.cache, quota=0, prefetch="none")
    if whole:
        shape = replace(fixed, nblocks=whole, nways=experts, mapping="prefix")
        yield Way(f"static, {whole} whole layers", shape, "layers")
    yield Way("static, most called experts", replace(fixed, nblocks=1, nways=slots, mapping="modulo"), "hot")
    for policy in options.policies:
        for admission in options.admissions:
            yield Way(f"{policy}, {admission}", replace(options.cache, policy=policy, admission=admission))


def measure(options: Options) -> tuple[list[Outcome], dict[str, Any]]:
    """All ways, and what is to know about the run."""
    with _open(options, Way("cache", options.cache)) as llm:
        assert llm.engine.experts is not None
        shape, geometry = llm.engine.experts.plan.shape, llm.engine.experts.plan.geometry
        machine = {"model": llm.engine.plan.model_type, "isa": llm.engine.plan.isa, "threads": llm.engine.plan.threads}
    hot = _profile(options, geometry.slots, len(shape.layers) * shape.experts, shape.experts)
    ways = list(ways_of(options, geometry.slots, shape.experts, len(shape.layers)))
    outcomes = {way.name: Outcome(way.name) for way in ways}
    expected: list[list[int]] | None = None
    for round in range(options.rounds):
        for way in ways:
            say(f"round {round + 1} of {options.rounds}: {way.name}")
            with _open(options, way) as llm:
                if way.static and llm.engine.experts:
                    llm.engine.experts.preload(hot if way.static == "hot" else range(len(shape.layers) * shape.experts))
                tokens = _run(llm, options, outcomes[way.name])
            expected = expected or tokens
            outcomes[way.name].same_tokens &= tokens == expected
    machine |= {"device": options.base.device, "step_on": options.base.step_on, "cpu": platform.processor()}
    machine |= {"route_trace": str(options.base.route_trace) if options.base.route_trace else None}
    machine |= {"nblocks": geometry.nblocks, "nways": geometry.nways, "slot_bytes": shape.nbytes}
    return list(outcomes.values()), machine | {"simulated": asdict(options.base.simulated)}


@contextmanager
def _open(options: Options, way: Way) -> Iterator[LLM]:
    """The CPU alone computes attention too; other ways leave it where the configuration says."""
    config = options.base
    if way.cache is None:
        config = replace(config, device="cpu", step_on="threads")
    with LLM.from_config(replace(config, cache=way.cache or CacheConfig()), notice=say) as llm:
        yield llm


def _generate(llm: LLM, prompts: Sequence[str], count: int) -> list[Completion]:
    """One sequence after the other."""
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [llm.generate([prompt], params)[0] for prompt in prompts]


def _profile(options: Options, slots: int, keys: int, experts: int) -> list[int]:
    """The experts that prompts of their own call most."""
    asked = np.zeros(keys, np.int64)

    def count(step: int, layer: int, sequence: Any, position: Any, ids: Any, scores: Any, named: Any) -> None:
        np.add.at(asked, layer * experts + ids.reshape(-1), 1)

    config = replace(options.base, device="cpu", step_on="threads", routes=True, cache=CacheConfig())
    with LLM.from_config(config) as llm:
        assert llm.engine.routes is not None
        llm.engine.routes.reset(TIMED)  # those of a trace are other sequences too
        trace, wanted = llm.engine.routes.trace, TIMED + len(PROFILE_PROMPTS)
        if trace and trace.sequences < wanted:
            say(f"note: the trace has {trace.sequences} of {wanted} sequences: some prompts are profiled and timed")
        llm.engine.routes.observer = count
        _generate(llm, PROFILE_PROMPTS, options.max_tokens)
    return most_called(asked, np.zeros(keys, np.int64), slots)


def _run(llm: LLM, options: Options, outcome: Outcome) -> list[list[int]]:
    """Warm up, then time the prompts; returns the tokens."""
    _generate(llm, [WARM_UP], 8)
    experts = llm.engine.experts
    before = (experts.count().sum(axis=0), experts.device.times.copied_bytes) if experts else None
    recorder = Recorder(Meters(llm.engine.plan.processors))
    llm.observe(recorder)
    completions = _generate(llm, PROMPTS, options.max_tokens)
    summary = recorder.summary(0.0, llm.engine.plan.isa, llm.engine.plan.threads)
    outcome.decode_tokens_per_second.append(summary.decode_tokens_per_second or 0.0)
    outcome.prompt_tokens_per_second.append(summary.prompt_tokens_per_second or 0.0)
    tokens = sum(len(completion.token_ids) for completion in completions)
    outcome.joules_per_token += _joules(recorder, tokens)
    if experts and before:
        counts = experts.count().sum(axis=0) - before[0]
        outcome.slots = experts.plan.geometry.slots
        outcome.hit_rate.append(float(counts[1] / max(1, counts[0])))
        outcome.copied_bytes_per_token.append((experts.device.times.copied_bytes - before[1]) / tokens)
        if verdict := experts.verdict():
            outcome.modelled_expert_ms_per_token.append(verdict.cache_ms)
    return [completion.token_ids for completion in completions]


def _joules(recorder: Recorder, tokens: int) -> list[float]:
    """Of the whole run per token: one value, or none where the machine does not tell."""
    rows = recorder.power_rows()
    total = 0.0
    for _, _, seconds, *watts, _ in rows:
        known = [float(value) for value in watts if value]
        if not known:
            return []
        total += sum(known) * float(seconds)
    return [total / tokens]


def one_token(options: Options, title: str) -> tuple[Any, dict[str, float]]:
    """A picture of one step that decoded, and the share of it for which each lane was busy.

    Of the last steps it is the fastest of those in which the most kinds of work went on.
    """
    timeline, ends = Timeline(), []

    def mark(_: Any) -> None:
        ends.append(time.perf_counter())

    with _open(options, Way("cache", options.cache)) as llm:
        llm.engine.watch(timeline)
        llm.observe(mark)
        _generate(llm, PROMPTS[:1], WATCHED[-1] + 2)
    steps = [timeline.between(ends[token], ends[token + 1]) for token in WATCHED]
    seconds = [ends[token + 1] - ends[token] for token in WATCHED]
    chosen = max(range(len(steps)), key=lambda step: (len({span.what for span in steps[step]}), -seconds[step]))
    spans = steps[chosen]
    busy = {lane: busy_seconds(spans, lane) / seconds[chosen] for lane in LANES}
    return lambda: timeline_figure(spans, title), busy


def _title(config: EngineConfig) -> str:
    model = config.model_path.name if config.model_path else "the embedded model"
    if config.device == "cuda":
        return f"One token of {model} on a GPU"
    step = "; torch's CPU device in place of a GPU" if config.step_on == "torch-cpu" else ""
    return f"One token of {model}: simulated device{step}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Medians, as markdown."""
    lines = ["| way | slots | tokens/s | hits | MB copied a token | J a token | modelled ms of experts |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for one in outcomes:
        cells = [
            _median(one.decode_tokens_per_second, "{:.1f}"),
            _median(one.hit_rate, "{:.1%}"),
            _median([size / 1e6 for size in one.copied_bytes_per_token], "{:.2f}"),
            _median(one.joules_per_token, "{:.2f}"),
            _median(one.modelled_expert_ms_per_token, "{:.3f}"),
        ]
        lines.append(f"| {one.way} | {one.slots or '-'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _median(values: Sequence[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else "-"


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--device", default="simulated", help="simulated or cuda")
    parser.add_argument("--step-on", default="auto", help="torch-cpu: the device's step on torch's CPU device")
    parser.add_argument("--format", default="auto", dest="weight_format")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache-nblocks", type=int, default=16)
    parser.add_argument("--cache-nways", type=int, default=4)
    parser.add_argument("--policies", default="LRU,LFU,SIEVE", help="or all")
    parser.add_argument("--admissions", default="always,break-even", help="or all")
    parser.add_argument("--cache-delay", type=int, help="layers after which copies end, so that hits can be repeated")
    parser.add_argument("--overlap", default="none", choices=OVERLAPS)
    parser.add_argument("--gpu-kv-tokens", type=int)
    parser.add_argument("--device-memory-gb", type=float, default=DeviceConfig.memory_gb)
    parser.add_argument("--route-trace", type=Path, help="experts of every token: .csv or .parquet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, help="results as JSON")
    parser.add_argument("--timeline", type=Path, nargs="*", default=[], help="pictures of one token: .svg, .png")
    parser.add_argument("--timeline-only", action="store_true")
    found = parser.parse_args(arguments)
    base = EngineConfig(
        model_path=found.model_path,
        device=found.device,
        step_on=found.step_on,
        weight_format=found.weight_format,
        threads=found.threads,
        gpu_kv_tokens=found.gpu_kv_tokens,
        route_trace=found.route_trace,
        max_seq_len=512,
        max_batch=1,
        chunk_size=64,
        simulated=DeviceConfig(memory_gb=found.device_memory_gb),
    )
    if base.device not in ("simulated", "cuda"):
        raise ConfigError(f"--device {base.device!r} has no slots to compare; allowed: simulated, cuda")
    shape, prefetch = (found.cache_nblocks, found.cache_nways), OVERLAPS[found.overlap]
    cache = CacheConfig(*shape, prefetch=prefetch, delay=found.cache_delay)
    policies, admissions = _names(found.policies, tuple(POLICIES)), _names(found.admissions, tuple(ADMISSIONS))
    for target in found.timeline:
        check_target(target)
    return Options(base, cache, found.rounds, found.max_tokens, policies, admissions), found


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = known if text == "all" else tuple(text.split(","))
    if unknown := set(names) - set(known):
        raise ConfigError(f"{', '.join(sorted(unknown))} is unknown; allowed: all, {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_codes():
        options, found = parse(arguments)
        if options.base.step_on == "torch-cpu":
            import torch

            torch.set_num_threads(1)  # more would wait for the processors on which our threads spin
        if found.timeline:
            draw, busy = one_token(options, _title(options.base))
            for target in found.timeline:
                styled(draw, target)
            say("busy, of the step: " + ", ".join(f"{lane} {share:.0%}" for lane, share in busy.items()))
        if found.timeline_only:
            return
        outcomes, machine = measure(options)
        print(table(outcomes))
        if found.output:
            report = {"machine": machine, "results": [asdict(outcome) for outcome in outcomes]}
            found.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
