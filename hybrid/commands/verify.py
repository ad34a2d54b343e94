"""`hybrid verify`: the same prompts without a cache and in every cache scenario must give the same results.

On a simulated device, which computes experts with the CPU's kernels, the same bits; on a GPU the same within rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from hybrid.commands.console import progress_bar, say, show
from hybrid.commands.flags import command, new_app, only
from hybrid.commands.run import RunOptions
from hybrid.config import CacheConfig, DeviceConfig, EngineConfig
from hybrid.core import SamplingParams
from hybrid.errors import ConfigError
from hybrid.settings import setting

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrid.plan.expert_cache import CachePlan
    from hybrid.plan.expert_shape import ExpertShape
    from hybrid.serving.llm import LLM

Comparison = tuple[str | None, dict[str, float]]  # the difference, if there is one; figures beside it

app = new_app()

PROMPTS = (
    "Once upon a time, there was a little fox named",
    "What is the capital of France?",
    "def add(a, b):\n    return",
    "The quick brown fox",
)
EXIT_DIFFERENT = 1
SLOW = DeviceConfig(copy_gbps=0.05, latency_us=0.0, jitter_us=3000.0)  # copies of every length, many of them late
DEVICES = ("simulated", "cuda")


@dataclass(frozen=True)
class Scenario:
    """A cache setting under test, often a hostile one."""

    name: str
    cache: CacheConfig
    device: DeviceConfig = DeviceConfig()

    @property
    def slow(self) -> bool:
        """Whether it needs slow copies. Only a simulated device can slow its copies down."""
        return self.device == SLOW


@dataclass(frozen=True)
class Outcome:
    """Result of a scenario. difference: the first one, None if there was none. more: figures of the comparison."""

    scenario: str
    calls: int
    hit_rate: float
    fills: int
    late_copies: int
    streamed: int
    difference: str | None
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """Token ids of every answer, and logits of a text: the first prompt and its answer, or a given text.

    quantised: whether the CPU rounds activations, or keys and values, to 8 bits.
    """

    tokens: list[list[int]]
    logits: npt.NDArray[np.float32]
    text: list[int] = field(default_factory=list)
    quantised: bool = False


@dataclass(frozen=True)
class VerifyOptions:
    """How much is compared, and on what."""

    COMMAND: ClassVar[str] = "verify"
    GROUP: ClassVar[str] = "output"

    device: str = setting(
        DEVICES[0],
        f"One of {', '.join(DEVICES)}; on a GPU logits are compared within rounding.",
        group="engine",
        choices=DEVICES,
    )
    thorough: bool = setting(False, "Every policy with every mapping and admission.")


@command(app)
def verify(
    config: Annotated[
        EngineConfig,
        only("model_path", "weight_format", "kv_format", "threads", "max_seq_len", "max_batch", "cache_dir"),
    ],
    params: Annotated[SamplingParams, only(max_tokens=24)],
    printed: Annotated[RunOptions, only("json", prompt=PROMPTS)],
    options: VerifyOptions,
) -> None:
    """Run prompts without a cache, then with one that is on, thrashing, starved, slow at random, and poisoned.

    Exit code 1 and the first difference if any token or logit is not the same. On a GPU logits have other bits: the
    CPU's answer is fed to both, and an error of the logits that is more than rounding makes is a difference.
    """
    config = replace(config, device="cpu", numa="off")
    with progress_bar() as progress:
        outcomes = verify_model(
            config,
            printed.prompt,
            params.max_tokens or 0,
            options.thorough,
            lambda done, total: progress("scenarios", done, total),
            options.device,
        )
    show(_to_json(outcomes) if printed.json else _to_text(outcomes))
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
    """The outcome of every scenario on a model. config: of a run without a cache. Raises HybridError."""
    if device not in COMPARISONS:
        raise ConfigError(f"--device {device!r} has no slots to compare; allowed: {', '.join(DEVICES)}")
    plan = _cache_plan(config, device)
    scenarios = [
        scenario
        for scenario in make_scenarios(plan.shape, thorough, plan.geometry.slots)
        if device == "simulated" or not scenario.slow
    ]
    expected, _ = _answers(replace(config, device="cpu"), prompts, max_tokens)
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
    found, report = _answers(cached, prompts, max_tokens, None if device == "simulated" else expected.text)
    return Outcome(
        scenario.name, report["calls"], report["hit_rate"], report["fills"], report["late_copies"],
        report["streamed"], *COMPARISONS[device](expected, found),
    )  # fmt: skip


def make_scenarios(shape: ExpertShape, thorough: bool = False, slots: int | None = None) -> Iterator[Scenario]:
    """Every scenario with LRU; then every policy, mapping and admission at least once, or with `thorough` in every
    combination. slots: how many fit the device; None: as many as the scenarios want.
    """
    from gpu_cache.admission import ADMISSIONS
    from gpu_cache.geometry import MAPPINGS
    from gpu_cache.policies import POLICIES

    layers = len(shape.layers)
    slots = slots or layers * shape.experts
    nblocks = min(layers, slots)
    nways = min(shape.experts, max(shape.top_k, shape.experts // 4), slots // nblocks)
    on = CacheConfig(nblocks, nways, stream="off", poison=True)
    yield Scenario("on", on)
    yield Scenario("thrashing", replace(on, nblocks=1, nways=min(shape.top_k, slots), delay=0))
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
    """As many tuples as the longest list has names; every name appears in at least one."""
    lists = [list(part) for part in names]
    for i in range(max(map(len, lists))):
        yield tuple(part[i % len(part)] for part in lists)


def compare_bits(expected: Answers, found: Answers) -> Comparison:
    """Compare every token and every bit of the logits."""
    return first_difference(expected, found), {}


def compare_within_tolerance(expected: Answers, found: Answers) -> Comparison:
    """Compare the logits of one text, run whole and token by token. Answers may differ where two tokens nearly tied."""
    import numpy as np

    from hybrid.commands.tolerance import measure_logit_error

    error = measure_logit_error(found.logits, np.concatenate([expected.logits] * 2), expected.quantised)
    pairs = list(zip(expected.tokens, found.tokens, strict=True))
    equal = sum(_count_equal_prefix(right, other) for right, other in pairs)
    agreeing = equal / max(1, sum(len(right) for right, _ in pairs))
    return error.problem, {
        "median_error": error.median,
        "far_tokens": error.outlier_share,
        "agreeing_tokens": agreeing,
    }


def _count_equal_prefix(right: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(right, other, strict=False)) if a != b), min(len(right), len(other)))


COMPARISONS: dict[str, Callable[[Answers, Answers], Comparison]] = {
    "simulated": compare_bits,
    "cuda": compare_within_tolerance,
}


def first_difference(expected: Answers, found: Answers) -> str | None:
    """Where the answers first differ, in words; None if they are the same."""
    import numpy as np

    for prompt, (right, wrong) in enumerate(zip(expected.tokens, found.tokens, strict=True)):
        for i, pair in enumerate(zip(right, wrong, strict=False)):
            if pair[0] != pair[1]:
                return f"prompt {prompt}, token {i}: {pair[1]} instead of {pair[0]}"
        if len(right) != len(wrong):
            return f"prompt {prompt}: {len(wrong)} tokens instead of {len(right)}"
    different = (expected.logits.view(np.uint32) != found.logits.view(np.uint32)).any(axis=1)
    if different.any():
        return f"the logits of token {int(different.argmax())} of the first answer have other bits"
    return None


def _answers(
    config: EngineConfig, prompts: Sequence[str], max_tokens: int, text: list[int] | None = None
) -> tuple[Answers, dict[str, Any]]:
    """The answers, and the report of the cache. text: compute the logits of this text, run whole and then token by
    token; None: of the first prompt and its answer, run whole.
    """
    from hybrid.serving.llm import LLM

    with LLM.from_config(config) as llm:
        completions = llm.generate(list(prompts), SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        tokens = [completion.token_ids for completion in completions]
        own = [*completions[0].prompt_token_ids, *tokens[0]]
        logits = llm.logits(own) if text is None else _both_ways(llm, text)
        report: dict[str, Any] = {}
        if llm.engine.experts:
            from hybrid.engine.experts.report import report as make_report

            llm.engine.experts.table.check_integrity()
            report = make_report(llm.engine.experts).to_dict()
        return Answers(tokens, logits, own, _quantised(llm)), report


def _both_ways(llm: LLM, text: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits at every token of a text run whole, then of the same text run token by token, because a device uses other
    kernels for few rows.
    """
    import numpy as np

    from hybrid.core import Batch

    alone = []
    for position, token in enumerate(text):
        batch = Batch(*(np.array([value], np.int32) for value in (token, 0, position, 0)))
        alone.append(llm.engine.forward(batch).logits.copy())
    llm.engine.release(0)
    return np.concatenate([llm.logits(text), *alone])


