"""The command line: what goes to stdout, what to stderr, which exit code, and which files are left."""

from __future__ import annotations

import csv
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from dummy_engine import DummyEngine
from dummy_tokenizer import BYTES, SPECIAL
from test_report import PATIENCE, interrupted
from typer.testing import CliRunner

from hybrid import LLM
from hybrid.commands import prompts
from hybrid.commands.conversation import Conversation
from hybrid.commands.prompts import DEFAULT_PROMPT, gather_prompts, read_prompts
from hybrid.commands.run import app
from hybrid.config import EngineConfig
from hybrid.core import SamplingParams
from hybrid.serving.recorder import BREAKDOWN_COLUMNS
from hybrid.text.chat_template import ChatTemplate

ROOT = Path(__file__).parent.parent
SCRIPT = [*"Hé!".encode(), SPECIAL]


class Loaded:
    """The dummy model that the command finds, whatever it asks for."""

    def __init__(self) -> None:
        self.config = EngineConfig()
        self.fail = lambda batch: None
        self.prompts: list[bytes] = []
        self.lengths: set[int] = set()

    def open(self, config, progress=None, notice=None) -> LLM:
        self.config = config
        engine = DummyEngine(fail=self.fail, next_token=self.answer, max_seq_len=128, kv_token_budget=512)
        return LLM.from_engine(engine, BYTES, frozenset([SPECIAL]), ChatTemplate("[{{ messages[-1].content }}]"))

    def answer(self, tokens: list[int]) -> int:
        """SCRIPT after any prompt: prompts end with a dot or a bracket, which SCRIPT does not hold."""
        end = max((i for i, token in enumerate(tokens) if token in b".]"), default=0)
        return SCRIPT[min(len(tokens) - end - 1, len(SCRIPT) - 1)]


@pytest.fixture
def loaded(monkeypatch) -> Loaded:
    found = Loaded()
    monkeypatch.setattr(LLM, "from_config", found.open)
    return found


