"""Hundreds of damaged files of every kind: each is read, or refused by a named error of one line; nothing else happens.

The seed is fixed. What once went wrong is in the tests of its part, whole.
"""

from __future__ import annotations

import importlib.util
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from routing import random_trace
from typer.testing import CliRunner

from gpu_cache.errors import CacheError
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import calls
from gpu_cache.traces import FORMATS, known_format
from hybrid.commands import simulate
from hybrid.commands.plot_data import layers_of_policies, read_hits, read_results, read_text, read_times
from hybrid.commands.prompts import read_prompts
from hybrid.engine.experts.warm_start import read_warm, write_warm
from hybrid.errors import HybridError
from hybrid.files.traces import open_trace_file, read_trace, write_trace
from hybrid.lab.kept_results import KeptResults
from hybrid.machine.profile import cached_profile

ROOT = Path(__file__).parent.parent
FORMATS_OF_TRACES = [known.name for known in FORMATS if known.write and known.name not in ("csv", "parquet")]

COUNT = 300
FEW = 100  # of each of many formats
BITS = (
    b"", b",", b"\n", b"\r", b'"', b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"-1", b"1e999", b"nan", b"Infinity", b"null",
    b"[]", b"{}", b"[[", b"1" * 30, b"9" * 5000, b"1099511627775", b"9223372036854775808", b"0.5", b"true", b"\\ud800",
)  # fmt: skip


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few places cut out, replaced, doubled or cut off; numbers more often than other bytes."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        numbers = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
        if numbers and chance.random() < 0.5:
            at = chance.choice(numbers)
        length = chance.choice((0, 1, 1, 4, 40))
        kind = chance.random()
        if kind < 0.5:
            data = data[:at] + chance.choice(BITS) + data[at + length :]
        elif kind < 0.7:
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        elif kind < 0.9:
            data = data[:at] + data[at : at + 40] + data[at:]
        else:
            data = data[:at]
    return data


def replayed(path: Path) -> None:
    grouped = calls(read_trace(path, *((2, 8) if path.name == "answers.json" else ())))
    replay(grouped, Setting(1, 1, "LRU"))


def replayed_as(name: str) -> Callable[[Path], None]:
    """Read as this format, whatever the content looks like."""

    def read(path: Path) -> None:
        trace = open_trace_file(path, 4, 8, wanted=known_format(name)).trace
        replay(calls(trace), Setting(1, 1, "LRU"))

    return read


def drawn(path: Path) -> None:
    rows = read_results(path, read_text(path)).rows
    if "layer_hits" in rows[0]:
        layers_of_policies(path, rows, None)


def warm(path: Path) -> None:
    read_warm(path, "mark", SHAPE)


def profiled(path: Path) -> None:
    """A damaged profile is no error: the machine is measured again."""
    cached_profile(path.parent, "mutant", "key", lambda: (_ for _ in ()).throw(HybridError("measured")))


