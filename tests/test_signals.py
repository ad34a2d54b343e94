"""Signals at the worst moments: what was measured is written whole, once, and no file is lost to a second one."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import PATIENCE

from hybrid.commands.signals import Interruptible, Terminated, ending_signals

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    before = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == before


def raised(number: int) -> None:
    signal.raise_signal(number)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_interrupts_the_body_alone(number: int) -> None:
    error = KeyboardInterrupt if number == signal.SIGINT else Terminated
    done: list[str] = []
    with pytest.raises(error), Interruptible() as interruptible:
        try:
            interruptible.run(lambda: raised(number))
        finally:
            for other in ALL:
                raised(other)
            done.append("cleaned up")
    assert done == ["cleaned up"]


def test_a_signal_before_the_body_is_raised_when_it_begins() -> None:
    with pytest.raises(Terminated), Interruptible() as interruptible:
        raised(signal.SIGTERM)
        interruptible.run(lambda: pytest.fail("it began"))


def test_a_signal_after_the_body_is_raised_at_the_end() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), Interruptible() as interruptible:
        done.append(interruptible.run(lambda: "result"))
        raised(signal.SIGINT)
        done.append("written")
    assert done == ["result", "written"]


def test_a_body_may_go_on_after_ctrl_c_but_not_after_sigterm() -> None:
    def chat() -> str:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            try:
                raised(number)
            except KeyboardInterrupt:
                continue
        return "went on"

    with pytest.raises(Terminated), Interruptible() as interruptible:
        interruptible.run(chat)


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` and the & of a shell leave it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals():
            raised(signal.SIGHUP)
            with pytest.raises(Terminated):
                raised(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def in_a_run(place: str, *numbers: signal.Signals) -> str:
    """A program that runs with arguments, and sends itself signals each time it comes to a place."""
    module, owner, name = place.rsplit(".", 2)
    return f"""
import signal, sys
from hybrid.commands.console import run_app
from hybrid.commands.run import app
import {module} as module

owner = getattr(module, {owner!r})
function = getattr(owner, {name!r})

def interrupted(*args, **kwargs):
    for number in {[int(number) for number in numbers]}:
        signal.raise_signal(number)
    result = function(*args, **kwargs)
    for number in {[int(number) for number in numbers]}:
        signal.raise_signal(number)
    return result

setattr(owner, {name!r}, interrupted)
run_app(app, "run", sys.argv[1:])
"""


WORST = [
    "hybrid.commands.outputs.Outputs._trace",  # while the file is opened
    "hybrid.commands.outputs.Outputs._write",  # when all is to be written
    "gpu_cache.trace_writer.TraceWriter.close",
    "hybrid.files.writing.NewFile.commit",  # before and after the file has its name
    "hybrid.files.writing.NewFile._replace",
    "hybrid.serving.loop.Loop.run",  # the observer is set, and taken away
]


@pytest.mark.parametrize("place", WORST)
def test_signals_while_files_are_written_lose_nothing(tmp_path: Path, place: str) -> None:
    """All three, twice over, before and after; the run ends as interrupted, with every file whole."""
    code = in_a_run(place, *ALL, *ALL)
    flags = ["--prompt", "Once upon a time", "--max-tokens", "2", "--hide-resp", "--max-seq-len", "64"]
    files = ["--trace", str(tmp_path / "trace.csv"), "--breakdown-csv", str(tmp_path / "b.csv")]
    result = subprocess.run(
        [sys.executable, "-c", code, *flags, *files], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 130 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("interrupted")
    assert {path.name for path in tmp_path.iterdir()} == {"trace.csv", "b.csv"}, result.stderr
    rows = list(csv.DictReader((tmp_path / "trace.csv").open()))
    if place not in (WORST[0], WORST[-1]):  # where the run ended before it began
        assert {row["layer"] for row in rows} == {str(layer) for layer in range(16)}


def test_a_summary_of_an_interrupted_run_stands_on_lines_of_its_own(tmp_path: Path) -> None:
    code = in_a_run("hybrid.serving.recorder.Recorder.__call__")
    code = code.replace("def interrupted", "import os, threading\n\ndef interrupted").replace(
        "    result = function", "    os.kill(os.getpid(), signal.SIGINT)\n    result = function", 1
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--prompt", "Once", "--max-tokens", "400", "--ignore-eos"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert result.returncode == 130, result.stderr
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("interrupted; ") and any(line.startswith("decode ") for line in lines)
    assert result.stdout == "" or result.stdout.endswith("\n")


def test_what_cannot_be_told_changes_no_exit_code() -> None:
    """/dev/full as stderr and stdout: the error of a flag is 2, help and version are 2 because nobody reads them."""
    with open("/dev/full", "w") as full:
        for flags, streams in ((["--threads", "0"], {"stderr": full}), (["--help"], {"stdout": full})):
            command = [sys.executable, "-m", "hybrid.main", *flags]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
            result = subprocess.run(command, text=True, check=False, timeout=PATIENCE, **options)  # type: ignore[call-overload]
            assert result.returncode == 2, result
            assert result.stderr is None or (result.stderr.count("\n") == 1 and "No space left" in result.stderr)


STARTED = """
import signal, sys

class Signal:
    def find_spec(name, path, target=None):
        if name == module:
            del sys.meta_path[0]
            signal.raise_signal(int(number))

module, number, program, *flags = sys.argv[1:]
sys.meta_path.insert(0, Signal)
sys.argv = ["hybrid", *flags]
if program == "hybrid.cli":
    from hybrid.cli import main
    main()
else:
    from runpy import run_module
    run_module(program, run_name="__main__")
"""
SERVE, RUN = ("hybrid.serve", "--port", "0"), ("hybrid.main", "--prompt", "Once", "--max-tokens", "1")


@pytest.mark.parametrize(
    ("module", "program"),
    [
        ("hybrid.commands.console", ("hybrid.cli", "serve", "--port", "0")),
        ("hybrid.commands.serve", ("hybrid.cli", "serve", "--port", "0")),
        ("typer", ("hybrid.cli", "run")),
        ("hybrid.commands.console", RUN),
        ("hybrid.commands.run", RUN),
        ("typer", SERVE),
        ("hybrid.server.log", SERVE),
        ("fastapi", SERVE),
        ("pydantic.main", SERVE),
        ("hybrid.server.service", SERVE),
        ("hybrid.serving.llm", SERVE),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_starts_ends_quietly(module: str, program: tuple[str, ...], number: int) -> None:
    if "hybrid.serve" in program:
        pytest.importorskip("fastapi")
    command = [sys.executable, "-c", STARTED, module, str(int(number)), *program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_within_a_text_that_is_executed_is_an_exit_code_too() -> None:
    """As that of a dataclass; Python would end the process by the signal."""
    code = """
from hybrid.commands.console import exit_codes
with exit_codes():
    exec("import signal; signal.raise_signal(signal.SIGINT)")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (130, "interrupted; every file that was written is whole\n")


def test_a_hang_up_drains_a_server() -> None:
    pytest.importorskip("uvicorn")
    code = (
        "import runpy, signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "runpy.run_module('hybrid.serve', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "--port", "0", "--log", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not any("ready at" in line for line in lines):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE) == 0
        assert "the server has ended" in process.stderr.read()
