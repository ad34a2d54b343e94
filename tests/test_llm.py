"""The Python API, on the dummy engine; and the promises about batching on the embedded model."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
from dummy_engine import DummyEngine, GatedEngine, reference_tokens
from dummy_tokenizer import BYTES, SPECIAL

from hybrid import LLM, EngineConfig, SamplingParams
from hybrid.core import Completion, ToolCall
from hybrid.errors import ConfigError, KernelError, RequestError
from hybrid.text.chat_template import ChatTemplate, load_template

TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def echo(text: str, after: int):
    """The greedy token of an engine that says `text` once it has seen `after` tokens, then ends."""
    script = [*text.encode(), SPECIAL]
    return lambda tokens: script[min(len(tokens) - after, len(script) - 1)]


def make(engine: DummyEngine | None = None, **parts) -> LLM:
    defaults = {"tokenizer": BYTES, "eos_ids": frozenset([SPECIAL]), "template": TEMPLATE}
    return LLM.from_engine(engine or DummyEngine(), **{**defaults, **parts})


def busy(llm: LLM) -> bool:
    return llm.run(lambda: llm.loop._worker.scheduler.has_work)


def test_one_text_or_one_token_list_is_one_prompt() -> None:
    llm = make()
    ids = [*b"hey"]
    for prompts in ("hey", ["hey"], ids, [ids], np.array(ids), np.array([ids])):
        (completion,) = llm.generate(prompts, SamplingParams(max_tokens=4))
        assert completion.prompt_token_ids == ids
        assert completion.token_ids == reference_tokens(ids, 4)
    assert llm.generate([]) == []


def test_completions_keep_the_order_of_the_prompts() -> None:
    prompts = ["a", [1, 2, 3], "c" * 30, "d", [9], "f"]
    seen: list[tuple[int, int]] = []
    completions = make().generate(prompts, SamplingParams(max_tokens=3), lambda *n: seen.append(n))
    assert [c.index for c in completions] == list(range(6))
    assert [c.prompt_token_ids for c in completions] == [list(p.encode()) if isinstance(p, str) else p for p in prompts]
    assert seen == [(n, 6) for n in range(1, 7)]


def test_generation_stops_at_eos_and_its_text_ends_before_it() -> None:
    (completion,) = make(DummyEngine(next_token=echo("né🙂", 2))).generate("hi")
    assert (completion.text, completion.finish_reason) == ("né🙂", "stop")
    assert completion.token_ids[-1] == SPECIAL


def test_stop_strings_are_cut_from_text_and_stream() -> None:
    engine = DummyEngine(next_token=echo("one, two, three", 1))
    llm, params = make(engine), SamplingParams(stop=(", th", "zzz"))
    (completion,) = llm.generate("x", params)
    assert (completion.text, completion.finish_reason) == ("one, two", "stop")
    deltas = list(llm.stream("x", params))
    assert "".join(d.text for d in deltas) == "one, two"
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"]
    assert sum((d.token_ids for d in deltas), ()) == tuple(completion.token_ids)


def test_a_text_that_is_cut_by_length_keeps_what_was_held_back() -> None:
    llm = make(DummyEngine(next_token=echo("ab🙂", 1)))
    assert llm.generate("x", SamplingParams(max_tokens=3, stop=("b\ufffd!",)))[0].text == "ab\ufffd"


def test_closing_a_stream_frees_its_sequence() -> None:
    engine = GatedEngine(sequences=1, next_token=echo("hello", 3))
    llm = make(engine)
    stream = llm.stream("abc")
    engine.permit()
    next(stream)
    assert engine.sequences
    stream.close()
    assert not engine.sequences
    assert next(stream, None) is None
    engine.permit(2)
    assert len(llm.generate("abc", SamplingParams(max_tokens=2))[0].token_ids) == 2


def test_arguments_of_another_kind_are_refused_by_name() -> None:
    llm = make()
    with pytest.raises(RequestError, match="params must be SamplingParams, not dict"):
        llm.generate("a", {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompts must be"):
        llm.generate(np.array(3))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="progress is 5; it must be a function"):
        llm.generate("a", None, 5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="on_step is 'x'"):
        llm.observe("x")  # type: ignore[arg-type]


def test_a_stream_finds_errors_before_it_starts() -> None:
    with pytest.raises(RequestError, match="65 tokens.* 64 "):
        make().stream([1] * 65)


def test_one_bad_prompt_refuses_the_call_and_leaves_nothing_behind() -> None:
    engine = DummyEngine()
    llm = make(engine)
    for bad in ([1] * 65, [300], [-1], [2**40], "", [], "\ud800", [1.5], [[1], [2]], None, 7, [True]):
        with pytest.raises(RequestError) as error:
            llm.generate(["good", bad])
        assert "\n" not in str(error.value)
    assert not engine.steps and not busy(llm)


def test_an_empty_prompt_is_the_bos_token_where_there_is_one() -> None:
    class WithBos:
        bos_id = 77
        specials: dict[str, int] = {}
        added: dict[str, int] = {}

        def encode(self, text: str, special_tokens: bool = True) -> list[int]:
            return []

        def decode(self, token_ids) -> str:
            return ""

    assert make(tokenizer=WithBos()).generate("")[0].prompt_token_ids == [77]


def test_a_model_without_tokenizer_takes_tokens_only() -> None:
    llm = make(tokenizer=None)
    assert llm.generate([1, 2], SamplingParams(max_tokens=3))[0].token_ids == reference_tokens([1, 2], 3)
    assert [d.token_ids for d in llm.stream([1, 2], SamplingParams(max_tokens=2))] == [
        (t,) for t in reference_tokens([1, 2], 2)
    ]
    for call in (lambda: llm.generate("text"), lambda: llm.generate([1], SamplingParams(stop=("a",)))):
        with pytest.raises(RequestError, match="no tokenizer"):
            call()


def test_many_conversations_are_answered_together() -> None:
    engine = DummyEngine()
    llm = make(engine)
    chats = [[{"role": "user", "content": text}] for text in ("a", "bc", "d")]
    answers = llm.chat(chats, SamplingParams(max_tokens=3))
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert [answer.text for answer in answers] == [llm.chat(chat, SamplingParams(max_tokens=3)).text for chat in chats]
    assert max(len(set(batch.sequences.tolist())) for batch in engine.steps) > 1
    with pytest.raises(RequestError, match="message 0"):
        llm.chat([chats[0], [{"role": "nobody", "content": "x"}]])
    with pytest.raises(RequestError, match="one or more entries"):
        llm.chat([chats[0], []])


def test_an_answer_goes_on_to_the_end_of_the_context_and_a_completion_does_not() -> None:
    llm = make(DummyEngine(max_seq_len=300, kv_token_budget=600))
    answer = llm.chat([{"role": "user", "content": "hi"}])
    assert len(answer.prompt_token_ids) + len(answer.token_ids) == 300 and answer.finish_reason == "length"
    assert len(llm.generate("hi")[0].token_ids) == 128
    assert len(llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=5)).token_ids) == 5


def test_a_chat_that_keeps_computes_only_what_is_new() -> None:
    engine = DummyEngine()
    llm = make(engine)
    messages = [{"role": "user", "content": "hello"}]
    first = llm.chat(messages, SamplingParams(max_tokens=2), keep=True)
    again = llm.chat(messages, SamplingParams(max_tokens=2), keep=True)
    assert (first.cached_tokens, again.cached_tokens) == (0, len(first.prompt_token_ids) - 1)
    assert again.token_ids == first.token_ids and engine.sequences
    llm.forget()
    assert not engine.sequences
    with llm.stream_chat(messages, SamplingParams(max_tokens=2), keep=True) as deltas:
        assert [token for delta in deltas for token in delta.token_ids] == first.token_ids


def test_a_message_is_what_the_next_question_sends_back() -> None:
    assert Completion([1], text="Hi.").message == {"role": "assistant", "content": "Hi."}
    call = ToolCall("add", '{"a": 1}', "abcdefghi")
    message = Completion([1], reasoning="Hm.", tool_calls=[call]).message
    function = {"name": "add", "arguments": '{"a": 1}'}
    call_object = {"id": "abcdefghi", "type": "function", "function": function}
    assert message == {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call_object]}
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.a }}")
    assert template.render([message]) == "1"


def test_chat_renders_the_template_once() -> None:
    llm = make()
    messages = [{"role": "user", "content": "hi"}]
    completion = llm.chat(messages, SamplingParams(max_tokens=2))
    assert bytes(completion.prompt_token_ids) == b"[user]hi>"
    streamed = list(llm.stream_chat(messages, SamplingParams(max_tokens=2)))
    assert "".join(d.text for d in streamed) == completion.text


@pytest.mark.parametrize(
    "messages",
    [
        [],
        5,
        ({"role": "user", "content": "x"} for _ in "a"),
        "hi",
        {"role": "user"},
        ["hi"],
        [{"role": "user"}],
        [{"role": "boss", "content": "x"}],
        [{"content": "x"}],
    ],
    ids=lambda messages: "generator" if inspect.isgenerator(messages) else str(messages),
)
def test_messages_that_are_none_are_refused(messages) -> None:
    with pytest.raises(RequestError):
        make().chat(messages)


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must\nalternate') }}", "{% if %}", "{{ messages[9].x }}"]
)
def test_a_template_that_fails_is_one_line(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template refuses") as error:
        make(template=ChatTemplate(source)).chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from hybrid.text.chat_template import ChatTemplate
print(ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": "hi"}]))
assert "torch" not in sys.modules
"""


