"""The flags of the commands: name, type and help of each; their defaults are those of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.config import CACHE_MODES, DEVICES, KV_FORMATS, LOADS, OVERLAPS, STEPS, STREAM_MODES, WEIGHT_FORMATS


def flag(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, **more)


def whole(name: str, text: str, **more: Any) -> Any:
    return flag(name, text, parser=parse_whole, metavar="INTEGER", **more)


def real(name: str, text: str, **more: Any) -> Any:
    return flag(name, text, parser=parse_real, metavar="NUMBER", **more)


def path(name: str, text: str, **more: Any) -> Any:
    return flag(name, text, parser=parse_path, metavar="PATH", **more)


def parse_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r:.80} is not a whole number") from None


def parse_blocks(text: str) -> int | str:
    return text if text == "auto" else parse_whole(text)


def parse_real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r:.80} is not a number") from None


def parse_path(text: str) -> Path:
    """`--flag=~/x` reaches a command with its tilde; an empty path is a variable of the shell that is not set."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise typer.BadParameter(f"{text!r} names a home directory that is not known; write the whole path") from None
    if not str(text):
        raise typer.BadParameter("it is empty; give a path")
    return path


def _repeated(name: str, text: str) -> Any:
    return flag(name, f"{text}; may be given several times.", show_default=False, metavar="TEXT")


def _print_version(wanted: bool) -> None:
    if wanted:
        import hybrid

        print(f"hybrid {hybrid.__version__}")
        raise typer.Exit


