"""Rendering equals that of `transformers`, and what takes too much ends as an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from hybrid.errors import RequestError
from hybrid.text import rendering
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.rendering import Limits, render

USER = {"role": "user", "content": "Is 1 < 2 & 'so'?\n"}
CHAT = [{"role": "system", "content": "é"}, USER, {"role": "assistant", "content": "Yes."}, USER]
TOOLS = [
    {"type": "function", "function": {"name": "<add>", "parameters": {"type": "object", "enum": ["é", 1.5, None]}}}
]
TEMPLATES = {
    "blocks are trimmed": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n"
    "{% endfor %}\n",
    "generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{{ messages[0].content }}"
    "{% endgeneration %}{{ x }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ loop.index }}"
    "{% endfor %}"
    "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ tools | tojson(ensure_ascii=true, sort_keys=true) }}"
    "{{ tools | tojson(separators=(',', ':')) }}",
    "namespace": "{% set ns = namespace(self=1, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1, b=2) }}{{ dict([('c', 3)]) }}{{ dict.fromkeys('ab', 0) }}",
    "macros": "{% macro say(x) -%} [{{ x }}{{ caller() }}] {%- endmacro %}{% call say(1) %}2{% endcall %}",
    "undefined": "{{ nothing }}{{ nothing is defined }}{{ messages[0].nothing is none }}",
    "methods": "{{ 'a b'.split()[-1].upper() }}{{ '%s-%d' % ('a', 3) }}{{ '{:>4}'.format(1) }}"
    "{{ messages[0].get('x', 7) }}",
    "given": "{{ bos_token }}{{ tools | length }}{{ documents }}{{ add_generation_prompt }}{{ thinking }}",
}  # fmt: skip


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_rendered_texts_equal_those_of_transformers(source: str) -> None:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils")
    given: dict[str, Any] = {"thinking": True, "bos_token": "<s>"}
    (expected,), _ = oracle.render_jinja_template(
        [CHAT], tools=TOOLS, documents=[], chat_template=source, add_generation_prompt=True, **given
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(CHAT, TOOLS, [], {"thinking": True}) == expected


def test_the_extensions_are_there_without_transformers() -> None:
    source = (
        "{% generation %}{% for x in [1, 2] %}{{ {'a': '<é>'} | tojson }}{% break %}{% endfor %}{% endgeneration %}"
    )
    assert render(source, {}) == '{"a": "<é>"}'
    assert abs((datetime.strptime(render("{{ strftime_now('%Y-%m-%d') }}", {}), "%Y-%m-%d") - datetime.now()).days) <= 1
    with pytest.raises(RequestError, match="refuses these messages: no tools$"):
        render("{{ raise_exception('no\ntools') }}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ dict.__class__.__base__() }}",
        "{% include 'x' %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_reaches_nothing_else(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template refuses") as error:
        render(source, {"messages": []})
    assert "\n" not in str(error.value)


SMALL = Limits(seconds=0, memory=1 << 28, length=10_000)
BOMBS = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "times": ("{{ ('a' * 10**10) | length }}", "MiB of memory"),
    "width": ("{{ '%1000000000d' % 1 }}", "MiB of memory"),
    "format": ("{{ '{:>10000000000}'.format(1) }}", "MiB of memory"),
    "center": ("{{ 'a' | center(10**10) }}", "MiB of memory"),
    "indent": ("{{ [1] | tojson(indent=10**10) }}", "MiB of memory"),
    "doubling": (
        "{% set ns = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "MiB of memory",
    ),
    "macros": ("{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}", "calls itself too deeply"),
    "nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "calls itself too deeply"),
    "text": ("{% for i in range(9999) %}0123456789{% endfor %}", "more than 10000 characters"),
    "one text": ("{{ 'a' * 10**6 }}", "more than 10000 characters"),
    "power": ("{{ (9 ** 9999) | string }}", "refuses these messages"),
}


@pytest.mark.parametrize(("source", "said"), BOMBS.values(), ids=BOMBS)
def test_what_takes_too_much_is_an_error_of_one_line(source: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        render(source, {}, SMALL)
    assert "\n" not in str(error.value)
    assert render("{{ x }}", {"x": "still here"}) == "still here"


def test_threads_render_at_once_and_each_gets_its_own() -> None:
    texts: dict[int, str] = {}

    def one(n: int) -> None:
        texts[n] = "".join(render("{{ n }},", {"n": n}) for _ in range(20))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {n: f"{n}," * 20 for n in range(6)}


def test_long_messages_are_rendered_whole() -> None:
    text = "é🙂\ud800 " * 400_000
    assert render("{{ x }}{{ x | length }}", {"x": text}) == text + str(len(text))


def test_an_answer_that_is_not_awaited_is_not_given_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rendering._Process, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render("first", {})
    assert render("second", {}) == "second"


def test_a_forked_child_renders_in_a_process_of_its_own() -> None:
    assert render("a", {}) == "a"
    kept = [process._process.pid for process in rendering._idle]
    read, write = os.pipe()
    if not (child := os.fork()):
        text = render("{{ x }}", {"x": "b"})
        os.write(write, f"{text} {any(p._process.pid in kept for p in rendering._idle)}".encode())
        rendering._end_all()
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"b False"
    assert render("c", {}) == "c"


def test_the_process_ends_with_its_owner_and_gets_none_of_its_secrets() -> None:
    program = (
        "from hybrid.text import rendering; print(rendering.render('{{ x }}', {'x': 1}));"
        "print(rendering._idle[0]._process.pid, flush=True);"
        "print(open(f'/proc/{rendering._idle[0]._process.pid}/environ').read());"
        "import os, sys; sys.stdout.flush(); os._exit(0)"
    )
    env = {**os.environ, "HF_TOKEN": "secret", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert "secret" not in ran.stdout
    pid = int(re.findall(r"^\d+$", ran.stdout, re.M)[1])
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1][:3]:
            return
        time.sleep(0.01)
    raise AssertionError("it goes on without its owner")


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rendering._end_all()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(RequestError, match="cannot be started"):
            render("x", {})
    with monkeypatch.context() as patch:
        patch.setattr(rendering, "_PROGRAM", Path("/nowhere/program.py"))
        with pytest.raises(RequestError, match="exit code 2"):
            render("x", {})


def test_what_is_no_data_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for wrong in (deep, 10**5000):
        with pytest.raises(RequestError, match="plain data"):
            render("x", {"x": wrong})
