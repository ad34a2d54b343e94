"""The command `hybrid run`, also `python -m hybrid.main`: generate text from prompts, or chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hybrid.commands import flags as f
from hybrid.commands.console import exit_codes, progress_bar, say
from hybrid.commands.prompts import DEFAULT_PROMPT, gather_prompts, read_stdin
from hybrid.config import OVERLAPS, CacheConfig, DeviceConfig, EngineConfig, check_config
from hybrid.core import Completion, SamplingParams
from hybrid.errors import ConfigError, cache_errors

if TYPE_CHECKING:
    from hybrid.engine.experts.report import CacheReport
    from hybrid.serving.llm import LLM
    from hybrid.serving.recorder import Summary

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class RunOptions:
    """What a run reads and writes."""

    prompt: list[str]
    prompt_path: Path | None
    n_prompts: int | None
    chat: bool
    hide_resp: bool
    json: bool
    dry_run: bool
    breakdown_csv: Path | None
    cachehit_csv: Path | None
    token_csv: Path | None
    power_csv: Path | None
    trace: Path | None
    cache_save: Path | None


@app.command()
def run(
    model_path: f.ModelPath = EngineConfig.model_path,
    prompt: f.Prompts = [],  # noqa: B006  typer reads it as the default of a flag
    prompt_path: f.PromptPath = None,
    n_prompts: f.PromptCount = None,
    chat: f.Chat = False,
    max_tokens: f.MaxTokens = SamplingParams.max_tokens,
    temperature: f.Temperature = SamplingParams.temperature,
    top_p: f.TopP = SamplingParams.top_p,
    top_k: f.TopK = SamplingParams.top_k,
    min_p: f.MinP = SamplingParams.min_p,
    repetition_penalty: f.RepetitionPenalty = SamplingParams.repetition_penalty,
    seed: f.Seed = SamplingParams.seed,
    stop: f.Stop = [],  # noqa: B006
    ignore_eos: f.IgnoreEos = SamplingParams.ignore_eos,
    device: f.Device = EngineConfig.device,
    threads: f.Threads = EngineConfig.threads,
    numa: f.Numa = EngineConfig.numa,
    load: f.Load = EngineConfig.load,
    weight_format: f.Format = EngineConfig.weight_format,
    kv_format: f.KvFormat = EngineConfig.kv_format,
    batch_invariant: f.BatchInvariant = EngineConfig.batch_invariant,
    max_seq_len: f.MaxSeqLen = EngineConfig.max_seq_len,
    max_batch: f.MaxBatch = EngineConfig.max_batch,
    chunk_size: f.ChunkSize = EngineConfig.chunk_size,
    cache_dir: f.CacheDir = EngineConfig.cache_dir,
    check: f.Check = EngineConfig.check,
    cache_nblocks: f.CacheBlocks = CacheConfig.nblocks,
    cache_nways: f.CacheWays = CacheConfig.nways,
    cache_quota: f.CacheQuota = CacheConfig.quota,
    cache_replace_policy: f.CachePolicy = CacheConfig.policy,
    cache_admission: f.CacheAdmission = CacheConfig.admission,
    cache_prefetch: f.CachePrefetch = CacheConfig.prefetch,
    cache_mapping: f.CacheMapping = CacheConfig.mapping,
    cache: f.CacheMode = CacheConfig.mode,
    cache_stream: f.CacheStream = CacheConfig.stream,
    cache_warm: f.CacheWarm = CacheConfig.warm,
    cache_save: f.CacheSave = None,
    cache_delay: f.CacheDelay = CacheConfig.delay,
    step_on: f.StepOn = EngineConfig.step_on,
    gpu_kv_tokens: f.GpuKvTokens = EngineConfig.gpu_kv_tokens,
    cuda_graphs: f.CudaGraphs = EngineConfig.cuda_graphs,
    overlap: f.Overlap = "none",
    pin_weights: f.PinWeights = CacheConfig.pin_weights,
    strict_placement: f.StrictPlacement = CacheConfig.strict_placement,
    device_copy_gbps: f.CopyRate = DeviceConfig.copy_gbps,
    device_latency_us: f.Latency = DeviceConfig.latency_us,
    device_read_gbps: f.ReadRate = DeviceConfig.read_gbps,
    device_tflops: f.ComputeRate = DeviceConfig.tflops,
    device_memory_gb: f.DeviceMemory = DeviceConfig.memory_gb,
    breakdown_csv: f.BreakdownCsv = None,
    cachehit_csv: f.CachehitCsv = None,
    trace: f.TraceFile = None,
    route_trace: f.RouteTrace = EngineConfig.route_trace,
    token_csv: f.TokenCsv = None,
    power_csv: f.PowerCsv = None,
    hide_resp: f.HideResponse = False,
    json: f.Json = False,
    dry_run: f.DryRun = False,
    version: f.Version = False,
) -> None:
    """Generate text from --prompt, --prompt-path or standard input; with none of them, at a terminal, chat."""
    flags = locals()
    with exit_codes():
        named = {"policy": cache_replace_policy, "mode": cache, "prefetch": _overlapped(overlap, cache_prefetch)}
        placement = {"pin_weights": pin_weights, "strict_placement": strict_placement}
        chosen = _prefixed("cache_", flags) | named | placement
        simulated = _chosen(DeviceConfig, _prefixed("device_", flags))
        more = {"cache": _chosen(CacheConfig, chosen), "simulated": simulated, "routes": trace is not None}
        config = _chosen(EngineConfig, flags, **more)
        _run(config, _chosen(SamplingParams, flags, stop=tuple(stop)), _chosen(RunOptions, flags))


def _overlapped(overlap: str, prefetch: str) -> str:
    """`--overlap next` is the prefetch that runs while the misses do."""
    if overlap not in OVERLAPS:
        raise ConfigError(f"--overlap {overlap!r} is unknown; allowed: {', '.join(OVERLAPS)}")
    return prefetch if overlap == "none" else OVERLAPS[overlap]


def _prefixed(prefix: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags whose names begin so, without it."""
    return {name.removeprefix(prefix): value for name, value in flags.items() if name.startswith(prefix)}


