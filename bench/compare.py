"""Compare with other engines: the same weights, machine, threads and minute; one table of tokens per second.

    pip install llama-cpp-python gguf      (the extra [compare]; compiles llama.cpp for this machine, 5 to 20 minutes)
    python bench/compare.py --layers 8 --formats bf16,int8,int4 --output md

Where --model-path is a GGUF file, of any family, both engines open it as it is. Without --model-path it writes a
synthetic checkpoint with the shapes of --like. The same checkpoint is written as GGUF (BF16, Q8_0, Q4_0), both engines
are opened, and every repetition runs ours and theirs one after the other, with the machine's own read bandwidth and
multiplication rate measured around ours. Figures are medians. With --like gpt-oss-20b and deepseek-v2-lite, which have
their own types in GGUF files, a file with random blocks is written and opened by both (synthetic_gguf.py).

llama.cpp runs through its C interface with its best settings: native build, mapped and repacked weights, flash
attention, F16 keys and values, as many threads. Its tokenizer and sampler are not measured, nor are ours. A depth is a
real context: ours from a real prompt, theirs from a block of real tokens copied to all positions (llama_peer.py).
`--peers ik_llama.cpp` takes its fork instead, built for this machine as well; both at once cannot be in one process.

Where installed, `transformers` (bf16, in a process of its own, because both do not fit in memory: the machine is
measured beside it) and kt-kernel's MoE layer (`pip install kt-kernel`, in one process with ours, in turn) are measured
too. --peers names those that are wanted; one that is missing is then an error.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer
from comparison import OUTPUTS, TESTS, Duel, Ours, Progress, duel, parse_tests, result, row, tokens
from pairs import GGUF_SLICES, first_layers, layers_that_fit, synthetic, synthetic_file

from hybrid.commands import bench
from hybrid.commands.console import exit_codes, progress_bar, run_app, say
from hybrid.commands.measure import Test, probe_of
from hybrid.config import CHUNK_SIZE, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError, KernelError
from hybrid.machine.hardware import memory
from hybrid.machine.rates import MachineProbe
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.opening import open_checkpoint
from hybrid.weights.pack import default_cache_dir

if TYPE_CHECKING:
    from llama_peer import LlamaPeer

GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # what each format meets
ALL_FORMATS = ",".join(GGUF_TYPES)
AS_PUBLISHED = "gguf"  # the format of rows whose weights both engines read from one GGUF file
KV_FORMATS = {"bf16": "bf16", "int8": "int8", "int4": "int8", AS_PUBLISHED: "int8"}  # unless --kv-format says otherwise
READERS = {"llama.cpp": ("llama_cpp_peer", "LlamaCpp"), "ik_llama.cpp": ("ik_llama_cpp_peer", "IkLlamaCpp")}
PACKAGES = {  # modules that a peer needs, and how to get them
    "llama.cpp": (("llama_cpp", "gguf"), "pip install llama-cpp-python gguf"),
    "ik_llama.cpp": (
        ("ik_llama_cpp", "gguf"),
        "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary ik-llama-cpp-python ik-llama-cpp-python gguf",
    ),
    "transformers": (("transformers", "torch"), "pip install transformers torch"),
    "kt-kernel": (("kt_kernel", "torch"), "pip install kt-kernel"),
}
_ALLOWED_THERE = f"allowed there: {', '.join(READERS)}"
DEFAULT_LAYERS = 8
MOE_ROWS = (1, 8, 512, 4096)  # of a step
BUSY = 0.5  # processors; more is worth a note
FAULTS = 1000  # pages read from disk while measuring that are worth a note: 4 MB
HERE = Path(__file__).parent

_WHOLE: dict[str, Any] = {"metavar": "INTEGER"}
ModelPath = Annotated[Path | None, typer.Option(help="Qwen3-MoE checkpoint or GGUF file; default: made like --like.")]
Like = Annotated[str, typer.Option(help="Model whose shapes the synthetic checkpoint has.")]
Layers = Annotated[
    int | None, typer.Option(help="Layers to keep; default: 8, 27 of deepseek-v2-lite, all of --model-path.", **_WHOLE)
]
Formats = Annotated[str | None, typer.Option(help=f"Of the weights; default: {ALL_FORMATS}, or a GGUF file's own.")]
Tests = Annotated[str, typer.Option(help="As pp512 (prompt), tg32 (decode), tg32@4096 (depth), tg32x4 (sequences).")]
Repetitions = Annotated[int, typer.Option("--repetitions", "-r", help="How often to repeat every test.", **_WHOLE)]
Threads = Annotated[int | None, typer.Option(help="Of each engine; default: the cores.", **_WHOLE)]
KvFormat = Annotated[str | None, typer.Option(help="Of our keys and values; default: bf16 beside bf16, else int8.")]
Peers = Annotated[
    str | None, typer.Option(help=f"Out of {','.join(PACKAGES)}; default: all installed but ik_llama.cpp.")
]
WorkDir = Annotated[Path | None, typer.Option(help="For the model files, kept for the next time; default: user cache.")]
Output = Annotated[str, typer.Option(help="md, csv or json.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Settings:
    """What is compared. `peers` are installed; `model_path` None means a synthetic checkpoint or GGUF file like `like`;
    a GGUF file has `formats` AS_PUBLISHED alone, and layers None means as many as it has.
    """

    model_path: Path | None
    like: str
    layers: int | None
    formats: tuple[str, ...]
    tests: tuple[Test, ...]
    repetitions: int
    threads: int | None
    kv_format: str | None
    peers: tuple[str, ...]
    work_dir: Path


@app.command()
def compare(
    model_path: ModelPath = None,
    like: Like = "qwen3-30b-a3b",
    layers: Layers = None,
    formats: Formats = None,
    tests: Tests = TESTS,
    repetitions: Repetitions = 5,
    threads: Threads = None,
    kv_format: KvFormat = None,
    peers: Peers = None,
    work_dir: WorkDir = None,
    output: Output = "md",
) -> None:
    """Time this engine and others on the same weights, in turn; print tokens per second, ratio and share of limit."""
    with exit_codes():
        _one_of("--output", output, OUTPUTS)
        for flag, value in (("--repetitions", repetitions), ("--layers", layers)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value} is out of range; it must be at least 1")
        one_file = _is_gguf(model_path) or (model_path is None and like in GGUF_SLICES)
        if one_file and formats:
            raise ConfigError(f"--formats {formats} does not go with a GGUF file: both engines open it as it is")
        if _is_gguf(model_path) and layers:
            raise ConfigError(f"--layers {layers} does not go with {model_path}: both engines open it as it is")
        chosen = (formats or ALL_FORMATS).split(",")
        names = (AS_PUBLISHED,) if one_file else tuple(_one_of("--formats", name, GGUF_TYPES) for name in chosen)
        found = find_peers(peers, one_file)
        if peers and "transformers" in found and not ("llama.cpp" in found and "bf16" in names):
            raise ConfigError("transformers is put beside the run against llama.cpp in bf16: add both, or leave it out")
        settings = Settings(
            model_path, like, layers, names, tuple(parse_tests(tests)), repetitions, threads, kv_format, found,
            work_dir or default_cache_dir() / "compare",
        )  # fmt: skip
        with progress_bar() as progress:
            report = run(settings, progress)
        print(OUTPUTS[output](report))


def find_peers(text: str | None, one_file: bool = False) -> tuple[str, ...]:
    """The peers to measure. Raises ConfigError for an unknown one, one that was asked for and is not installed, and one
    that reads no GGUF files where there is one.
    """
    wanted = [_one_of("--peers", name, PACKAGES) for name in text.split(",")] if text else ["llama.cpp"]
    for name in wanted:
        if one_file and name not in READERS:
            raise ConfigError(f"--peers {name} does not go with a GGUF file, which it does not read; {_ALLOWED_THERE}")
    for name in wanted:
        modules, command = PACKAGES[name]
        if missing := [module for module in modules if not find_spec(module)]:
            raise ConfigError(f"{name} is compared through {' and '.join(missing)}, not installed here; {command}")
    if set(READERS) <= set(wanted):
        raise ConfigError("--peers: llama.cpp and ik_llama.cpp cannot be in one process; compare with one at a time")
    if text:
        return tuple(wanted)
    others = [name for name in PACKAGES if name not in READERS and not one_file]
    for name in others:
        if not _installed(name):
            say(f"note: {name} is not compared, it is not installed; {PACKAGES[name][1]}")
    return (*wanted, *filter(_installed, others))


def _is_gguf(path: Path | None) -> TypeGuard[Path]:
    return path is not None and path.suffix == ".gguf"


def _installed(peer: str) -> bool:
    return all(find_spec(module) for module in PACKAGES[peer][0])


def _one_of(flag: str, value: str, allowed: Any) -> str:
    if value not in allowed:
        raise ConfigError(f"{flag} {value!r} is unknown; allowed: {', '.join(allowed)}")
    return value


class Report:
    """Collects rows and the description of the machine."""

    def __init__(self, settings: Settings) -> None:
        self.machine: dict[str, Any] = {"repetitions": settings.repetitions, "peers": {}, "formats": {}, "notes": []}
        self.results: list[dict[str, Any]] = []

    def add_format(self, name: str, engine: Engine, probe: MachineProbe, peer: str) -> None:
        """Describe the machine, and what was measured on it while a format was compared."""
        facts = bench.describe_machine(engine, probe)
        own = {key: facts.pop(key) for key in list(facts) if key in _OF_A_FORMAT}
        self.machine |= facts
        self.machine["formats"][name] = own | {"layers": len(engine.spec.layers)}
        self.note(
            f"{name}, {len(engine.spec.layers)} layers: {own['weights_gb']} GB; keys and values {own['kv_format']} "
            f"here, F16 in {peer}; the machine reads {own['read_gbps']} GB/s and multiplies "
            f"{', '.join(f'{rate} G/s ({kind})' for kind, rate in own['peak_gflops'].items())}"
        )

    def add_process(self, name: str, facts: dict[str, Any]) -> None:
        """What a process of its own, that measured a format, says of the machine."""
        own = {key: facts.pop(key) for key in list(facts) if key in _OF_A_FORMAT}
        self.machine = facts | self.machine
        self.machine["formats"].setdefault(name, own | {"layers": 1})

    def note(self, text: str) -> None:
        """A line above the table, that is told at once as well."""
        self.machine["notes"].append(text)
        say(f"note: {text}")

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "results": self.results}


_OF_A_FORMAT = ("weights_gb", "format", "kv_format", "read_gbps", "peak_gflops")


def run(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Make the files, measure every pair of models, and describe: {"machine": ..., "results": [...]}."""
    report = Report(settings)
    if (load := os.getloadavg()[0]) > BUSY:
        report.note(f"other programs kept {load:.1f} processors busy just before; engines suffer unequally from that")
    path = _source(settings, progress)
    for peer in READERS.keys() & settings.peers:
        for name in settings.formats:
            duels, used = against_reader(settings, report, peer, path, name, progress)
            if name == "bf16" and "transformers" in settings.peers:
                against_transformers(settings, report, used, duels)
    if "kt-kernel" in settings.peers:
        against_kt_kernel(settings, report, path)
    return report.to_dict()


