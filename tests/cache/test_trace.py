"""Traces: what is written is read again, calls are distinct and in order, and a file that is wrong says where."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing import random_trace

from gpu_cache.errors import CacheError
from gpu_cache.trace import COLUMNS, NEXT_EXPERT, Trace, calls, make_trace
from gpu_cache.traces import known_format, read
from gpu_cache.traces.base import Sizes
from hybrid.errors import ConfigError
from hybrid.files.traces import open_trace, read_trace, write_trace

HEADER = ",".join(COLUMNS)


def same(a: Trace, b: Trace) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in (*COLUMNS, NEXT_EXPERT))


def needs(suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow, of the extra [research]")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("early", [False, True])
def test_a_trace_that_is_written_is_read_again_bit_for_bit(tmp_path: Path, suffix: str, early: bool) -> None:
    needs(suffix)
    trace, path = random_trace(1, tokens=3), tmp_path / f"trace{suffix}"
    if early:
        trace = replace(trace, next_expert=np.arange(len(trace)) % (trace.experts + 1) - 1)
    write_trace(path, trace)
    again = read_trace(path)
    assert same(trace, again) and (again.layers, again.experts) == (trace.layers, trace.experts)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_writer_keeps_what_it_was_given_though_the_arrays_change(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    path = tmp_path / f"trace{suffix}"
    experts, scores = np.array([[3, 1], [2, 3]], np.int32), np.array([[0.7, 0.3], [0.1, 0.9]], np.float32)
    with open_trace(path, pytest.fail) as writer:
        writer.write(0, 0, [0, 1], [5, 9], experts, scores)
        experts[:], scores[:] = 0, 0
        assert not path.exists()
    trace = read_trace(path)
    assert trace.expert.tolist() == [3, 1, 2, 3] and trace.rank.tolist() == [0, 1, 0, 1]
    assert trace.position.tolist() == [5, 5, 9, 9] and trace.score[3] == np.float32(0.9)
    assert list(calls(trace)) == [(0, 0, [3, 1, 2], [np.float32(0.9), np.float32(0.3), np.float32(0.1)])]


def test_a_run_that_is_interrupted_leaves_a_whole_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    with pytest.raises(KeyboardInterrupt), open_trace(path, pytest.fail) as writer:
        writer.write(0, 0, [0], [0], [[1]], [[1.0]])
        raise KeyboardInterrupt
    assert path.read_text() == f"{HEADER}\n0,0,0,0,0,1,1.0\n" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_warns_once_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    warnings: list[str] = []
    monkeypatch.setattr(os, "fsync", full)
    with open_trace(tmp_path / "trace.csv", warnings.append) as writer:
        writer.write(0, 0, [0], [0], [[1]], [[1.0]])
    writer.write(1, 0, [0], [0], [[1]], [[1.0]])
    writer.close()
    assert len(warnings) == 1 and "No space left" in warnings[0] and not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory .*missing"):
        open_trace(tmp_path / "missing" / "trace.csv", pytest.fail)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 5))
def test_calls_are_what_plain_loops_say(seed: int, tokens: int, top_k: int) -> None:
    trace = random_trace(seed, steps=3, layers=2, experts=6, top_k=top_k, tokens=tokens)
    wanted: dict[tuple[int, int], dict[int, float]] = {}
    for step, layer, expert, score in zip(trace.step, trace.layer, trace.expert, trace.score, strict=True):
        group = wanted.setdefault((int(step), int(layer)), {})
        group[int(expert)] = max(group.get(int(expert), 0.0), float(score))
    assert list(calls(trace)) == [(*key, list(group), list(group.values())) for key, group in wanted.items()]


def test_rows_of_a_step_may_come_token_by_token() -> None:
    rows = {"step": [0] * 4, "sequence": [0, 0, 1, 1], "position": [0] * 4, "layer": [0, 1, 0, 1], "rank": [0] * 4}
    trace = make_trace({**rows, "expert": [3, 2, 1, 2], "score": [0.5, 0.25, 1, 0.75]})
    grouped = calls(trace)
    assert list(grouped) == [(0, 0, [3, 1], [0.5, 1.0]), (0, 1, [2], [0.75])]
    assert grouped.key.tolist() == [3, 1, 6] and (len(grouped), grouped.total, grouped.steps) == (2, 3, 1)


def test_the_digest_names_the_calls() -> None:
    digests = {calls(random_trace(seed)).digest() for seed in (1, 1, 2)}
    assert len(digests) == 2 and all(len(digest) == 16 for digest in digests)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEADER, ["no rows"]),
        (f"{HEADER}\n", ["no rows"]),
        ("", ["is empty"]),
        ("step,layer,expert\n0,0,0\n", ["no column sequence, position, rank, score"]),
        (f"{HEADER}\n1,0,0,0,0,1,1\n0,0,0,0,0,1,1\n", ["row 2", "unsorted step 0"]),
        (f"{HEADER}\n0,0,0,0,0,8,1\n", ["row 1", "unknown expert 8", "0 to 7"]),
        (f"{HEADER}\n0,0,0,0,0,-1,1\n", ["unknown expert -1"]),
        (f"{HEADER}\n0,0,0,9,0,1,1\n", ["unknown layer 9", "0 to 3"]),
        (f"{HEADER}\n0,0,0,0,0,1,nan\n", ["row 1", "score", "finite"]),
        (f"{HEADER}\n0,0,0,0,0,1,1\n0,0,0", ["whole trace"]),
        (f"{HEADER}\n0,0,0,0,0,one,1\n", ["whole trace", "one"]),
        (f"{HEADER}\n0,0,0,0,0,99999999999999999999,1\n", ["whole trace"]),
        (f"{HEADER}\n0.5,0,0,0,0,1,1\n", ["whole trace"]),
    ],
)
def test_a_csv_that_is_wrong_says_where(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(CacheError) as error:
        read_trace(path, layers=4, experts=8)
    line = str(error.value)
    assert all(word in line for word in [*words, str(path)]) and "\n" not in line, line


def test_a_parquet_that_is_cut_off_or_lacks_a_column_says_so(tmp_path: Path) -> None:
    needs(".parquet")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "trace.parquet"
    write_trace(path, random_trace(1))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError, match="whole trace"):
        read_trace(path)
    pyarrow.parquet.write_table(pyarrow.table({"step": [0]}), path)
    with pytest.raises(CacheError, match="no column sequence"):
        read_trace(path)
    rows = pyarrow.table({name: [0] for name in COLUMNS})
    pyarrow.parquet.write_table(rows.append_column("step", [[0]]), path)
    with pytest.raises(CacheError, match="the column step twice"):
        read_trace(path)
    pyarrow.parquet.write_table(pyarrow.table({name: ["a"] for name in COLUMNS}), path)
    with pytest.raises(CacheError, match="whole trace"):
        read_trace(path)


def test_a_trace_is_known_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    needs(".parquet")
    trace = random_trace(1, tokens=3)
    for suffix in (".csv", ".parquet"):
        write_trace(tmp_path / f"trace{suffix}", trace)
        assert same(trace, read_trace((tmp_path / f"trace{suffix}").rename(tmp_path / f"{suffix[1:]}.txt")))
    with pytest.raises(ConfigError, match="no such file"):
        read_trace(tmp_path / "trace.csv")


CHOICES = """Index,Block_0,Block_0,Block_1,Block_1
0,,,,
1,2,5,0,7
2,2,3,6,7
"""


def test_a_byte_order_mark_is_no_part_of_a_header(tmp_path: Path) -> None:
    path, choices = tmp_path / "trace.csv", tmp_path / "expert_choices.csv"
    path.write_text(f"{HEADER}\r\n0,0,0,0,0,1,1.0\r\n", encoding="utf-8-sig")
    choices.write_text(CHOICES, encoding="utf-8-sig")
    assert read_trace(path).expert.tolist() == [1] and read_trace(choices).layers == 2


@pytest.mark.parametrize(("layers", "experts"), [(0, None), (None, 1 << 63), (-5, 8), (1 << 40, None)])
def test_numbers_that_no_model_has_are_refused(tmp_path: Path, layers: int | None, experts: int | None) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEADER}\n0,0,0,0,0,1,1.0\n")
    with pytest.raises(CacheError, match="are no model's"):
        read_trace(path, layers, experts)
    path.write_text(f"{HEADER}\n0,0,0,0,0,{1 << 40},1.0\n")
    with pytest.raises(CacheError, match="unknown expert"):
        read_trace(path)


def test_expert_choices_of_the_seed_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "expert_choices.csv"
    path.write_text(CHOICES)
    trace = read_trace(path, experts=8)
    assert [group[:3] for group in calls(trace)] == [(0, 0, [2, 5]), (0, 1, [0, 7]), (1, 0, [2, 3]), (1, 1, [6, 7])]
    assert trace.rank.tolist() == [0, 1] * 4 and set(trace.score.tolist()) == {0.5} and trace.layers == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no expert_choices.csv"),
        ("Index,Block_0,Block_1,Block_1\n", "no expert_choices.csv"),
        ("Index,Block_0,Block_0\n", "no rows"),
        (CHOICES + "3,1,x,2,3\n", "line 5"),
        (CHOICES + "3,1\n", "line 5 has 1"),
        (CHOICES + "3,1,2,3,9\n", "unknown expert 9"),
    ],
)
def test_expert_choices_that_are_wrong_say_where(text: str, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        read(io.BytesIO(text.encode()), "expert_choices.csv", Sizes(experts=8), known_format("expert-choices"))


def test_libcachesim_gets_a_line_a_call() -> None:
    file, trace = io.BytesIO(), random_trace(1, steps=1, layers=2)
    write = known_format("libcachesim").write
    assert write is not None
    write(file, trace, lambda done, total: None)
    keys = calls(trace).key.tolist()
    assert file.getvalue().decode() == "time,object,size\n" + "".join(
        f"{i // 2},{key},1\n" for i, key in enumerate(keys)
    )
