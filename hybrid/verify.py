"""`hybrid verify`: the same prompts without a cache and with one in every plight must give the same bits."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid import flags as f
from hybrid.config import CacheConfig, DeviceConfig, EngineConfig
from hybrid.console import exit_codes, progress_bar, say
from hybrid.core import SamplingParams
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrid.placement import ExpertShape

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

PROMPTS = (
    "Once upon a time, there was a little fox named",
    "What is the capital of France?",
    "def add(a, b):\n    return",
    "The quick brown fox",
)
EXIT_DIFFERENT = 1
SLOW = DeviceConfig(copy_gbps=0.05, latency_us=0.0, jitter_us=3000.0)  # copies of every length, many of them late
Thorough = Annotated[bool, typer.Option("--thorough", help="Every policy with every mapping and admission.")]


@dataclass(frozen=True)
class Scenario:
    """A plight of the cache."""

    name: str
    cache: CacheConfig
    device: DeviceConfig = DeviceConfig()


@dataclass(frozen=True)
class Outcome:
    """What came of a scenario. difference: the first one, None if there was none."""

    scenario: str
    calls: int
    hit_rate: float
    fills: int
    late_copies: int
    streamed: int
    difference: str | None


@dataclass(frozen=True)
class Answers:
    """Token ids of every prompt, and the bits of the logits of the first answer."""

    tokens: list[list[int]]
    logits: npt.NDArray[np.uint32]


@app.command()
def verify(
    model_path: f.ModelPath = EngineConfig.model_path,
    prompt: f.Prompts = list(PROMPTS),  # noqa: B006  typer reads it as the default of a flag
    max_tokens: f.MaxTokens = 24,
    weight_format: f.Format = EngineConfig.weight_format,
    kv_format: f.KvFormat = EngineConfig.kv_format,
    threads: f.Threads = EngineConfig.threads,
    max_seq_len: f.MaxSeqLen = EngineConfig.max_seq_len,
    max_batch: f.MaxBatch = EngineConfig.max_batch,
    cache_dir: f.CacheDir = EngineConfig.cache_dir,
    thorough: Thorough = False,
    json: f.Json = False,
) -> None:
    """Run prompts without a cache, then with one that is on, thrashing, starved, slow at random, and poisoned.

    Exit code 1 and the first difference if any token or logit is not the same.
    """
    with exit_codes():
        config = EngineConfig(
            model_path=model_path, weight_format=weight_format, kv_format=kv_format, threads=threads,
            max_seq_len=max_seq_len, max_batch=max_batch, cache_dir=cache_dir,
        )  # fmt: skip
        with progress_bar() as progress:
            outcomes = verify_model(config, prompt, max_tokens, thorough, lambda i, n: progress("scenarios", i, n))
        print(_to_json(outcomes) if json else _to_text(outcomes))
        different = [outcome for outcome in outcomes if outcome.difference]
        if different:
            say(f"different: {different[0].scenario}: {different[0].difference}")
            raise SystemExit(EXIT_DIFFERENT)


def verify_model(
    config: EngineConfig,
    prompts: Sequence[str],
    max_tokens: int,
    thorough: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "simulated",
) -> list[Outcome]:
    """The outcome of every scenario on a model. config: of a run without a cache. Raises HybridError.

    device: one that computes experts with the bits of the CPU, as a GPU does not.
    """
    scenarios = list(make_scenarios(_shape(config), thorough))
    expected, _ = _answers(config, prompts, max_tokens)
    outcomes = []
    for done, scenario in enumerate(scenarios):
        outcomes.append(try_scenario(config, scenario, expected, prompts, max_tokens, device))
        progress(done + 1, len(scenarios))
    return outcomes


def try_scenario(
    config: EngineConfig,
    scenario: Scenario,
    expected: Answers,
    prompts: Sequence[str],
    max_tokens: int,
    device: str = "simulated",
) -> Outcome:
    """Run the prompts in a scenario and compare."""
    cached = replace(config, device=device, cache=scenario.cache, simulated=scenario.device)
    found, report = _answers(cached, prompts, max_tokens)
    return Outcome(
        scenario.name, report["calls"], report["hit_rate"], report["fills"], report["late_copies"],
        report["streamed"], first_difference(expected, found),
    )  # fmt: skip


def make_scenarios(shape: ExpertShape, thorough: bool = False) -> Iterator[Scenario]:
    """Every plight with LRU, then every policy, mapping and admission: each once, or `thorough`ly all together."""
    from gpu_cache.admission import ADMISSIONS
    from gpu_cache.geometry import MAPPINGS
    from gpu_cache.policies import POLICIES

    layers = len(shape.layers)
    nways = min(shape.experts, max(shape.top_k, shape.experts // 4))
    on = CacheConfig(layers, nways, stream="off", poison=True)
    yield Scenario("on", on)
    yield Scenario("thrashing", replace(on, nblocks=1, nways=shape.top_k, delay=0))
    yield Scenario("starved", replace(on, quota=0))
    yield Scenario("quota 1", replace(on, quota=1, delay=0))
    yield Scenario("random delays", replace(on, nways=max(1, nways // 2)), SLOW)
    yield Scenario("streamed", replace(on, stream="on", delay=1))
    yield Scenario("streamed, random delays", replace(on, stream="on", quota=2), SLOW)
    for delay in (0, 1, 3, 2 * layers + 1):
        yield Scenario(f"delay {delay}", replace(on, delay=delay))
    yield Scenario("next-gate", replace(on, prefetch="next-gate", delay=0))
    few = replace(on, nways=max(1, nways // 2), delay=1)
    ways = product(POLICIES, MAPPINGS, ADMISSIONS)
    for policy, mapping, admission in ways if thorough else _each_once(POLICIES, MAPPINGS, ADMISSIONS):
        chosen = replace(few, policy=policy, mapping=mapping, admission=admission)
        yield Scenario(f"{policy} {mapping} {admission}", chosen)


def _each_once(*names: Any) -> Iterator[tuple[str, ...]]:
    """Tuples in which every name appears: as many as the longest list has."""
    lists = [list(part) for part in names]
    for i in range(max(map(len, lists))):
        yield tuple(part[i % len(part)] for part in lists)


def first_difference(expected: Answers, found: Answers) -> str | None:
    """In words, or None."""
    for prompt, (right, wrong) in enumerate(zip(expected.tokens, found.tokens, strict=True)):
        for i, pair in enumerate(zip(right, wrong, strict=False)):
            if pair[0] != pair[1]:
                return f"prompt {prompt}, token {i}: {pair[1]} instead of {pair[0]}"
        if len(right) != len(wrong):
            return f"prompt {prompt}: {len(wrong)} tokens instead of {len(right)}"
    different = (expected.logits != found.logits).any(axis=1)
    if different.any():
        return f"the logits of token {int(different.argmax())} of the first answer have other bits"
    return None


def _answers(config: EngineConfig, prompts: Sequence[str], max_tokens: int) -> tuple[Answers, dict[str, Any]]:
    """The answers, and what the cache did."""
    import numpy as np

    from hybrid.llm import LLM

    with LLM.from_config(config) as llm:
        completions = llm.generate(list(prompts), SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        tokens = [completion.token_ids for completion in completions]
        logits = llm.logits([*completions[0].prompt_token_ids, *tokens[0]])
        report: dict[str, Any] = {}
        if llm.engine.experts:
            from hybrid.cache_report import report as make_report

            llm.engine.experts.table.check_integrity()
            report = make_report(llm.engine.experts).to_dict()
        return Answers(tokens, logits.view(np.uint32).copy()), report


def _shape(config: EngineConfig) -> ExpertShape:
    """Of the experts of the model; raises ConfigError for one that has none."""
    from hybrid.engine import plan_model

    plan = plan_model(replace(config, device="simulated"))
    if plan.cache is None:
        raise ConfigError("this model has no experts to cache")
    return plan.cache.shape


def _to_text(outcomes: Sequence[Outcome]) -> str:
    width = max(len(outcome.scenario) for outcome in outcomes)
    lines = [f"{'scenario':<{width}}  {'calls':>7}  hits   copies  late  streamed  result"]
    for o in outcomes:
        result = "different" if o.difference else "same"
        counts = f"{o.calls:>7}  {o.hit_rate:>4.0%}  {o.fills:>7}  {o.late_copies:>4}  {o.streamed:>8}"
        lines.append(f"{o.scenario:<{width}}  {counts}  {result}")
    same = sum(not outcome.difference for outcome in outcomes)
    return "\n".join([*lines, f"{same} of {len(outcomes)} scenarios give the same tokens and logits as no cache"])


def _to_json(outcomes: Sequence[Outcome]) -> str:
    return json_text.dumps({"results": [asdict(outcome) for outcome in outcomes]})


if __name__ == "__main__":
    from hybrid.console import run_app

    run_app(app, "python -m hybrid.verify")
