"""Control characters of files, flags and models are shown, not obeyed."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest

from hybrid.commands.console import one_line, say, show
from hybrid.errors import ConfigError
from hybrid.plan.resolve import EMBEDDED_MODEL
from hybrid.printable import printable

ROOT = Path(__file__).parent.parent
TITLE = "\x1b]0;title\x07"


def test_every_control_character_is_escaped_and_all_else_is_kept() -> None:
    for code in range(0x110000):
        kind = unicodedata.category(chr(code))
        if kind in ("Cc", "Cs", "Zl", "Zp") and chr(code) not in "\n\t":
            assert printable(chr(code)) == f"\\u{code:04x}"
        elif kind != "Cf":
            assert printable(chr(code)) == chr(code)
    for override in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
        assert not set(printable(f"a{override}b")) & {override}
    scripts = "می‌خواهم 👩‍💻 שלום\u200f ‎abc ｶﾞ\ufe0f"
    assert printable(scripts) == scripts


def test_the_escape_is_that_of_json() -> None:
    text = "a\x1b\x9b\x7f\u202e\\n"
    shown = printable(json.dumps(text, ensure_ascii=False))
    assert json.loads(shown) == text and shown.isprintable()


def test_errors_and_messages_are_safe_and_not_endless(capsys) -> None:
    assert str(ConfigError(f"file {TITLE}: bad")) == "file \\u001b]0;title\\u0007: bad"
    say(TITLE)
    assert "\x1b" not in capsys.readouterr().err
    assert one_line("a\n  b\x85c\u2028d") == "a b c d"
    cut = one_line(f"first {'x' * 100_000} last")
    assert len(cut) < 1100 and cut.startswith("first x") and cut.endswith("x last")


def test_a_file_gets_results_as_they_are(capsys) -> None:
    show(TITLE, end="")
    assert capsys.readouterr().out == TITLE


def at_a_terminal(*command: str) -> bytes:
    """What a command writes to its terminal, both streams."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # when all has been read
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    process.wait()
    return shown


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A model that writes a terminal's title in place of words."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"Regex": "[a-z]+"}, "content": TITLE}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], replace]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_model_cannot_steer_the_terminal(hostile, tmp_path) -> None:
    flags = ["--model-path", str(hostile), "--cache-dir", str(tmp_path), "--max-tokens", "16"]
    for prompts in (["--prompt", TITLE], ["--prompt", "Once upon a time", "--prompt", "The fox"]):
        shown = at_a_terminal("hybrid.main", *flags, *prompts)
        assert TITLE.encode() not in shown and b"\\u001b]0;title\\u0007" in shown


def test_a_file_name_cannot_steer_the_terminal(tmp_path) -> None:
    (tmp_path / TITLE).mkdir()
    shown = at_a_terminal("hybrid.main", "--model-path", str(tmp_path / TITLE), "--prompt", "x")
    assert b"error: " in shown and TITLE.encode() not in shown and b"\\u001b]0;title" in shown
    shown = at_a_terminal("hybrid.cli", "run", "--print-config", "--model-path", TITLE)
    assert TITLE.encode() not in shown and b"\\u001b]0;title" in shown