def test_chat_works_in_silence_without_torch() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("hi\n", "")


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        make(template=None).chat([{"role": "user", "content": "x"}])


def test_templates_come_from_their_file_or_the_configuration(tmp_path) -> None:
    assert load_template(tmp_path) is None
    config = '{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}"}]}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    messages = [{"role": "user", "content": "x"}]
    template = load_template(tmp_path)
    assert template is not None and template.render(messages) == "<s>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ bos_token }}")
    template = load_template(tmp_path)
    assert template is not None and template.render(messages) == "x<s>"


def test_logits_cover_every_position() -> None:
    llm = make()
    logits = llm.logits([5, 6, 7])
    assert logits.shape == (3, 300) and logits.dtype == np.float32
    assert logits[2].argmax() == reference_tokens([5, 6, 7], 1)[0]
    assert llm.logits([]).shape == (0, 300)
    with pytest.raises(RequestError):
        llm.logits([1] * 65)


def test_logprobs_are_reported_for_every_token() -> None:
    (completion,) = make().generate([1], SamplingParams(max_tokens=3, logprobs=2))
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in completion.logprobs)


def test_a_closed_llm_says_so_everywhere() -> None:
    engine = GatedEngine(next_token=echo("hello", 3))
    with make(engine) as llm:
        stream = llm.stream("abc")
        engine.permit()
        next(stream)
    assert engine.closed and not engine.sequences
    llm.close()
    calls = (
        lambda: llm.generate("x"), lambda: llm.generate([]), lambda: llm.stream("x"), lambda: llm.logits([1]),
        lambda: llm.observe(None), lambda: llm.run(list), lambda: next(stream),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RequestError, match="closed"):
            call()
    assert next(stream, None) is None


