"""Texts that a grammar demands: which tokens may come, what is refused, and what a chat puts around it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llguidance")

from hybrid import LLM, Grammar, SamplingParams
from hybrid.errors import RequestError


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=2, max_seq_len=256) as llm:
        yield llm


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1, "top_k": 5, "presence_penalty": 1.0}])
def test_kinds(llm, params):
    def said(grammar):
        (one,) = llm.generate("Once upon a time", SamplingParams(max_tokens=100, grammar=grammar, **params))
        assert one.finish_reason == "stop"
        return one.text

    value = json.loads(said(Grammar.json(SCHEMA)))
    assert list(value) == ["name", "age"] and 0 <= value["age"] <= 99
    assert re.fullmatch(r"[A-C]{2}/\d\n?x", said(Grammar.regex(r"[A-C]{2}/\d\n?x")))
    assert said(Grammar.choice(["été", 'a "b"'])) in ("été", 'a "b"')
    assert re.fullmatch("(ab)+c", said(Grammar.rules('start: "ab"~1..3 "c"')))
    assert said(Grammar.rules('root ::= "yes" | "no"')) in ("yes", "no")


def test_what_is_refused(llm):
    deep = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    cases = [
        (Grammar.json({"not": {"type": "string"}}), '"not"'),
        (Grammar.json({"type": "string", "format": "foo"}), "foo"),
        (Grammar.json({"$ref": "http://x.y/z"}), "http://x.y/z"),
        (Grammar.json(deep), "64 deep"),
        (Grammar.json("{"), "no JSON"),
        (Grammar.json("[]"), "must be an object"),
        (Grammar.json(json.dumps("x" * (1 << 18))), "at most 262144"),
        (Grammar.regex("("), "unclosed group"),
        (Grammar.regex("a\\"), "backslash"),
        (Grammar.regex("(" * 60_000 + ")" * 60_000), "at most 8192"),
        (Grammar.regex("(" * 4000 + ")" * 4000), ""),
        (Grammar.json({"type": "integer", "multipleOf": 999_983}), "more than 2 s"),
        (Grammar.json({"$ref": "#"}), "no text satisfies it"),
        (Grammar.choice([]), "list of texts"),
        (Grammar.rules("start: foo"), "foo"),
        (Grammar.rules("root ::= foo"), "foo"),
        (Grammar.rules("root ::= " + "(" * 60_000), ""),
        ("yes", "hybrid.Grammar"),
    ]
    for grammar, words in cases:
        with pytest.raises(RequestError) as raised:
            llm.generate("Once", SamplingParams(max_tokens=4, grammar=grammar))
        assert words in str(raised.value) and "\n" not in str(raised.value), grammar


def test_the_probabilities_are_those_of_the_model(llm):
    free = llm.generate("Once", SamplingParams(max_tokens=1, logprobs=3))[0].logprobs[0]
    bound = llm.generate("Once", SamplingParams(max_tokens=1, logprobs=3, grammar=Grammar.regex("Z+")))[0].logprobs[0]
    assert bound.top == free.top and bound.logprob < free.logprob


def test_several_texts_draw_for_themselves_and_cannot_leave(llm):
    params = SamplingParams(
        max_tokens=20, n=4, temperature=2.0, seed=3, ignore_eos=True, grammar=Grammar.regex("[a-z]{6}")
    )
    found = llm.generate("Once", params)
    assert len({one.text for one in found}) > 1
    assert all(re.fullmatch("[a-z]{6}", one.text) and one.finish_reason == "stop" for one in found)
    assert [one.text for one in llm.generate("Once", params)] == [one.text for one in found]


def test_a_stop_string_and_a_limit_end_before_the_grammar(llm):
    (one,) = llm.generate("Once", SamplingParams(max_tokens=9, stop="b", grammar=Grammar.regex("aabbcc")))
    assert (one.text, one.finish_reason) == ("aa", "stop")
    (one,) = llm.generate("Once", SamplingParams(max_tokens=2, grammar=Grammar.regex("[0-9]{40}")))
    assert one.finish_reason == "length"


def test_what_nothing_can_follow_is_an_error_of_that_request_alone(llm):
    params = SamplingParams(max_tokens=2, grammar=Grammar.regex("a"), logits_processor=_only_the_first)
    with pytest.raises(RequestError, match="no token may come"):
        llm.generate("Once", params)
    assert llm.generate("Once", SamplingParams(max_tokens=1))


def _only_the_first(tokens, logits):
    logits[1:] = -np.inf


def test_the_examples_of_the_page_run(capsys):
    text = (Path(__file__).parent.parent / "docs/structured.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "docs/structured.md", "exec"), {})
    assert '"age"' in capsys.readouterr().out
