"""The API for asyncio, on engines whose steps wait for the test."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from dummy_engine import WATCHDOG, DummyEngine, GatedEngine, reference_tokens
from dummy_tokenizer import BYTES, SPECIAL

from hybrid import LLM, AsyncLLM, SamplingParams
from hybrid.errors import KernelError, RequestError
from hybrid.text.chat_template import ChatTemplate

FOUR = SamplingParams(max_tokens=4)
TEMPLATE = ChatTemplate("{{ messages[0].content }}>")


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, WATCHDOG))


@pytest.fixture
def engine() -> GatedEngine:
    return GatedEngine()


@pytest.fixture
def llm(engine: GatedEngine):
    with LLM.from_engine(engine, BYTES, frozenset([SPECIAL]), TEMPLATE) as opened:
        yield AsyncLLM(opened)


@pytest.fixture
def plain(engine: GatedEngine):
    """Without a tokenizer: every token is a piece."""
    with LLM.from_engine(engine) as opened:
        yield AsyncLLM(opened)


async def begun(engine: GatedEngine) -> int:
    """Rows of the next step, once it has begun."""
    return await asyncio.to_thread(engine.rows)


async def handed_in(llm: AsyncLLM) -> None:
    while llm._loop._worker.commands.empty():
        await asyncio.sleep(0)


def test_everything_is_the_same_as_without_await() -> None:
    """Completions, pieces, chat, logits, progress; many at once, beside threads."""

    async def scenario(llm: AsyncLLM) -> None:
        seen: list[tuple[int, int]] = []
        prompts = ["a", [1, 2, 3], "c" * 30]
        completions = await llm.generate(prompts, FOUR, lambda *n: seen.append(n))
        assert completions == await asyncio.to_thread(llm.llm.generate, prompts, FOUR)
        assert [c.index for c in completions] == [0, 1, 2] and seen == [(1, 3), (2, 3), (3, 3)]
        messages = [{"role": "user", "content": "hi"}]
        assert await llm.chat(messages, FOUR) == llm.llm.chat(messages, FOUR)
        assert [d async for d in llm.stream_chat(messages, FOUR)] == list(llm.llm.stream_chat(messages, FOUR))
        assert llm.encode_chat(messages) == [*b"hi>"]
        assert np.array_equal(await llm.logits([5, 6, 7]), llm.llm.logits([5, 6, 7]))
        assert (await llm.logits([])).shape == (0, 300) and await llm.generate([]) == []
        many = await asyncio.gather(*(llm.generate([n, 1], FOUR) for n in range(40)))
        assert [c.token_ids for (c,) in many] == [reference_tokens([n, 1], 4) for n in range(40)]

    with LLM.from_engine(DummyEngine(), BYTES, frozenset([SPECIAL]), TEMPLATE) as llm:
        run(scenario(AsyncLLM(llm)))


def test_pieces_come_as_they_are_made(plain: AsyncLLM, engine: GatedEngine) -> None:
    async def scenario() -> None:
        got = []
        engine.permit(1)
        async for delta in plain.stream([1], FOUR):
            got += delta.token_ids
            assert got == reference_tokens([1], len(got))
            engine.permit(1)
        assert len(got) == 4

    run(scenario())


def test_errors_come_before_anything_runs(llm: AsyncLLM, engine: GatedEngine) -> None:
    async def scenario() -> None:
        with pytest.raises(RequestError, match="65 tokens"):
            llm.stream([1] * 65)
        with pytest.raises(RequestError, match="not a token id"):
            await llm.generate([[1], [300]])
        with pytest.raises(RequestError, match="progress"):
            await llm.generate([1], None, 5)  # type: ignore[arg-type]
        assert not engine.began.qsize()

    run(scenario())


@pytest.mark.parametrize("what", ["generate", "stream", "logits"])
def test_a_cancelled_task_ends_its_step(llm: AsyncLLM, engine: GatedEngine, what: str) -> None:
    async def work() -> None:
        if what == "generate":
            await llm.generate([[1], [2]], FOUR)
        elif what == "stream":
            await anext(llm.stream([1], FOUR))
        else:
            await llm.logits([1, 2])

    async def scenario() -> None:
        task = asyncio.create_task(work())
        await begun(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.cancels == 1
        engine.permit(4)
        (completion,) = await llm.generate([5], FOUR)
        assert completion.token_ids == reference_tokens([5], 4)

    run(scenario())
    assert not llm.llm.run(lambda: engine.sequences)


def test_a_cancelled_task_leaves_the_steps_of_others_alone(llm: AsyncLLM, engine: GatedEngine) -> None:
    async def scenario() -> None:
        other = asyncio.create_task(llm.generate([7], FOUR))
        await begun(engine)
        task = asyncio.create_task(llm.generate([[1], [2]], FOUR))
        await handed_in(llm)
        engine.permit(1)
        assert await begun(engine) == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.cancels == 0 and not other.done()
        engine.permit(99)
        assert await begun(engine) == 1  # within one step
        assert (await other)[0].token_ids == reference_tokens([7], 4)

    run(scenario())


def test_a_stream_that_is_left_is_cancelled(plain: AsyncLLM, engine: GatedEngine) -> None:
    async def scenario() -> None:
        engine.permit(1)
        async for delta in plain.stream([1], SamplingParams(max_tokens=40)):
            assert delta.token_ids
            await begun(engine)
            await begun(engine)  # or it would be dropped before that
            break
        engine.permit(1)
        assert not await asyncio.to_thread(plain.llm.run, lambda: engine.sequences)
        stream = plain.stream([1], SamplingParams(max_tokens=40))
        engine.permit(1)
        await anext(stream)
        await begun(engine)
        await begun(engine)
        await stream.aclose()
        assert engine.cancels == 1 and not engine.sequences
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(scenario())


def test_a_stream_in_a_cycle_is_cancelled_by_the_collector(plain: AsyncLLM, engine: GatedEngine) -> None:
    async def scenario() -> None:
        class Session:
            pass

        session = Session()
        session.stream, session.itself = plain.stream([1], SamplingParams(max_tokens=40)), session
        engine.permit(1)
        await anext(session.stream)
        await begun(engine)
        await begun(engine)
        del session
        gc.collect()
        engine.permit(1)
        assert not await asyncio.to_thread(plain.llm.run, lambda: engine.sequences)

    run(scenario())


def test_an_event_loop_that_is_gone_ends_its_requests_alone(plain: AsyncLLM, engine: GatedEngine) -> None:
    """The stream outlives the event loop, and what comes for it has nowhere to go."""

    async def scenario():
        stream = plain.stream([1], SamplingParams(max_tokens=40))
        engine.permit(1)
        await anext(stream)
        return stream

    stream = run(scenario())
    engine.rows()
    engine.rows()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(plain.llm.generate, [2], FOUR)
        engine.permit(99)
        assert other.result(WATCHDOG)[0].token_ids == reference_tokens([2], 4)
    assert not plain.llm.run(lambda: engine.sequences) and len(engine.steps) < 10
    assert stream._request.completion.finish_reason == "cancelled"


def test_a_failed_step_is_raised_where_it_is_awaited(llm: AsyncLLM, engine: GatedEngine) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(llm.generate([1], FOUR))
        await begun(engine)
        engine.let_fail(KernelError("broken"))
        with pytest.raises(KernelError, match="broken"):
            await task

    run(scenario())


def test_closing_ends_what_waits_and_blocks_no_event_loop() -> None:
    async def scenario() -> None:
        engine = GatedEngine()
        async with AsyncLLM(LLM.from_engine(engine)) as llm:
            tasks = [asyncio.create_task(llm.generate([n], FOUR)) for n in range(3)]
            await begun(engine)
            await llm.aclose()
            for task in tasks:
                with pytest.raises(RequestError, match="closed"):
                    await task
        assert engine.closed
        with pytest.raises(RequestError, match="closed"):
            await llm.generate([1])

    run(scenario())


def test_an_observer_that_raised_is_told_when_the_model_is_closed() -> None:
    async def scenario() -> None:
        async with AsyncLLM(LLM.from_engine(DummyEngine())) as llm:
            llm.llm.observe(lambda record: 1 / 0)
            await llm.generate([1], FOUR)

    with pytest.raises(ZeroDivisionError):
        run(scenario())