def _source(settings: Settings, progress: Progress) -> Path:
    """The checkpoint or the GGUF file that is compared."""
    if _is_gguf(settings.model_path):
        open_checkpoint(settings.model_path)
        return settings.model_path
    if not settings.model_path and settings.like in GGUF_SLICES:
        return synthetic_file(settings.like, settings.layers, settings.work_dir, progress)
    if not settings.model_path:
        return synthetic(settings.like, settings.layers or DEFAULT_LAYERS, settings.work_dir)
    have = len(Checkpoint.open(settings.model_path).spec.layers)
    return first_layers(settings.model_path, settings.layers or have, settings.work_dir)


def against_reader(
    settings: Settings, report: Report, peer: str, path: Path, name: str, progress: Progress
) -> tuple[list[Duel], Path]:
    """Compare one format with a peer that reads GGUF files; returns what was measured and the checkpoint, which has
    fewer layers if memory is short.
    """
    from gguf_file import cached_gguf

    module, reader = READERS[peer]
    theirs_of, label = getattr(import_module(module), reader), f"{peer} {GGUF_TYPES.get(name, 'GGUF')}"
    file = path
    if name != AS_PUBLISHED:
        path = _fitting(settings, report, path, name)
        file = cached_gguf(Checkpoint.open(path), settings.work_dir, GGUF_TYPES[name], progress)
    with Engine.open(_config(settings, path, name), progress, say) as engine:
        _check_build(theirs_of, engine.plan.isa)
        with closing(theirs_of(file, engine.plan.threads, settings.tests)) as theirs:
            duels, probe = _duel(settings, report, engine, theirs, progress, f"measuring {name}")
        report.add_format(name, engine, probe, label)
    report.machine["peers"][peer] = f"{theirs_of.package} {version(theirs_of.package)}"
    report.results += [result(entry, name, label) for entry in duels]
    return duels, path


