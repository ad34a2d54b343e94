"""The chat: what a person types, what the model is asked, what is shown, and what only a terminal does."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dummy_engine import WATCHDOG, GatedEngine
from dummy_tokenizer import BYTES, byte_level
from scripted_model import TEMPLATE
from scripted_model import Model as Scripted

from hybrid import LLM, SamplingParams
from hybrid.commands import conversation as module
from hybrid.commands.chat import ChatOptions
from hybrid.commands.conversation import ChatInputs, Conversation
from hybrid.commands.keyboard import Keyboard
from hybrid.errors import ConfigError, KernelError
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


class Model(Scripted):
    """One that a person talks with."""

    def chat(self, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException], **words: Any) -> Conversation:
        """A conversation in which these lines are typed."""
        typed: Iterator[str | type[BaseException]] = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        params = words.pop("params", SamplingParams())
        conversation = Conversation(self.llm, params, ChatInputs(**words))
        conversation.run()
        return conversation


def test_a_conversation_sends_all_of_it_back_and_computes_only_what_is_new(monkeypatch, capsys) -> None:
    model = Model("Hi", "Yes", "No")
    chat = model.chat(monkeypatch, "a", "b", "c", "/exit", "never read")
    assert model.prompts == ["(u)a.", "(u)a(a)Hi(u)b.", "(u)a(a)Hi(u)b(a)Yes(u)c."]
    assert capsys.readouterr().out == "Hi\nYes\nNo\n"
    assert [m["content"] for m in chat.messages] == ["a", "Hi", "b", "Yes", "c", "No"]
    rows = sum(len(batch.token_ids) for batch in model.engine.steps)
    # A dot ends every prompt, so that it and what follows are new: three prompts, two answers that are read again.
    assert rows < len(model.prompts[-1]) + 3 * len("(u)a(a)No.")


def test_commands(monkeypatch, capsys) -> None:
    model = Model("Hi")
    chat = model.chat(
        monkeypatch, "/regen", "a", "/regen", "/system Be kind", "b", "/system", "/clear", "c", "/system -", "d"
    )
    assert model.prompts == [
        "(u)a.",
        "(u)a.",
        "(s)Be kind(u)a(a)Hi(u)b.",
        "(s)Be kind(u)c.",
        "(u)c(a)Hi(u)d.",
    ]
    notes = capsys.readouterr().err
    assert "there is no question yet" in notes and "the system message is: Be kind" in notes
    assert "--temperature is 0" in notes and len(chat.messages) == 4
    chat._take("/drop")
    assert [m["content"] for m in chat.messages] == ["d", "Hi"]


def test_a_question_may_begin_with_a_slash(monkeypatch, capsys) -> None:
    model = Model("Hi")
    model.chat(monkeypatch, "/etc is what", "//etc is what", "", "   ")
    assert model.prompts == ["(u)/etc is what."]
    assert "there is no command /etc; //etc is what sends it" in capsys.readouterr().err


def test_texts_of_several_lines(monkeypatch) -> None:
    model = Model("Hi")
    model.chat(monkeypatch, "one \\", "two", '"""', "  def f():", "      pass", '"""', '"""x"""', "pasted\nlines\r")
    assert [prompt.rpartition("(u)")[2] for prompt in model.prompts] == [
        "one \ntwo.",
        "  def f():\n      pass.",
        "x.",
        "pasted\nlines.",
    ]


def test_ctrl_c_at_the_prompt_leaves_the_second_time(monkeypatch, capsys) -> None:
    model = Model("Hi")
    chat = model.chat(monkeypatch, KeyboardInterrupt, "a", KeyboardInterrupt, KeyboardInterrupt, "never read")
    assert len(chat.messages) == 2 and capsys.readouterr().err.count("Ctrl-C again") == 2


def test_what_is_no_utf_8_is_typed_again(monkeypatch, capsys) -> None:
    model = Model("Hi")
    model.chat(monkeypatch, "caf\udce9", "cafe")
    assert model.prompts == ["(u)cafe."] and "byte 0xe9" in capsys.readouterr().err


def test_answers_that_were_cut_say_so(monkeypatch, capsys) -> None:
    Model("A long answer").chat(monkeypatch, "a", params=SamplingParams(max_tokens=3))
    shown = capsys.readouterr()
    assert shown.out == "A l\n" and "cut after 3 tokens, which --max-tokens allows" in shown.err
    Model("x" * 90, max_seq_len=64, kv_token_budget=256).chat(monkeypatch, "a")
    assert "the context of 64 tokens is full; /clear forgets" in capsys.readouterr().err


def test_a_full_context_says_what_to_do_or_drops_the_oldest_turns(monkeypatch, capsys) -> None:
    plan = {"max_seq_len": 64, "kv_token_budget": 256}
    chat = Model("x" * 30, **plan).chat(monkeypatch, "a", "b" * 40, system="S")
    notes = capsys.readouterr().err
    assert "may have 64" in notes and "/clear forgets the conversation" in notes
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    model = Model("x" * 20, **plan)
    chat = model.chat(monkeypatch, "a", "bb", "cc", "d" * 90, system="S", drop_oldest=True)
    assert model.prompts[-1] == f"(s)S(u)bb(a){'x' * 20}(u)cc." or model.prompts[-1] == "(s)S(u)cc."
    assert "forgot the oldest" in capsys.readouterr().err
    assert chat.messages[0]["role"] == "system"


def test_an_error_of_the_model_does_not_end_the_conversation(monkeypatch, capsys) -> None:
    def fail(batch: Any) -> None:
        if len(model.prompts) == 1 and batch.positions[0] > 5:
            model.fail = lambda batch: None
            raise KernelError("it broke")

    model = Model("Hello", "Yes")
    model.fail = fail
    chat = model.chat(monkeypatch, "a", "b")
    assert "error: it broke" in capsys.readouterr().err
    assert [m["content"] for m in chat.messages] == ["b", "Yes"]


def test_reasoning_is_not_shown_to_files_and_not_sent_back(monkeypatch, capsys) -> None:
    source = TEMPLATE.source + "{# <think> #}"
    chat = Model("<think>Hm</think>Yes", template=ChatTemplate(source)).chat(monkeypatch, "a", "b")
    assert capsys.readouterr().out == "Yes\nYes\n"
    assert chat.messages[1] == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}


def test_deltas_carry_the_parts_of_an_answer_and_no_marks() -> None:
    answer = '<think>Hm</think>I look<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    model = Model(answer, template=ChatTemplate(TEMPLATE.source + "{# <think> <tool_call> #}"))
    with model.llm.stream_chat([{"role": "user", "content": "a"}]) as stream:
        deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == "I look" == stream.completion.text
    assert "".join(delta.reasoning for delta in deltas) == "Hm" == stream.completion.reasoning
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert [(call.name, call.arguments) for call in calls] == [
        ("f", '{"x": 1}')
    ] and calls == stream.completion.tool_calls
    assert sum((delta.token_ids for delta in deltas), ()) == tuple(stream.completion.token_ids)
    whole = model.llm.chat([{"role": "user", "content": "a"}])
    assert (whole.text, whole.reasoning, len(whole.tool_calls)) == ("I look", "Hm", 1)
    assert answer.startswith(model.llm.generate("(u)a.")[0].text)  # a raw prompt gets what the model wrote


def test_tools_are_called_and_their_results_sent_back(monkeypatch, capsys) -> None:
    backend = byte_level()
    backend.add_special_tokens(["[TOOL_CALLS]", "[ARGS]"])
    model = Model(
        'I look[TOOL_CALLS]time[ARGS]{"zone": "x"}',
        "Noon",
        tokenizer=Tokenizer(backend),
        template=ChatTemplate(TEMPLATE.source + "{# [TOOL_CALLS] #}"),
    )
    chat = model.chat(
        monkeypatch, "a", tools=[{"type": "function", "function": {"name": "time"}}], template_kwargs={"mood": "!"}
    )
    said, called, more = capsys.readouterr().out.splitlines()
    assert (said, more) == ("I look", "Noon") and json.loads(called) == chat.messages[1]["tool_calls"][0]
    assert model.prompts == ["1!(u)a.", "1!(u)a(a)I look(t)no result."]
    call = chat.messages[1]["tool_calls"][0]
    assert call["function"] == {"name": "time", "arguments": '{"zone": "x"}'}
    assert chat.messages[2]["tool_call_id"] == call["id"]


def test_options_are_read_before_a_model_is_loaded(tmp_path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps({"tools": [{"type": "function"}]}))
    inputs = ChatOptions("S", tools, '{"x": 1}', "drop", True).inputs()
    assert inputs == ChatInputs("S", [{"type": "function"}], {"x": 1}, True, True)
    assert inputs.messages("q") == [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]
    for text in ("x", "[]", '{"a":' * 2000):
        with pytest.raises(ConfigError, match="--chat-template-kwargs .* is no JSON object"):
            ChatOptions(chat_template_kwargs=text).inputs()
    tools.write_text("[1]")
    with pytest.raises(ConfigError, match="--tools .* holds no list of tools"):
        ChatOptions(tools=tools).inputs()


def test_a_bar_shows_how_much_of_a_long_prompt_was_read(monkeypatch, capsys) -> None:
    engine = GatedEngine()
    monkeypatch.setattr(module, "_READING_SECONDS", 0.001)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with LLM.from_engine(engine, BYTES) as llm, llm.stream("x" * 30, SamplingParams(max_tokens=1)) as stream:
        watcher = threading.Thread(target=_let_run, args=(engine, capsys))
        watcher.start()
        module.show_progress(stream)
        assert len(list(stream)) == 1
        watcher.join(WATCHDOG)
        assert stream.prompt_progress == (30, 30) and stream.completion.finish_reason == "length"


def _let_run(engine: GatedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for done in (0, 8, 16, 24):
        engine.rows()
        while f"prompt {done} of 30" not in shown:
            shown += capsys.readouterr().err
        engine.permit()


BARE = """
import sys; sys.modules["readline"] = None; sys.path.insert(0, "tests")
from test_chat import Model, Conversation, SamplingParams
from hybrid.commands.console import exit_codes
with exit_codes():
    model = Model("Hi", "Yes\\x1b[31m")
    Conversation(model.llm, SamplingParams()).run()
    print(model.prompts, flush=True)