_AUTO = {"show_default": "chosen for the machine"}
ModelPath = Annotated[
    Path | None, path("--model-path", "Model directory or packed store.", show_default="embedded model")
]
Prompts = Annotated[list[str], _repeated("--prompt", "A prompt")]
PromptPath = Annotated[Path | None, path("--prompt-path", 'Text file, a prompt a line, or JSON {"prompts": []}.')]
PromptCount = Annotated[int | None, whole("--n-prompts", "Repeat or cut the list of prompts to this many.")]
Chat = Annotated[bool, flag("--chat", "Prompts are questions: apply the chat template.")]
HideResponse = Annotated[bool, flag("--hide-resp", "Do not print the text.")]
Json = Annotated[bool, flag("--json", "Print one JSON object instead of text and summary.")]
DryRun = Annotated[bool, flag("--dry-run", "Print the plan of memory and threads, load nothing.")]
BreakdownCsv = Annotated[Path | None, path("--breakdown-csv", "Write the times of every step, in ms.")]
CachehitCsv = Annotated[Path | None, path("--cachehit-csv", "Write the hits of the expert cache by step and layer.")]
Version = Annotated[
    bool,
    flag("--version", "Print the version.", callback=_print_version, is_eager=True, show_default=False),
]
MaxTokens = Annotated[int, whole("--max-tokens", "Tokens to generate at most, for each prompt.")]
Temperature = Annotated[float, real("--temperature", "Randomness; 0 takes the likeliest token.")]
TopP = Annotated[float, real("--top-p", "Keep the likeliest tokens that reach this probability.")]
TopK = Annotated[int, whole("--top-k", "Keep this many of the likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, real("--min-p", "Keep tokens this likely, relative to the likeliest.")]
RepetitionPenalty = Annotated[float, real("--repetition-penalty", "Above 1 avoids tokens seen before.")]
Seed = Annotated[int | None, whole("--seed", "Makes sampling repeatable.")]
Stop = Annotated[list[str], _repeated("--stop", "End before this text")]
IgnoreEos = Annotated[bool, flag("--ignore-eos", "Go on after the end of the text.")]
Device = Annotated[str, flag("--device", f"One of {', '.join(DEVICES)}; auto is cuda where a GPU can be used, or cpu.")]
Format = Annotated[
    str,
    flag("--format", f"Of the weights: one of {', '.join(WEIGHT_FORMATS)}, or a mix such as int4,head=int8."),
]
KvFormat = Annotated[str, flag("--kv-format", f"Of keys and values: one of {', '.join(KV_FORMATS)}.")]
BatchInvariant = Annotated[
    bool | None,
    flag(
        "--batch-invariant/--no-batch-invariant",
        "Results do not depend on what else runs in a step.",
        show_default="on where it costs nothing: everywhere but with amx",
    ),
]
Threads = Annotated[int | None, whole("--threads", "Threads that compute.", **_AUTO)]
Numa = Annotated[str, flag("--numa", "Memory nodes to split the weights over: auto, off or a number.")]
Load = Annotated[str, flag("--load", f"Weights are used in the mapped file or in a copy: one of {', '.join(LOADS)}.")]
MaxSeqLen = Annotated[int | None, whole("--max-seq-len", "Tokens of one sequence at most.", **_AUTO)]
MaxBatch = Annotated[int, whole("--max-batch", "Sequences that run together.")]
ChunkSize = Annotated[int, whole("--chunk-size", "Tokens computed in one step at most.")]
CacheDir = Annotated[Path | None, path("--cache-dir", "Where packed models are kept.", show_default="user cache")]
Check = Annotated[bool, flag("--check", "Verify every weight while loading.")]
CacheBlocks = Annotated[
    Any,
    flag("--cache-nblocks", "Indexes of the expert cache, or auto: what fits.", parser=parse_blocks, metavar="N|auto"),
]
CacheWays = Annotated[int | None, whole("--cache-nways", "Experts that each index holds.")]
CacheQuota = Annotated[int | None, whole("--cache-quota", "Experts copied in one step at most.")]
CachePolicy = Annotated[str, flag("--cache-replace-policy", "FIFO, LRU, LFU, LFRU, SIEVE, S3-FIFO, MRS and more.")]
CacheAdmission = Annotated[str, flag("--cache-admission", "Which misses are copied: always, second-touch, break-even.")]
CachePrefetch = Annotated[str, flag("--cache-prefetch", "none, or next-gate: ask the next layer's router early.")]
CacheMapping = Annotated[str, flag("--cache-mapping", "Experts to indexes: modulo, prefix or hash.")]
CacheMode = Annotated[str, flag("--cache", f"One of {', '.join(CACHE_MODES)}; auto follows the verdict.")]
CacheStream = Annotated[
    str,
    flag("--cache-stream", f"Prompts bring missed experts to the device: one of {', '.join(STREAM_MODES)}, by costs."),
]
CacheWarm = Annotated[Path | None, path("--cache-warm", "Begin with the experts that this file lists.")]
CacheSave = Annotated[Path | None, path("--cache-save", "Write the experts that are cached at the end.")]
CacheDelay = Annotated[
    int | None,
    whole("--cache-delay", "Copies end after so many layers instead of when they are done.", show_default="as copied"),
]
StepOn = Annotated[
    str,
    flag("--step-on", f"Where all but the experts runs: one of {', '.join(STEPS)}; torch-cpu stands in for a GPU."),
]
GpuKvTokens = Annotated[
    int | None,
    whole("--gpu-kv-tokens", "Most recent tokens of a sequence that the GPU mirrors.", show_default="what fits"),
]
CudaGraphs = Annotated[
    bool, flag("--cuda-graphs/--no-cuda-graphs", "Ask a GPU for a whole layer at once in steps that decode.")
]
Overlap = Annotated[
    str, flag("--overlap", f"With misses: one of {', '.join(OVERLAPS)}; next copies for the next layer.")
]
PinWeights = Annotated[bool, flag("--pin-weights", "Pin the weights of all experts, for faster copies to a GPU.")]
StrictPlacement = Annotated[
    bool,
    flag("--strict-placement", "With a GPU: experts are added in one order wherever they ran; slower."),
]
CopyRate = Annotated[float, real("--device-copy-gbps", "Of the simulated device: GB/s of copies to it.")]
Latency = Annotated[float, real("--device-latency-us", "Microseconds before a copy or a layer begins there.")]
ReadRate = Annotated[float, real("--device-read-gbps", "GB/s of its memory, for modelled times.")]
ComputeRate = Annotated[float, real("--device-tflops", "10^12 operations a second there, for modelled times.")]
DeviceMemory = Annotated[float, real("--device-memory-gb", "GB of its memory: slots, and with --step-on all else.")]
TraceFile = Annotated[Path | None, path("--trace", "Write which experts every token chose: .csv or .parquet.")]
RouteTrace = Annotated[
    Path | None, path("--route-trace", "Tokens take the experts of this trace, not of the model's routers.")
]
TokenCsv = Annotated[Path | None, path("--token-csv", "Write the time of every token and the processors' clock.")]
PowerCsv = Annotated[Path | None, path("--power-csv", "Write power and energy per token.")]