def _duel(
    settings: Settings, report: Report, engine: Engine, theirs: LlamaPeer, progress: Progress, what: str
) -> tuple[list[Duel], MachineProbe]:
    ours, probe = Ours(engine), probe_of(engine)
    ours.touch()
    theirs.touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt

    def limit(test: Test) -> float:
        return ours.limit(probe, test)

    duels = duel(ours, theirs, settings.tests, settings.repetitions, probe, limit, progress, what)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
    if faults > FAULTS:
        report.note(f"{what}: {faults} pages came from disk meanwhile, memory was short: compare fewer layers")
    return duels, probe


def _fitting(settings: Settings, report: Report, path: Path, name: str) -> Path:
    """The checkpoint, or its first layers where two copies of all would not stay in memory."""
    checkpoint = Checkpoint.open(path)
    have, free = len(checkpoint.spec.layers), memory()[1]
    layers = layers_that_fit(checkpoint, GGUF_TYPES[name], settings.tests, free)
    if layers == have:
        return path
    report.note(f"{name}: two copies of {have} layers do not fit in {free / 1e9:.1f} GB; {layers} are compared")
    return first_layers(path, layers, settings.work_dir)


def _config(settings: Settings, path: Path, name: str) -> EngineConfig:
    batch = max(test.batch for test in settings.tests)
    return EngineConfig(
        model_path=path,
        device="cpu",
        weight_format="auto" if name == AS_PUBLISHED else name,
        kv_format=settings.kv_format or KV_FORMATS[name],
        threads=settings.threads,
        max_seq_len=max(test.length for test in settings.tests) + 1,
        max_batch=batch,
        chunk_size=max(CHUNK_SIZE, batch),
        cache_dir=settings.work_dir,
    )