def test_a_failed_step_leaves_the_model_usable() -> None:
    failures: list[BaseException] = []

    def fail(batch) -> None:
        if failures and batch.positions.max() > 2:
            raise failures.pop()

    engine = DummyEngine(fail=fail, sequences=2)
    llm = make(engine)
    for error in (KeyboardInterrupt(), KernelError("broken")):
        failures.append(error)
        with pytest.raises(type(error)):
            llm.generate([[1], [2], [3]], SamplingParams(max_tokens=9))
        assert not engine.sequences and not busy(llm)
    assert llm.generate([4], SamplingParams(max_tokens=2))[0].token_ids == reference_tokens([4], 2)


def test_threads_share_one_model() -> None:
    llm, results = make(), {}

    def work(first: int) -> None:
        results[first] = llm.generate([[first, i] for i in range(5)], SamplingParams(max_tokens=6))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, completions in results.items():
        assert [c.token_ids for c in completions] == [reference_tokens([first, i], 6) for i in range(5)]
    assert len(results) == 4


def test_a_seed_gives_the_same_text_alone_and_among_others() -> None:
    params = SamplingParams(max_tokens=10, temperature=2.0, seed=3)
    alone = make().generate("tell", params)[0]
    among = make().generate(["x", "tell", "y" * 20], params)[1]
    assert alone.token_ids == among.token_ids and alone.text == among.text