def _chosen(kind: type[Any], flags: Mapping[str, Any], **more: Any) -> Any:
    """An instance of a dataclass whose fields are the flags of the same names."""
    names = [field.name for field in fields(kind) if field.name in flags and field.name not in more]
    return kind(**{name: flags[name] for name in names}, **more)


def _run(config: EngineConfig, params: SamplingParams, options: RunOptions) -> None:
    _check(config, params, options)
    from hybrid.plan.resolve import resolve_device

    _check_cache(resolve_device(config), options)
    if options.dry_run:
        return _print_plan(config, options.json)
    prompts = _prompts(options)
    from hybrid.serving.llm import LLM

    with progress_bar() as progress:
        llm = LLM.from_config(config, progress, say)
    with llm:
        _use(llm, prompts, params, options)


def _use(llm: LLM, prompts: list[str] | None, params: SamplingParams, options: RunOptions) -> None:
    """Whatever ends the run, a signal too, what it measured is written."""
    from hybrid.commands.outputs import Outputs

    with Outputs(options, llm, say) as outputs:
        completions = _converse(llm, params) if prompts is None else _generate(llm, prompts, params, options)
    summary = outputs.recorder.summary(llm.engine.load_seconds, llm.engine.plan.isa, llm.engine.plan.threads)
    cache = outputs.cache_report()
    if options.json:
        print(_json_report(llm, prompts or [], completions, summary, cache))
    else:
        parts = (summary, cache, llm.engine.device_report(), f"memory       {llm.engine.memory}")
        say("\n" + "\n".join(str(part) for part in parts if part))


def _check(config: EngineConfig, params: SamplingParams, options: RunOptions) -> None:
    """Everything that can be known to be wrong before a model is loaded."""
    from hybrid.formats.mix import parse_mix, uniform
    from hybrid.serving.recorder import check_csv_path
    from hybrid.serving.sampler import check_params

    check_config(config)
    parse_mix(config.weight_format, uniform("bf16"))  # the words alone: what "auto" is, the model says later
    check_params(params)
    for flag in ("breakdown-csv", "cachehit-csv", "token-csv", "power-csv", "trace", "cache-save"):
        check_csv_path(f"--{flag}", getattr(options, flag.replace("-", "_")))
    if options.trace:
        _check_trace(options.trace)


