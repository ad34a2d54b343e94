"""The load on a server: what is asked when, and what is told of the answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import load  # noqa: E402
import mixed  # noqa: E402
import serve  # noqa: E402
import soak  # noqa: E402
from server_rig import running  # noqa: E402

from hybrid import LLM  # noqa: E402

MOONCAKE = [
    {"timestamp": 0, "input_length": 700, "output_length": 64, "hash_ids": [0, 1]},
    {"timestamp": 4000, "input_length": 1024, "output_length": 128, "hash_ids": [0, 2]},
    {"timestamp": 9000, "input_length": 100, "output_length": 1, "hash_ids": [3]},
]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:04.4799600,32,8\n"


@pytest.fixture(scope="module")
def server():
    with running(LLM(max_seq_len=256, max_batch=4, threads=1)) as server:
        yield server


@pytest.mark.parametrize("flags", [["--users", "3"], ["--rate", "200"], ["--users", "2", "--shared", "32"]])
def test_every_request_is_answered_and_told(server, tmp_path, capsys, flags) -> None:
    output = tmp_path / "results.json"
    serve.main(
        [f"a={server.address}", f"b={server.address}", "--requests", "4", "--rounds", "2", "--prompt", "40",
         "--answer", "6", "--first-limit", "60", "--gap-limit", "60", "--output", str(output), *flags]
    )  # fmt: skip
    found = json.loads(output.read_text())["results"]
    assert list(found) == ["a", "b"]
    for one in found.values():
        assert (one["asked"], one["failed"], one["errors"]) == (8, 0, [])
        assert one["tokens_per_second"] > 0 and one["good_per_second"] > 0
        assert one["first"]["p50"] <= one["first"]["p99"] <= one["whole"]["p99"]
        assert one["prompt_tokens"] >= 8 * 40 and one["outside"] is not None
    if "--shared" in flags:
        assert found["b"]["cached_share"] > 0.3
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and len({len(line) for line in printed}) == 1


def test_seconds_outside_of_kernels_are_those_of_a_token() -> None:
    measured = serve.Measured()
    for kernels in (1.5, 2.0):
        measured.add([load.Answer(10.0, ended=12.0, tokens=4), load.Answer(11.0, ended=13.0, tokens=6)], kernels)
    assert measured.summary(1, 1)["outside"] == (6 - 3.5) / 20
    measured.add([load.Answer(0.0, ended=1.0, tokens=1)], None)  # of a server that does not tell
    assert measured.summary(1, 1)["outside"] is None


def test_what_fails_is_counted_and_said(server, tmp_path, capsys) -> None:
    serve.main([server.address, "--requests", "2", "--rounds", "1", "--prompt", "900", "--answer", "4"])
    printed = capsys.readouterr().out
    assert "server: 400 " in printed and "raise max_seq_len" in printed
    row = [cell.strip() for cell in printed.splitlines()[2].split("|")]
    assert row[1:4] == ["server", "2", "2"] and row[6] == "-"


def test_a_recorded_load_of_mooncake(tmp_path) -> None:
    path = tmp_path / "conversation.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in MOONCAKE))
    asks = load.recorded(path, 9, 32, 2.0)
    assert [ask.at for ask in asks] == [0.0, 2.0, 4.5]
    assert [ask.max_tokens for ask in asks] == [2, 4, 1]
    first, second, third = (ask.prompt.split() for ask in asks)
    assert [len(first), len(second), len(third)] == [22, 32, 3]
    assert first[:16] == second[:16] and first[16:22] != second[16:22]
    assert len(load.recorded(path, 2, 1, 1.0)) == 2


def test_a_recorded_load_of_azure(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    asks = load.recorded(path, 9, 2, 1.0)
    assert [(len(ask.prompt.split()), ask.max_tokens, ask.at) for ask in asks] == [(24, 5, 0.0), (16, 4, 0.5)]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "{}\n"), ("a.jsonl", "[1]\n"), ("a.csv", "a,b\n1,2\n")])
def test_another_file_is_refused_in_one_line(server, tmp_path, capsys, name, text) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        serve.main([server.address, "--trace", str(path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and str(path) in error and "of Mooncake (.jsonl) or of Azure (.csv)" in error


def test_no_server_is_said_in_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main(["http://127.0.0.1:9", "--requests", "1"])
    assert ended.value.code == 2 and "is no server that speaks OpenAI's API" in capsys.readouterr().err


def test_arrivals_at_random_keep_their_rate() -> None:
    asks = load.poisson(load.equal_asks(2000, 4, 1, 0, 0), 50.0, 1)
    assert 35 < asks[-1].at < 45 and all(a.at < b.at for a, b in zip(asks, asks[1:], strict=False))


def test_a_soak_tells_growth_and_answers_that_differ() -> None:
    found = soak.Soak()
    found.samples = [soak.Sample(float(at), 100.0 + 30 * (at >= 60), 6, 40 + at // 60, 2) for at in range(0, 90, 10)]
    found.answers.update({"whole 200": 5, "whole 500": 2, "dropped no answer": 3})
    found.differing = 1
    assert found.growth() == {"resident_mb": 30.0, "threads": 0, "files": 1, "processes": 0}
    lines = found.wrong()
    assert [line.split()[0] for line in lines] == ["resident_mb", "files", "2", "1"] and "whole 500" in lines[2]
    found.samples, found.differing = [soak.Sample(1.0, 100.0, 6, 40, 2)] * 6, 0
    del found.answers["whole 500"]
    assert found.wrong() == []


def test_a_soak_asks_all_apis_and_samples_the_process(server) -> None:
    found = soak.Soak()
    options = argparse.Namespace(seed=1, whole=0.7, minutes=0.001, at_once=4, pause=0.0)
    asyncio.run(found.load(("127.0.0.1", server.port), os.getpid(), "tiny", options))
    assert sum(found.answers.values()) == soak.PART and found.answers["whole 200"] > 5 and found.differing == 0
    (sample,) = found.samples
    assert sample.resident_mb > 10 and sample.threads > 2 and sample.files > 5 and sample.processes >= 1
    assert soak.table(found.samples).count("\n") >= 2


def test_visits_are_the_same_for_a_seed_and_text_is_one_however_it_was_cut() -> None:
    first, again = (list(islice(mixed.visits(4, 0.2, "tiny"), 50)) for _ in range(2))
    assert first == again and {visit.manner for visit in first} == {mixed.WHOLE, *mixed.LEAVING}
    assert len({visit.path for visit in first}) == 6
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    pieces = [b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % part for part in (b"a", b"bc")]
    assert mixed.said(head + b"".join(pieces) + b"data: [DONE]\n\n") == "abc" and mixed.status(head) == 200
    assert mixed.said(head + b'{"content": [{"type": "text", "text": "abc"}]}') == "abc" and mixed.status(b"") == 0
