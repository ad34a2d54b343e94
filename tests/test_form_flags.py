"""Flags that bind texts to a form: one at a time, from files, and wrong ones in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid.commands import chat, run
from hybrid.commands.form import FormOptions
from hybrid.core import Grammar
from hybrid.errors import ConfigError

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("flag", "text", "pattern"),
    [
        ("--regex", "[a-c]{3}", "[a-c]{3}"),
        ("--choice", " red", " red"),
        ("--grammar", 'start: "yes" | "no"', "yes|no"),
        ("--grammar", 'root ::= "on" | "off"', "on|off"),
        ("--json-schema", json.dumps({**SCHEMA, "additionalProperties": False}), r'\{\s*"n"\s*:\s*-?\d+\s*\}'),
    ],
)
def test_texts_are_in_the_form_that_a_flag_gives(tmp_path: Path, flag: str, text: str, pattern: str) -> None:
    pytest.importorskip("llguidance")
    if flag in ("--grammar", "--json-schema"):
        (tmp_path / "form").write_text(text)
        text = str(tmp_path / "form")
    prompt = ("--prompt", "Once upon a time", "--max-tokens", "60", "--threads", "1", "--json")
    found = CliRunner().invoke(run.app, [*prompt, flag, text])
    assert found.exit_code == 0, found.output
    (completion,) = json.loads(found.stdout)["completions"]
    assert re.fullmatch(pattern, completion["text"]) and completion["finish_reason"] == "stop"


def test_answers_of_a_chat_are_in_it_too() -> None:
    pytest.importorskip("llguidance")
    found = CliRunner().invoke(chat.app, ["--choice", "One.", "--threads", "1"], input="How many?\n")
    assert found.exit_code == 0 and found.stdout.strip() == "One."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (FormOptions(regex="a", choice=("b",)), "--regex and --choice exclude each other; give one of them"),
        (FormOptions(json_schema=Path("nowhere")), "--json-schema nowhere: there is no such file"),
        (FormOptions(grammar=Path("nowhere")), "--grammar nowhere: there is no such file"),
    ],
)
def test_what_cannot_be_is_said(options: FormOptions, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        options.read()


def test_without_a_flag_there_is_no_form() -> None:
    assert FormOptions().read() is None
    assert FormOptions(regex="").read() == Grammar.regex("")


def test_a_schema_must_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="--json-schema .*list.json: holds a list, not a JSON object"):
        FormOptions(json_schema=tmp_path / "list.json").read()
