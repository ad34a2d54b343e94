"""The command `hybrid run`, also `python -m hybrid.main`: generate text from prompts, or chat."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hybrid.commands.chat import ChatOptions
from hybrid.commands.console import progress_bar, say, show, show_json
from hybrid.commands.conversation import AnswerPrinter, ChatInputs, Conversation, show_progress
from hybrid.commands.flags import Version, command, new_app
from hybrid.commands.form import FormOptions
from hybrid.commands.prompts import DEFAULT_PROMPT, MAX_PROMPTS, gather_prompts, read_stdin
from hybrid.commands.signals import Terminated
from hybrid.config import OVERLAPS, EngineConfig, check_config
from hybrid.core import Completion, SamplingParams, ToolCall
from hybrid.errors import ConfigError
from hybrid.settings import check_settings, setting

if TYPE_CHECKING:
    from hybrid.commands.outputs import Outputs
    from hybrid.engine.experts.report import CacheReport
    from hybrid.serving.llm import LLM
    from hybrid.serving.recorder import Summary
    from hybrid.serving.stream import Stream

app = new_app()

SHOWN = 1000  # characters of a prompt


@dataclass(frozen=True)
class RunOptions:
    """What a run reads and writes."""

    GROUP: ClassVar[str] = "files"

    prompt: tuple[str, ...] = setting((), "A prompt", group="prompts")
    prompt_path: Path | None = setting(
        None, 'A text file, a prompt a line; JSON lines; or a JSON list, also as {"prompts": []}.', group="prompts"
    )
    n_prompts: int | None = setting(
        None, "Repeat or cut the list of prompts to this many.", group="prompts", minimum=1, maximum=MAX_PROMPTS
    )
    chat: bool = setting(False, "Prompts are questions: apply the chat template.", group="prompts")
    cache_save: Path | None = setting(None, "Write the experts that are cached at the end.", group="cache")
    overlap: str = setting(
        "none",
        f"With misses: one of {', '.join(OVERLAPS)}; next copies for the next layer.",
        group="gpu",
        choices=tuple(OVERLAPS),
    )
    breakdown_csv: Path | None = setting(None, "Write the times of every step, in ms.")
    cachehit_csv: Path | None = setting(None, "Write the hits of the expert cache by step and layer.")
    trace: Path | None = setting(None, "Write which experts every token chose: .csv or .parquet.")
    token_csv: Path | None = setting(None, "Write the time of every token and the processors' clock.")
    power_csv: Path | None = setting(None, "Write power and energy per token.")
    hide_resp: bool = setting(False, "Do not print the text.", group="output")
    json: bool = setting(False, "Print one JSON object instead of text and summary.", group="output")
    dry_run: bool = setting(False, "Print the plan of memory and threads, load nothing.", group="output")


@command(app)
def run(
    config: EngineConfig,
    params: SamplingParams,
    options: RunOptions,
    chat: ChatOptions,
    form: FormOptions,
    version: Version = False,
) -> None:
    """Generate text from --prompt, --prompt-path or standard input; with none of them, at a terminal, chat."""
    check_settings(options)
    check_settings(chat)
    if options.overlap != "none":  # the prefetch that runs while the misses do
        config = replace(config, cache=replace(config.cache, prefetch=OVERLAPS[options.overlap]))
    params = replace(params, grammar=form.read())
    _run(replace(config, routes=config.routes or options.trace is not None), params, options, chat.inputs())


def _run(config: EngineConfig, params: SamplingParams, options: RunOptions, chat: ChatInputs) -> None:
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
        _use(llm, prompts, params, options, chat)


def _use(llm: LLM, prompts: list[str] | None, params: SamplingParams, options: RunOptions, chat: ChatInputs) -> None:
    """Whatever ends the run, a signal too, what it measured is written and said."""
    from hybrid.commands.outputs import Outputs

    outputs = Outputs(options, llm, say)
    try:
        completions = outputs.record(
            lambda: _converse(llm, params, chat) if prompts is None else _generate(llm, prompts, params, options, chat)
        )
    except (KeyboardInterrupt, Terminated):
        _say_summary(llm, outputs)
        raise
    if options.json:
        show_json(_json_report(llm, prompts or [], completions, outputs.summary(), outputs.cache_report()))
    else:
        _say_summary(llm, outputs)


def _say_summary(llm: LLM, outputs: Outputs) -> None:
    parts = (outputs.summary(), outputs.cache_report(), llm.engine.device_report())
    say("\n" + "\n".join(str(part) for part in (*parts, f"memory       {llm.engine.memory}") if part))


def _check(config: EngineConfig, params: SamplingParams, options: RunOptions) -> None:
    """Everything that can be known to be wrong before a model is loaded."""
    from hybrid.commands.outputs import check_outputs
    from hybrid.formats.mix import FormatMix, parse_mix
    from hybrid.serving.params import check_params

    check_config(config)
    parse_mix(config.weight_format, FormatMix.uniform("bf16"))  # the words alone: what "auto" is, the model says later
    check_params(params)
    check_outputs(options)


def _check_cache(config: EngineConfig, options: RunOptions) -> None:
    """What is asked of an expert cache, once it is known whether there can be one."""
    if options.cache_save and not config.cached:
        raise ConfigError("--cache-save has nothing to save: this run has no expert cache; use --device simulated")
    if (config.cache.requested or options.cachehit_csv) and not config.cached:
        say(
            "note: the expert cache has no effect on this machine: the run is on the CPU, whose memory holds "
            "every expert; --device simulated tries one"
        )


def _print_plan(config: EngineConfig, as_json: bool) -> None:
    from hybrid.plan.resolve import plan_model
    from hybrid.plan.text import plan_text

    plan = plan_model(config, say)
    show_json(plan.to_dict()) if as_json else show(plan_text(plan))
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


def _converse(llm: LLM, params: SamplingParams, chat: ChatInputs) -> list[Completion]:
    Conversation(llm, params, chat).run()
    return []


def _generate(
    llm: LLM, prompts: Sequence[str], params: SamplingParams, options: RunOptions, chat: ChatInputs
) -> list[Completion]:
    """Print the texts where they are wanted: one as it comes, many when all are there."""
    conversations = [chat.messages(prompt) for prompt in prompts] if options.chat else None
    words: dict[str, Any] = {"tools": chat.tools, "template_kwargs": chat.template_kwargs}
    shown = not (options.json or options.hide_resp)
    if shown and len(prompts) == 1 and params.n == 1:
        stream = llm.stream_chat(conversations[0], params, **words) if conversations else llm.stream(prompts[0], params)
        _print_stream(prompts[0], stream, options.chat, chat.hide_reasoning)
        return []
    with progress_bar() as bar:

        def progress(done: int, total: int) -> None:
            bar("prompts", done, total)

        if conversations:
            completions = llm.chat(conversations, params, progress=progress, **words)
        else:
            completions = llm.generate(prompts, params, progress)
    if shown:
        _print_texts(prompts, completions, options.chat)
    return completions


def _print_stream(prompt: str, stream: Stream, chat: bool, hide_reasoning: bool) -> None:
    _print_prompt(prompt, chat)
    printer = AnswerPrinter(hide_reasoning)
    begun = False
    try:
        with stream as deltas:
            show_progress(stream)
            for delta in deltas:
                printer.show(delta.reasoning, delta.text, delta.tool_calls)
                begun = True
    finally:
        if begun:  # after Ctrl-C, too, what follows begins a line
            printer.end()
            if not printer.shown:
                show("")


def _print_calls(calls: Sequence[ToolCall]) -> None:
    for call in calls:
        show_json(call.to_dict())


def _print_texts(prompts: Sequence[str], completions: Sequence[Completion], chat: bool) -> None:
    for completion in completions:
        _print_prompt(prompts[completion.index], chat, f"[{completion.index + 1} of {len(prompts)}]\n")
        show(completion.text)
        _print_calls(completion.tool_calls)


def _print_prompt(prompt: str, chat: bool, number: str = "") -> None:
    """Dimmed, for a person at a terminal; a file or a pipe gets the responses alone. A long one is shortened."""
    if not sys.stdout.isatty():
        return
    if len(prompt) > SHOWN:
        prompt = f"{prompt[: SHOWN // 2]} [{len(prompt) - SHOWN} characters] {prompt[-SHOWN // 2 :]}"
    show(f"{number}{prompt}", end="\n" if chat else "", dim=True)


def _json_report(
    llm: LLM,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    summary: Summary,
    cache: CacheReport | None,
) -> dict[str, Any]:
    from hybrid.machine.hardware import probe

    device = llm.engine.device_report()
    return {
        "completions": [{**asdict(c), "prompt": prompts[c.index]} for c in completions],
        "summary": asdict(summary),
        "cache": cache.to_dict() if cache else None,
        "device": device.to_dict() if device else None,
        "plan": llm.engine.plan.to_dict(),
        "memory": asdict(llm.engine.memory),
        "machine": asdict(probe()),
    }