def invoke(*arguments: object, stdin: str | bytes = ""):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: object, stdin: str | bytes = "") -> str:
    """The one line that a refused call prints."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: ")
    return line


def test_stdout_is_the_text_and_stderr_the_summary(loaded) -> None:
    result = invoke("--prompt", "Say.")
    assert (result.exit_code, result.stdout) == (0, "Hé!\n")
    for word in ("load", "prompt", "decode", "first token", "tokens/s", "dummy", "1 thread", "mapped"):
        assert word in result.stderr


def test_many_prompts_are_answered_in_order_and_repeated_or_cut(loaded, tmp_path) -> None:
    assert invoke("--prompt", "a.", "--prompt", "b.").stdout == "Hé!\nHé!\n"
    assert invoke("--prompt", "a.", "--n-prompts", 3).stdout == "Hé!\n" * 3
    file = tmp_path / "prompts.txt"
    file.write_text("one.\n\n  \ntwo.\r\nthree.\n")
    assert invoke("--prompt-path", file, "--n-prompts", 2).stdout == "Hé!\nHé!\n"
    assert gather_prompts([], file, None) == ["one.", "two.", "three."]
    assert gather_prompts([], file, 5) == ["one.", "two.", "three.", "one.", "two."]


def test_prompt_files_may_be_json(tmp_path) -> None:
    named, unnamed, brace = tmp_path / "p.json", tmp_path / "prompts", tmp_path / "brace.txt"
    for file in (named, unnamed):
        file.write_text('{"prompts": ["a\\nb", "c"]}')
        assert read_prompts(file) == ["a\nb", "c"]
    brace.write_text("{not json\n")
    assert read_prompts(brace) == ["{not json"]


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.jsonl", '"a\\nb"\n\n{"prompt": "c"}\r\n{"text": "d", "id": 1}', ["a\nb", "c", "d"]),
        ("p.ndjson", '{"prompt": "c"}', ["c"]),
        ("p.JSONL", '"a"', ["a"]),
        ("p.json", '["a", {"prompt": "b"}]', ["a", "b"]),
        ("p.json", '{"prompts": [{"prompt": "a"}, "b"]}', ["a", "b"]),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        ("p", '\ufeff["a",\n "b"]', ["a", "b"]),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        ("p.txt", '{"prompt": "a"}\nand so on\n', ['{"prompt": "a"}', "and so on"]),
        ("p.txt", '{"name": "a"}\n', ['{"name": "a"}']),
        ("p.txt", "[1] a footnote\n", ["[1] a footnote"]),
        ("p.txt", "\ufeffone\r\ntwo\r\n", ["one", "two"]),
    ],
)
def test_prompts_are_text_or_json_of_every_usual_form(tmp_path, name: str, text: str, prompts: list[str]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == prompts


def test_line_ends_of_windows_are_no_part_of_a_prompt(loaded) -> None:
    for data, prompt in ((b"One.\r\n", "One."), (b"One,\r\ntwo.\r\n\r\n", "One,\ntwo."), (b"a\rb.\n", "a\rb.")):
        assert json.loads(invoke("--json", stdin=data).stdout)["completions"][0]["prompt"] == prompt


def test_prompts_of_a_pipe_are_read_and_endless_ones_refused(loaded, monkeypatch) -> None:
    out, into = os.pipe()
    os.write(into, b"one.\ntwo.\n")
    os.close(into)
    assert invoke("--prompt-path", f"/dev/fd/{out}").stdout == "Hé!\nHé!\n"
    os.close(out)
    monkeypatch.setattr(prompts, "PROMPTS", replace(prompts.PROMPTS, limit=1000))
    assert "longer than" in refused("--prompt-path", "/dev/zero")
    assert "standard input is longer" in refused(stdin="x" * 1001)


def test_json_and_prompts_survive_every_locale(tmp_path) -> None:
    flags = ["-m", "hybrid.main", "--prompt", "caf\u00e9", "--max-tokens", "1", "--json"]
    for more in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        result = command(*flags, env={**os.environ, **more})
        assert json.loads(result.stdout)["completions"][0]["prompt"] == "caf\u00e9", result.stderr


def test_standard_input_is_the_prompt(loaded) -> None:
    result = invoke("--json", stdin="Line one,\nline two.\n")
    assert json.loads(result.stdout)["completions"][0]["prompt"] == "Line one,\nline two."


def test_without_any_prompt_a_story_begins(loaded, monkeypatch) -> None:
    monkeypatch.setattr("hybrid.commands.run.DEFAULT_PROMPT", "Once.")
    result = invoke(stdin="  \n")
    assert result.stdout == "Hé!\n" and "Once." in result.stderr.splitlines()[0]
    assert DEFAULT_PROMPT.isprintable()


def test_the_text_can_be_hidden(loaded) -> None:
    result = invoke("--prompt", "Say.", "--hide-resp")
    assert result.stdout == "" and "tokens/s" in result.stderr


def test_chat_applies_the_template_to_every_prompt(loaded) -> None:
    result = invoke("--chat", "--json", "--prompt", "a", "--prompt", "b")
    report = json.loads(result.stdout)
    assert [bytes(c["prompt_token_ids"]) for c in report["completions"]] == [b"[a]", b"[b]"]
    assert [c["text"] for c in report["completions"]] == ["Hé!", "Hé!"]


def test_json_is_one_object_on_stdout(loaded) -> None:
    result = invoke("--prompt", "Say.", "--json")
    report = json.loads(result.stdout)
    assert set(report) == {"completions", "summary", "cache", "device", "plan", "memory", "machine"}
    assert report["cache"] is None
    assert report["completions"][0]["finish_reason"] == "stop"
    summary = report["summary"]
    assert (summary["prompt_tokens"], summary["decode_tokens"], summary["steps"]) == (4, 4, 5)
    assert summary["decode_tokens_per_second"] > 0 and summary["first_token_seconds"] > 0
    assert report["machine"]["isas"]


def test_the_breakdown_has_a_row_for_every_step(loaded, tmp_path) -> None:
    file = tmp_path / "steps.csv"
    file.write_text("step,rows\n0,1\n")
    assert invoke("--prompt", "A longer one.", "--breakdown-csv", file).exit_code == 0
    rows = list(csv.DictReader(file.open()))
    assert tuple(rows[0]) == BREAKDOWN_COLUMNS
    assert [(r["step"], r["prompt_rows"], r["decode_rows"]) for r in rows[:3]] == [
        ("0", "8", "0"),
        ("1", "5", "0"),
        ("2", "0", "1"),
    ]
    for row in rows:
        parts = sum(float(row[f"{name}_ms"]) for name in ("attention", "moe", "head", "other", "sampling"))
        assert parts == pytest.approx(float(row["total_ms"]), abs=1e-3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["steps.csv"]


def test_an_error_leaves_the_old_breakdown_as_it_was(loaded, tmp_path) -> None:
    file = tmp_path / "steps.csv"
    file.write_text("step,rows\n0,1\n")
    refused("--prompt", "." * 129, "--breakdown-csv", file)
    assert file.read_text() == "step,rows\n0,1\n"


def test_ctrl_c_ends_with_130_and_leaves_files_whole(loaded, tmp_path) -> None:
    def fail(batch) -> None:
        if batch.positions[0] == 6:
            raise KeyboardInterrupt

    loaded.fail = fail
    file = tmp_path / "steps.csv"
    result = invoke("--prompt", "Say.", "--breakdown-csv", file)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("interrupted")
    assert len(list(csv.DictReader(file.open()))) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["steps.csv"]


def test_cache_flags_are_checked_and_said_to_have_no_effect(loaded, tmp_path) -> None:
    file = tmp_path / "hits.csv"
    result = invoke("--prompt", "Say.", "--cache-nblocks", 14, "--cache-nways", 4, "--cachehit-csv", file)
    assert (result.exit_code, result.stdout) == (0, "Hé!\n")
    assert [line for line in result.stderr.splitlines() if "no effect on this machine" in line]
    assert file.read_text() == "step,layer,calls,hits,loading,misses,evictions\n"
    assert loaded.config.cache.nblocks == 14
    assert "no effect" not in invoke("--prompt", "Say.").stderr


def test_flags_reach_the_configuration(loaded, monkeypatch) -> None:
    monkeypatch.delenv("HYBRID_BATCH_INVARIANT")
    invoke(
        "--prompt",
        "Say.",
        "--threads",
        3,
        "--format",
        "int4,head=int8",
        "--max-seq-len",
        99,
        "--model-path",
        "somewhere",
    )
    config = loaded.config
    assert (config.threads, config.weight_format, config.max_seq_len) == (3, "int4,head=int8", 99)
    assert (config.kv_format, config.batch_invariant) == ("bf16", None)
    invoke("--prompt", "Say.", "--model-path", "somewhere", "--kv-format", "fp8", "--no-batch-invariant")
    assert (loaded.config.kv_format, loaded.config.batch_invariant) == ("fp8", False)
    config = loaded.config
    assert config.model_path == Path("somewhere")
    assert invoke("--prompt", "Say.", "--max-tokens", 1).stdout == "H\n"
    assert invoke("--prompt", "Say.", "--stop", "!").stdout == "Hé\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], ["cuda", "auto", "cpu"]),
        (["--device", "tpu"], ["tpu", "auto", "cpu"]),
        (["--format", "int3"], ["int3", "bf16"]),
        (["--format", ""], ["''", "auto", "int8"]),
        (["--format", "int8,tail=int4"], ["tail=int4", "head"]),
        (["--format", "int8,head=q4"], ["head=q4", "int4"]),
        (["--kv-format", "int4"], ["--kv-format", "int4", "bf16, int8, fp8"]),
        (["--threads", "0"], ["--threads", "0", "1"]),
        (["--max-seq-len", "-5"], ["--max-seq-len", "-5"]),
        (["--max-tokens", "-1"], ["max_tokens", "-1"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-p", "1.5"], ["top_p", "1.5", "1"]),
        (["--top-k", "-1"], ["top_k", "-1"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--n-prompts", "0"], ["--n-prompts", "0", "1"]),
        (["--n-prompts", "1000000000000"], ["--n-prompts", "1000000"]),
        (["--cache-replace-policy", "MRU"], ["MRU", "FIFO", "LRU"]),
        (["--cache-nblocks", "0"], ["--cache-nblocks", "0", "--cache off"]),
        (["--cache-quota", "-1"], ["--cache-quota", "-1"]),
        (["--cache-admission", "some"], ["some", "always", "second-touch", "break-even"]),
        (["--cache-mapping", "plain"], ["plain", "modulo", "prefix", "hash"]),
        (["--cache-prefetch", "all"], ["all", "next-gate"]),
        (["--cache", "perhaps"], ["perhaps", "auto", "on", "off"]),
        (["--device", "simulated", "--numa", "2"], ["--numa", "--cache off"]),
        (["--device", "simulated", "--device-copy-gbps", "0"], ["--device-copy-gbps", "0"]),
        (["--device", "simulated", "--device-latency-us", "9e18"], ["--device-latency-us", "9e+18"]),
        (["--cache-save", "x.json"], ["--cache-save", "--device simulated"]),
        (["--trace", "x.txt"], ["--trace", "x.txt", ".csv", ".parquet"]),
        (["--power-csv", "/missing/x.csv"], ["--power-csv", "/missing"]),
        (["--breakdown-csv", "/missing/x.csv"], ["--breakdown-csv", "/missing"]),
        (["--cachehit-csv", "/dev"], ["--cachehit-csv", "/dev is a directory"]),
        (["--prompt-path", "/missing.txt"], ["/missing.txt"]),
        (["--prompt-path", "x", "--prompt", "y"], ["--prompt", "--prompt-path"]),
        (["--model-path", "/missing/model"], ["/missing/model"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_flags_are_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    prompt = [] if "--prompt-path" in arguments else ["--prompt", "x"]
    line = refused(*prompt, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"good\nba\xffd\n", ["UTF-8", "0xff", "offset 7"]),
        ("p.txt", b"\n \n", ["no prompt"]),
        ("p.json", b"{", ["JSON"]),
        ("p.json", b'{"prompts": ' + b"[" * 100_000, ["JSON"]),
        ("p.json", b'["a", 1]', ['"prompts"']),
        ("p.json", b'{"a": "b"}', ['"prompts"']),
        ("p.json", b'{"prompt": "a"}\n{"prompt": 1}', ["line 2", '"prompt"']),
        ("p.jsonl", b'"a"\n["b"]', ["line 2", '"prompt"']),
        ("p.jsonl", b'"a"\nb', ["line 2", "JSON"]),
        ("p.jsonl", b'"' + b"9" * 5000 + b'"\n' + b"9" * 5000, ["line 2", "JSON"]),
        ("p.json", b'{"prompts": [1]}', ['"prompts"']),
        ("p.json", b'{"prompts": []}', ["no prompt"]),
    ],
)
def test_bad_prompt_files_are_one_line(tmp_path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    line = refused("--prompt-path", tmp_path / name)
    assert all(word in line for word in words), line


def test_bad_standard_input_and_bad_prompts_are_one_line(loaded) -> None:
    assert "offset 2" in refused(stdin=b"ab\xff")
    assert "surrogate" in refused("--prompt", "a\udcff.")
    assert "129 tokens" in refused("--prompt", "." * 129)
    assert "empty" in refused("--prompt", "")


def test_unknown_flags_exit_with_2() -> None:
    assert invoke("--frobnicate").exit_code == 2


def test_defaults_of_flags_are_those_of_the_configuration() -> None:
    text = " ".join(invoke("--help").stdout.split())
    assert f"[default: {SamplingParams.temperature}]" in text and f"[default: {EngineConfig.chunk_size}]" in text
    issue = (
        "model-path prompt prompt-path n-prompts max-tokens cache-nblocks cache-nways cache-quota "
        "cache-replace-policy breakdown-csv cachehit-csv hide-resp device threads format kv-format batch-invariant "
        "max-seq-len temperature top-p top-k seed chat dry-run json"
    )
    assert all(f"--{flag}" in text for flag in issue.split())


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options)


def test_the_console_script_lists_and_refuses_commands() -> None:
    listing = command("-m", "hybrid.cli")
    assert listing.returncode == 0 and "run" in listing.stdout and "bench" in listing.stdout
    wrong = command("-m", "hybrid.cli", "fly")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "allowed: run, " in wrong.stderr
    assert command("-m", "hybrid.cli", "--version").stdout == command("-m", "hybrid.main", "--version").stdout
    assert "--breakdown-csv" in command("-m", "hybrid.cli", "run", "--help").stdout


TERMINAL = """
import sys; sys.path.insert(0, "tests")
from test_main import Loaded, LLM, app
LLM.from_config = Loaded().open
app([])
"""


def test_a_terminal_without_prompt_chats() -> None:
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE
    )
    os.close(terminal)
    os.write(main, b"hello\n/clear\nagain\n/exit\n")
    _, notes = process.communicate(timeout=PATIENCE)
    shown = b""
    with suppress(OSError):  # when all has been read
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.returncode == 0
    assert shown.decode().count("Hé!") == 2 and b"/exit" in notes


def at_a_terminal(*flags: str) -> str:
    """What a run with the dummy model shows there."""
    main, terminal = pty.openpty()
    code = TERMINAL.replace("app([])", f"app({[str(flag) for flag in flags]})")
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.DEVNULL
    )
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # when all has been read
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.wait(PATIENCE) == 0
    return shown.decode().replace("\r\n", "\n")


def test_several_prompts_are_told_apart_at_a_terminal() -> None:
    shown = at_a_terminal("--prompt", "a.", "--prompt", "b.")
    assert shown == "\033[2m[1 of 2]\na.\033[0mHé!\n\033[2m[2 of 2]\nb.\033[0mHé!\n"
    assert at_a_terminal("--prompt", "a", "--chat") == "\033[2ma\n\033[0mHé!\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    code = TERMINAL.replace("app([])", "app(['--prompt', 'x.', '--json', '--n-prompts', '3000'])")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    notes = process.stderr.read()
    assert process.wait(PATIENCE) == 141 and b"Traceback" not in notes


def test_files_are_written_though_the_reader_has_left(loaded, tmp_path, monkeypatch) -> None:
    def gone(text: str, end: str = "\n", dim: bool = False) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("hybrid.commands.conversation.show", gone)
    monkeypatch.setattr("hybrid.commands.console._drop", lambda descriptor: None)
    assert invoke("--prompt", "Say.", "--breakdown-csv", tmp_path / "steps.csv").exit_code == 141
    assert (tmp_path / "steps.csv").read_text().startswith("step,rows")


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(loaded, monkeypatch, capsys) -> None:
    def fail(batch) -> None:
        if batch.positions[0] == 5 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted: list[bool] = []
    loaded.fail = fail
    lines = iter(["one", "two", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    conversation = Conversation(loaded.open(EngineConfig()), SamplingParams())
    conversation.run()
    assert interrupted
    assert capsys.readouterr().out == "H ...\nHé!\n"
    assert [m["content"] for m in conversation.messages] == ["one", "H", "two", "Hé!"]


def test_a_question_that_does_not_fit_is_forgotten(loaded, monkeypatch, capsys) -> None:
    lines = iter(["x" * 200, "two"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    conversation = Conversation(loaded.open(EngineConfig()), SamplingParams())
    conversation.run()
    assert "202 tokens" in capsys.readouterr().err
    assert [m["content"] for m in conversation.messages] == ["two", "Hé!"]


def test_a_signal_ends_a_real_run_with_130_and_whole_files(tmp_path) -> None:
    file = tmp_path / "steps.csv"
    flags = ["--n-prompts", "500", "--max-tokens", "1900", "--ignore-eos", "--hide-resp", "--cache-nblocks", "1"]
    notes = interrupted(signal.SIGINT, "--prompt", "Once", *flags, "--breakdown-csv", str(file))
    assert notes[0].startswith("note:") and notes[-1].startswith("interrupted")
    assert not any("Traceback" in line for line in notes)
    rows = list(csv.reader(file.open()))
    assert tuple(rows[0]) == BREAKDOWN_COLUMNS and rows[1][0] == "0"


def test_a_dry_run_prints_the_plan_and_loads_nothing() -> None:
    result = invoke("--dry-run")
    assert result.exit_code == 0 and "KV" in result.stdout
    too_long = invoke("--dry-run", "--max-seq-len", 10**9)
    assert too_long.exit_code == 2 and "1000000000" in too_long.stderr


def test_overlap_is_the_prefetch_that_runs_beside_misses() -> None:
    flags = ["--device", "simulated", "--dry-run", "--json", "--max-seq-len", "256"]
    for more, prefetch in (([], "none"), (["--overlap", "next"], "next-gate")):
        assert json.loads(invoke(*flags, *more).stdout)["cache"]["prefetch"] == prefetch
    assert "--overlap 'all' is unknown; allowed: none, next" in refused(*flags, "--overlap", "all")