"""


def test_a_terminal_without_readline() -> None:
    main, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", BARE], cwd=ROOT, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""

    def wait(word: bytes, count: int) -> None:
        nonlocal shown
        while shown.count(word) < count:
            shown += os.read(main, 65536)

    for count, typed in enumerate((b"caf\xe9\n", b"pasted\ntext\n", b"more\n", b"\x04"), 1):
        wait(b"> \x1b[0m", count)
        os.write(main, typed)
    with suppress(OSError):  # when all has been read
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.wait(WATCHDOG) == 0
    text = shown.decode(errors="replace")
    assert "not UTF-8 (byte 0xe9)" in text and "Traceback" not in text
    assert r"['(u)pasted\ntext.', '(u)pasted\ntext(a)Hi(u)more.']" in text
    assert "context 400 tokens" in text and r"Yes\u001b[31m" in text


def test_lines_of_a_pipe_are_questions(monkeypatch) -> None:
    command = [sys.executable, "-m", "hybrid.cli", "chat", "--max-tokens", "4", "--threads", "1"]
    result = subprocess.run(command, cwd=ROOT, input=b"Hello\r\nHello\n", capture_output=True, check=True)
    assert len(result.stdout.splitlines()) == 2 and b"> " not in result.stdout
    assert not Keyboard().interactive