def _check_cache(config: EngineConfig, options: RunOptions) -> None:
    """What is asked of an expert cache, once it is known whether there can be one."""
    if options.cache_save and not config.cached:
        raise ConfigError("--cache-save has nothing to save: this run has no expert cache; use --device simulated")
    if (config.cache.requested or options.cachehit_csv) and not config.cached:
        say(
            "note: the expert cache has no effect on this machine: the run is on the CPU, whose memory holds "
            "every expert; --device simulated tries one"
        )


def _check_trace(path: Path) -> None:
    from gpu_cache.trace import check_suffix

    with cache_errors("--trace"):
        check_suffix(path)


def _print_plan(config: EngineConfig, as_json: bool) -> None:
    from hybrid.plan.resolve import plan_model

    plan = plan_model(config, say)
    print(json.dumps(plan.to_dict()) if as_json else plan)
    plan.require_fit()


def _prompts(options: RunOptions) -> list[str] | None:
    """None: there are no prompts, but a terminal to chat at."""
    prompts = gather_prompts(options.prompt, options.prompt_path, options.n_prompts)
    if prompts:
        return prompts
    if sys.stdin and sys.stdin.isatty() and sys.stdout.isatty() and not options.json:
        return None
    text = read_stdin()
    if text is None:
        say(f"note: there is no prompt, so this one is used: {DEFAULT_PROMPT}")
    return gather_prompts([text or DEFAULT_PROMPT], None, options.n_prompts)


def _converse(llm: LLM, params: SamplingParams) -> list[Completion]:
    from hybrid.commands.conversation import Conversation

    Conversation(llm, params).run()
    return []


def _generate(llm: LLM, prompts: Sequence[str], params: SamplingParams, options: RunOptions) -> list[Completion]:
    """Print the texts where they are wanted: one as it comes, many when all are there."""
    inputs = [_as_question(llm, prompt) for prompt in prompts] if options.chat else prompts
    shown = not (options.json or options.hide_resp)
    if shown and len(prompts) == 1:
        _print_stream(llm, prompts[0], inputs[0], params)
        return []
    completions = _complete(llm, inputs, params)
    if shown:
        _print_texts(prompts, completions)
    return completions


def _as_question(llm: LLM, prompt: str) -> list[int]:
    return llm.encode_chat([{"role": "user", "content": prompt}])


def _complete(llm: LLM, inputs: Sequence[Any], params: SamplingParams) -> list[Completion]:
    with progress_bar() as progress:
        return llm.generate(inputs, params, lambda done, total: progress("prompts", done, total))


def _print_stream(llm: LLM, prompt: str, tokens: Any, params: SamplingParams) -> None:
    _print_prompt(prompt)
    with llm.stream(tokens, params) as deltas:
        for delta in deltas:
            print(delta.text, end="", flush=True)
    print()


def _print_texts(prompts: Sequence[str], completions: Sequence[Completion]) -> None:
    for prompt, completion in zip(prompts, completions, strict=True):
        _print_prompt(prompt)
        print(completion.text)


def _print_prompt(prompt: str) -> None:
    """Dimmed, for a person at a terminal; a file or a pipe gets the responses alone."""
    if sys.stdout.isatty():
        print(f"\033[2m{prompt}\033[0m", end="", flush=True)


def _json_report(
    llm: LLM,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    summary: Summary,
    cache: CacheReport | None,
) -> str:
    from hybrid.machine.hardware import probe

    device = llm.engine.device_report()
    report = {
        "completions": [{"prompt": p, **asdict(c)} for p, c in zip(prompts, completions, strict=True)],
        "summary": asdict(summary),
        "cache": cache.to_dict() if cache else None,
        "device": device.to_dict() if device else None,
        "plan": llm.engine.plan.to_dict(),
        "memory": asdict(llm.engine.memory),
        "machine": asdict(probe()),
    }
    return json.dumps(report, ensure_ascii=False)