def test_every_engine_option_is_a_keyword_with_the_default_of_its_field() -> None:
    parameters = inspect.signature(LLM.__init__).parameters
    for field in fields(EngineConfig):
        if field.name not in ("cache", "simulated"):
            assert parameters[field.name].default == field.default
    with pytest.raises(TypeError, match="thread_count"):
        LLM(thread_count=3)  # type: ignore[call-arg]


def plain_llm(**parts) -> LLM:
    return LLM.from_engine(
        DummyEngine(**parts), BYTES, frozenset([SPECIAL]), ChatTemplate("{{ messages[0].content }}>")
    )


def test_every_prompt_may_have_params_and_several_completions() -> None:
    with plain_llm() as llm:
        one, many = SamplingParams(max_tokens=2), SamplingParams(max_tokens=3, n=3, temperature=1.0, seed=5)
        completions = llm.generate(["a", [1, 2], "c"], [one, many, None])
        assert [(c.index, c.sample, len(c.token_ids)) for c in completions[:4]] == [
            (0, 0, 2), (1, 0, 3), (1, 1, 3), (1, 2, 3),
        ]  # fmt: skip
        assert completions[4].usage.completion_tokens > 0
        assert [c.prompt for c in completions] == ["a", None, None, None, "c"]
        drawn = [tuple(c.token_ids) for c in completions[1:4]]
        assert len(set(drawn)) == 3 and llm.generate([1, 2], many)[1].token_ids == list(drawn[1])
        assert llm.generate([1, 2], replace(many, n=1))[0].token_ids == list(drawn[0])
        for call, line in (
            (lambda: llm.generate(["a", "b"], [one]), "params has 1 for 2 prompts"),
            (lambda: llm.generate(["a", "b"], [one, 5]), "params must be SamplingParams, not int"),
            (lambda: llm.stream("a", many), "n is 3, and a stream has one completion"),
            (lambda: llm.chat([{"role": "user", "content": "a"}], many), "n is 3, and a chat has one answer"),
        ):
            with pytest.raises(RequestError, match=line):
                call()


def test_a_completion_says_what_it_used_and_when() -> None:
    with plain_llm() as llm:
        (completion,) = llm.generate("abc", SamplingParams(max_tokens=2))
        usage, times = completion.usage, completion.times
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens) == (3, 2, 5, 0)
        assert 0 < times.started < times.first_token < times.finished
        (none,) = llm.generate("abc", SamplingParams(max_tokens=0))
        assert none.times.first_token is None and none.times.finished > 0
        assert llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1)).prompt == "hi>"