def _check_build(peer: type[LlamaPeer], isa: str) -> None:
    """A peer without the instructions of this machine would flatter us."""
    if missing := peer.missing_instructions(isa):
        raise KernelError(
            f"{peer.name} was built without {', '.join(missing)}, which this machine has; build it here: "
            f"CMAKE_ARGS=-DGGML_NATIVE=ON pip install --force-reinstall --no-binary {peer.package} {peer.package}"
        )


def against_transformers(settings: Settings, report: Report, path: Path, duels: list[Duel]) -> None:
    """Prompts up to 512 and decoding without depth, beside what was just measured of ours."""
    chosen = {d.test.name: d for d in duels if d.test.batch == 1 and not d.test.depth and d.test.prompt <= 512}
    if not chosen:
        return
    threads = str(report.machine["threads"])
    said = _peer_process("transformers_peer.py", str(path), threads, str(settings.repetitions), *chosen)
    for name, entry in chosen.items():
        count = tokens(entry.test)
        ours, theirs = (count / statistics.median(seconds) for seconds in (entry.ours, said["seconds"][name]))
        peer = f"transformers {said['experts'][name]}"
        report.results.append(row((name, "bf16", 0, 1), ours, peer, theirs, entry.limit_share))
    report.machine["peers"]["transformers"] = said["version"]
    report.note(
        f"{said['version']} ran after ours in a process of its own; the machine read {said['read_gbps']} GB/s beside it"
    )


def against_kt_kernel(settings: Settings, report: Report, path: Path) -> None:
    """One MoE layer, without norm and router: rows a second."""
    path = first_layers(path, 1, settings.work_dir)
    shared = str(path), str(settings.threads or 0), str(settings.repetitions), str(settings.work_dir)
    for name in settings.formats:
        said = _peer_process("kt_kernel_peer.py", *shared, name, *map(str, MOE_ROWS))
        for entry in said["rows"]:
            place, peer = ("moe", name, 0, entry["rows"]), f"kt-kernel {name.upper()}"
            report.results.append(row(place, entry["ours"], peer, entry["theirs"], entry["limit_share"]))
        report.machine["peers"]["kt-kernel"] = said["version"]
        report.add_process(name, said["machine"])
    report.note(f"moe: one MoE layer, rows a second, in turn with {report.machine['peers']['kt-kernel']}")


def _peer_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a sibling script and read the line of JSON that it prints among the chatter of libraries."""
    done = subprocess.run([sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"signal {-done.returncode}").splitlines()[-1]
        raise KernelError(f"{script} failed: {reason}; leave it out with --peers")
    said: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return said


if __name__ == "__main__":
    run_app(app, "compare.py")