SHAPE = SimpleNamespace(layers=range(4), experts=8, top_k=2)
MACHINE = {
    "version": 1,
    "experts": {"key": {"rows": [1, 2], "threads": [0.1, 0.2], "device": [0.1, 0.2], "device_start": 0.1}},
    "link": dict.fromkeys(("to_device", "to_host", "to_device_beside", "reads", "reads_beside", "latency"), 1.5),
}
READERS: dict[str, Callable[[Path], object]] = {
    "trace.csv": replayed,
    "trace.parquet": replayed,
    **{f"trace.{name}": replayed_as(name) for name in FORMATS_OF_TRACES},
    "sglang_per_token.pt": replayed,
    "sglang_per_pass.pt": replayed,
    "sglang_stat.pt": replayed,
    "vllm.json": replayed,
    "answers.json": replayed,
    "results.json": drawn,
    "results.csv": drawn,
    "kept.jsonl": drawn,
    "again.jsonl": lambda path: KeptResults(path),
    "hits.csv": lambda path: read_hits(path, read_text(path)),
    "times.csv": lambda path: read_times(path, read_text(path)),
    "warm.json": warm,
    "machine-mutant.json": profiled,
    "bench.json": lambda path: simulate._read_bandwidth(path),
    "prompts.json": read_prompts,
    "prompts.jsonl": read_prompts,
    "prompts.txt": read_prompts,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A sound file of every kind."""
    folder = tmp_path_factory.mktemp("originals")
    trace = random_trace(1, steps=6, layers=4, experts=8, top_k=2)
    write_trace(folder / "trace.csv", trace)
    if importlib.util.find_spec("pyarrow"):
        write_trace(folder / "trace.parquet", trace)
    for name in FORMATS_OF_TRACES:
        if importlib.util.find_spec("pyarrow") or "parquet" not in name:
            write_trace(folder / f"trace.{name}", trace, known_format(name))
    for path in (ROOT / "tests" / "traces" / "others").glob("*.pt"):
        (folder / path.name).write_bytes(path.read_bytes())
    ids = [[[1, 2], [3, 4]], [[5, 6], [7, 0]]]
    (folder / "vllm.json").write_text(json.dumps({"choices": [{"routed_experts": ids}], "prompt_routed_experts": ids}))
    about = {"routed_experts": "AQAAAAIAAAADAAAABAAAAA==", "prompt_tokens": 1, "completion_tokens": 1}
    (folder / "answers.json").write_text(json.dumps({"meta_info": about}))
    grid = ["--trace", str(folder / "trace.csv"), "--nblocks", "2,4", "--nways", "2", "--policy", "LRU,bypass-Belady"]
    rates = ["--pcie-gbps", "25", "--device-gbps", "1000", "--cpu-gbps", "100", "--expert-mb", "100", "--workers", "1"]
    for form in ("csv", "json"):
        kept = ["--results", str(folder / "kept.jsonl")]
        result = CliRunner().invoke(simulate.app, [*grid, *rates, *kept, "--output", form])
        (folder / f"results.{form}").write_text(result.stdout)
    (folder / "again.jsonl").write_bytes((folder / "kept.jsonl").read_bytes())
    (folder / "hits.csv").write_text("step,layer,calls,hits,loading,misses,evictions\n0,0,2,0,0,2,0\n0,1,2,1,0,1,0\n")
    (folder / "times.csv").write_text(
        "step,prompt_rows,attention_ms,moe_ms,total_ms,copy_ms\n0,8,9,9,9,\n1,0,1,4,2,1\n"
    )
    write_warm(folder / "warm.json", "mark", SHAPE, [0, 9, 31])  # type: ignore[arg-type]
    (folder / "machine-mutant.json").write_text(json.dumps(MACHINE))
    (folder / "bench.json").write_text('{"machine": {"read_gbps": 50.5, "cpu": "a"}, "results": []}')
    (folder / "prompts.json").write_text('{"prompts": ["a\\nb", {"prompt": "c"}]}')
    (folder / "prompts.jsonl").write_text('"a"\n{"prompt": "b"}\n')
    (folder / "prompts.txt").write_text("one\r\ntwo\n[three]\n")
    return folder


@pytest.mark.parametrize("name", READERS)
def test_mutants_are_read_or_refused(originals: Path, tmp_path: Path, name: str) -> None:
    if not (originals / name).exists():
        pytest.skip("parquet needs pyarrow, of the extra [research]")
    sound, path = (originals / name).read_bytes(), tmp_path / name
    chance = random.Random(zlib.crc32(name.encode()))
    path.write_bytes(sound)
    READERS[name](path)
    wrong: list[str] = []
    refused = 0
    for _ in range(FEW if name.partition(".")[2] in (*FORMATS_OF_TRACES, "pt") else COUNT):
        mutant = mutate(sound, chance)
        path.write_bytes(mutant)
        try:
            READERS[name](path)
        except (HybridError, CacheError) as error:
            refused += 1
            if "\n" in str(error):
                wrong.append(f"two lines: {error}")
        except Exception as error:
            wrong.append(f"{error!r} of {mutant[:200]!r}")
    assert not wrong, f"{len(wrong)}: {wrong[0]}"
    assert refused or name in ("prompts.txt", "again.jsonl")  # lines that are none are left out