def test_a_text_may_end_at_a_token_and_a_stop_string_may_stand_alone() -> None:
    expected = reference_tokens([1], 6)
    with plain_llm() as llm:
        stop = SamplingParams(max_tokens=6, stop_token_ids=(expected[2],), ignore_eos=True)
        (completion,) = llm.generate([1], stop)
        assert completion.token_ids == expected[:3] and completion.finish_reason == "stop"
        assert llm.generate([1], replace(stop, min_tokens=3))[0].token_ids[:3] != expected[:3]
        assert llm.generate([1], replace(stop, logit_bias={expected[0]: -100}))[0].token_ids[0] != expected[0]
    with plain_llm(next_token=lambda tokens: ord("abcdefgh"[len(tokens) - 1])) as llm:
        assert [c.text for c in llm.generate([[1], [1]], [SamplingParams(stop="cd"), SamplingParams(stop=("e",))])] == [
            "ab", "abcd",
        ]  # fmt: skip


def test_what_a_processor_raises_is_the_error_of_its_request_alone() -> None:
    def processor(tokens, scores):
        raise SystemExit("no")

    with plain_llm() as llm:
        with pytest.raises(SystemExit):
            llm.generate([1], SamplingParams(logits_processor=processor))
        assert llm.generate([1], SamplingParams(max_tokens=2))[0].token_ids == reference_tokens([1], 2)


def test_texts_become_tokens_and_tokens_texts() -> None:
    with plain_llm() as llm:
        assert llm.encode("abc") == [97, 98, 99] and llm.decode([97, SPECIAL, 98]) == "ab" and llm.decode([]) == ""
        for call in (
            lambda: llm.encode(5),
            lambda: llm.decode([300]),
            lambda: llm.decode([-1]),
            lambda: llm.decode("a"),
        ):
            with pytest.raises(RequestError):
                call()
    with LLM.from_engine(DummyEngine()) as llm, pytest.raises(RequestError, match="no tokenizer"):
        llm.decode([1])


def test_a_model_shows_what_it_is() -> None:
    with plain_llm() as llm:
        assert repr(llm) == "<LLM 'a model', dummy on 1 thread, 4 sequences of up to 64 tokens, open>"
    assert "closed" in repr(llm)


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="^device 'tpu' .*cpu"):
        LLM(device="tpu")


@pytest.fixture(scope="module")
def embedded():
    pytest.importorskip("cpu_kernels", exc_type=ImportError)
    with LLM(max_batch=4, chunk_size=32, max_seq_len=256, batch_invariant=True) as llm:
        yield llm


STORIES = ["Once upon a time", "Tom had a red ball.", "The dog was hungry, so", "One day, Anna went to the river. She"]
GREEDY = SamplingParams(max_tokens=24, logprobs=0)


def test_the_embedded_model_says_the_same_alone_batched_and_streamed(embedded: LLM) -> None:
    together = embedded.generate(STORIES, GREEDY)
    for prompt, completion in zip(STORIES, together, strict=True):
        assert completion.text.strip()
        alone = embedded.generate(prompt, GREEDY)[0]
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)
        assert "".join(delta.text for delta in embedded.stream(prompt, GREEDY)) == completion.text


def test_the_embedded_model_scores_what_it_generates(embedded: LLM) -> None:
    (completion,) = embedded.generate("Once upon a time there was " * 12, GREEDY)
    prompt, output = completion.prompt_token_ids, completion.token_ids
    assert len(prompt) > 32  # more than one chunk
    best = embedded.logits(prompt + output).argmax(axis=1)
    assert best[len(prompt) - 1 : -1].tolist() == output


def test_the_embedded_model_answers_in_chat(embedded: LLM) -> None:
    completion = embedded.chat([{"role": "user", "content": "What color is the sky?"}], GREEDY)
    assert completion.text.strip() and "<|" not in completion.text


def test_the_embedded_model_refuses_what_does_not_fit(embedded: LLM) -> None:
    with pytest.raises(RequestError, match="257 tokens.* 256 "):
        embedded.generate([[5] * 257])