def _quantised(llm: LLM) -> bool:
    from hybrid.plan.roofline import uses_integers

    plan = llm.engine.plan
    return plan.kv.format != "bf16" or uses_integers(llm.engine.spec, plan.formats)


def _cache_plan(config: EngineConfig, device: str) -> CachePlan:
    """A plan with as many slots as fit. Raises ConfigError for a model without experts."""
    from hybrid.plan.resolve import plan_model

    plan = plan_model(replace(config, device=device))
    if plan.cache is None:
        raise ConfigError("this model has no experts to cache")
    return plan.cache


def _to_text(outcomes: Sequence[Outcome]) -> str:
    width = max(len(outcome.scenario) for outcome in outcomes)
    within_rounding = bool(outcomes[0].more)
    heads = "  error   far  agree" if within_rounding else ""
    lines = [f"{'scenario':<{width}}  {'calls':>7}  hits   copies  late  streamed{heads}  result"]
    for o in outcomes:
        result = "different" if o.difference else "same"
        counts = f"{o.calls:>7}  {o.hit_rate:>4.0%}  {o.fills:>7}  {o.late_copies:>4}  {o.streamed:>8}"
        lines.append(f"{o.scenario:<{width}}  {counts}{_figures(o)}  {result}")
    same = sum(not outcome.difference for outcome in outcomes)
    what = "logits within rounding of those of the CPU" if within_rounding else "the same tokens and logits as no cache"
    return "\n".join([*lines, f"{same} of {len(outcomes)} scenarios give {what}"])


def _figures(outcome: Outcome) -> str:
    """Columns: the median error, the share of tokens with a large error, and the share of answer tokens before the
    first difference.
    """
    if not outcome.more:
        return ""
    error, far, agreeing = (outcome.more[name] for name in ("median_error", "far_tokens", "agreeing_tokens"))
    return f"  {error:>5.3f}  {far:>4.0%}  {agreeing:>5.0%}"


def _to_json(outcomes: Sequence[Outcome]) -> str:
    rows = [{name: value for name, value in asdict(outcome).items() if name != "more"} for outcome in outcomes]
    return json.dumps({"results": [row | outcome.more for row, outcome in zip(rows, outcomes, strict=True)]})


if __name__ == "__main__":
    from hybrid.commands.console import run_app

    run_app(app, "python -m hybrid.verify")
