"""Keys and priorities of the server: whose turn it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx  # noqa: E402
from cluster_rig import fronted  # noqa: E402
from dummy_engine import WATCHDOG, DummyEngine, GatedEngine  # noqa: E402
from dummy_tokenizer import BYTES  # noqa: E402
from scripted_model import TEMPLATE  # noqa: E402
from server_rig import Running, running, until  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.cluster.relay import Relay  # noqa: E402
from hybrid.errors import ConfigError  # noqa: E402
from hybrid.server.config import ServerConfig  # noqa: E402
from hybrid.server.exchange import Exchange  # noqa: E402
from hybrid.server.quotas import Quotas  # noqa: E402
from hybrid.server.refusals import Refusal  # noqa: E402
from hybrid.server.service import Service  # noqa: E402

COMPLETE = "/v1/completions"


class Queue:
    """A server with one sequence that is taken, and who comes next."""

    def __init__(self, server: Running, engine: GatedEngine) -> None:
        self.server, self.engine = server, engine
        self.order: list[str] = []
        self._threads: list[threading.Thread] = []

    def ask(self, name: str, key: str = "a", **fields: Any) -> None:
        """Ask and wait until it is queued."""
        before = len(self.server.service._runs)
        self._threads.append(threading.Thread(target=self._ask, args=(name, key, fields)))
        self._threads[-1].start()
        until(lambda: len(self.server.service._runs) > before)

    def _ask(self, name: str, key: str, fields: dict[str, Any]) -> None:
        headers = {"authorization": f"Bearer {key}"}
        body = {"prompt": [1, 2, 3], "max_tokens": 1, **fields}
        reply = self.server.http.post(COMPLETE, json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        self.order.append(name)

    def finish(self) -> list[str]:
        for count in range(len(self._threads)):
            self.engine.permit()
            until(lambda count=count: len(self.order) > count)
        for thread in self._threads:
            thread.join()
        return self.order


@pytest.fixture
def queue():
    engine = GatedEngine(sequences=1, max_rows=64, max_seq_len=64)
    with running(LLM.from_engine(engine, BYTES, frozenset(), None), api_key=("a", "b")) as server:
        made = Queue(server, engine)
        made.ask("first")
        engine.rows()
        yield made


def test_a_lower_priority_comes_first(queue: Queue) -> None:
    for name, priority in (("late", 5), ("middle", 3), ("soon", None)):
        queue.ask(name, priority=priority)
    assert queue.finish() == ["first", "soon", "middle", "late"]


def test_a_key_of_many_requests_does_not_hold_up_another(queue: Queue) -> None:
    for number in range(3):
        queue.ask(f"a{number}")
    queue.ask("b", key="b")
    assert queue.finish() == ["first", "a0", "b", "a1", "a2"]


def test_a_priority_that_is_none_is_refused(queue: Queue) -> None:
    for priority in (2**31, "high", 1.5):
        reply = queue.server.http.post(
            COMPLETE, json={"prompt": "a", "priority": priority}, headers={"authorization": "Bearer a"}
        )
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "priority"
    queue.finish()


def test_the_time_of_each_token_of_a_stream_is_told(queue: Queue) -> None:
    queue.engine.permit()
    until(lambda: len(queue.order) == 1)
    queue.ask("second", max_tokens=3)
    queue.engine.permit(3)
    until(lambda: len(queue.order) == 2)
    text = queue.server.http.get("/metrics", headers={"x-api-key": "a"}).text
    assert "hybrid_inter_token_latency_seconds_count 2.0" in text and "hybrid_num_preemptions_total 0.0" in text


def test_a_key_has_its_limits_and_others_are_not_held_up() -> None:
    engine = GatedEngine(sequences=1, max_rows=64, max_seq_len=64)
    options = {"api_key": ("a", "b"), "key_requests": 2, "key_tokens_per_minute": 6}
    with running(LLM.from_engine(engine, BYTES, frozenset(), None), **options) as server:
        queue = Queue(server, engine)
        queue.ask("first", max_tokens=2)
        engine.rows()
        queue.ask("second")
        full = server.http.post(COMPLETE, content=b"not looked at", headers={"authorization": "Bearer a"})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert (full.json()["error"]["type"], full.json()["error"]["code"]) == (
            "rate_limit_error",
            "rate_limit_exceeded",
        )
        queue.ask("other", key="b")
        engine.permit(9)
        until(lambda: len(queue.order) == 3 and not server.service.taken)
        late = server.http.post(COMPLETE, content=b"not looked at", headers={"authorization": "Bearer a"})
        assert late.status_code == 429 and 1 <= int(late.headers["retry-after"]) <= 60
        ok = server.http.post(COMPLETE, json={"prompt": [1], "max_tokens": 1}, headers={"authorization": "Bearer b"})
        assert ok.status_code == 200
        assert "hybrid_requests_limited_total 2.0" in server.http.get("/metrics", headers={"x-api-key": "b"}).text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("server_of", "passing"), [(running, (Exchange, "send")), (fronted, (Relay, "pass_on"))])
def test_who_has_the_whole_answer_may_ask_again(monkeypatch, server_of, passing, stream: bool) -> None:
    send, taken = getattr(*passing), []

    async def counting(self: Any, message: Any, *rest: str) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            taken.append(quotas._taken.total())
        await send(self, message, *rest)

    llm = LLM.from_engine(DummyEngine(), BYTES)
    with server_of(llm if server_of is running else {"r": llm}, api_key=("a",), key_requests=1) as server:
        quotas = server.service.admission.quotas if server_of is running else server.front._quotas
        monkeypatch.setattr(*passing, counting)
        body = {"prompt": "a", "max_tokens": 3, "stream": stream}
        assert server.http.post(COMPLETE, json=body, headers={"x-api-key": "a"}).status_code == 200
    assert taken == [0]


TEXTS = {
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [97]},
    "/apply-template": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize("path", TEXTS)
def test_texts_alone_are_no_completions_and_have_limits_of_their_own(monkeypatch, path: str) -> None:
    engine, over, prepare = GatedEngine(sequences=1), threading.Event(), Service.prepare
    llm = LLM.from_engine(engine, BYTES, frozenset(), TEMPLATE)

    async def slowly(service: Service, make: Callable[[], Any], text: bool = False) -> Any:
        return await prepare(service, lambda: (over.wait(WATCHDOG), make())[1], text)

    def ask(key: str) -> httpx.Response:
        return server.http.post(path, json=TEXTS[path], headers={"x-api-key": key})

    with running(llm, api_key=("a", "b", "c"), key_requests=1, max_queue=1) as server:
        queue = Queue(server, engine)
        queue.ask("runs")
        engine.rows()
        queue.ask("waits", key="b")
        until(lambda: server.service.taken == 2)
        assert ask("a").status_code == ask("c").status_code == 200, "the queue of completions is full"
        monkeypatch.setattr(Service, "prepare", slowly)
        with ThreadPoolExecutor(2) as clients:
            asked = [clients.submit(ask, key) for key in ("a", "b")]
            until(lambda: server.service.admission.texts == 2)
            refused = [ask(key) for key in ("a", "c")]
            assert [reply.status_code for reply in refused] == [429, 503]
            assert all(reply.headers["retry-after"] == "1" for reply in refused)
            over.set()
            assert [reply.result().status_code for reply in asked] == [200, 200]
        until(lambda: server.service.admission.texts == 0)
        queue.finish()


def test_tokens_come_back_with_time_and_no_more_than_a_minute_s() -> None:
    now = [0.0]
    quotas = Quotas(ServerConfig(key_tokens_per_minute=60), lambda: now[0])
    quotas.charge("a", 90)
    with pytest.raises(Refusal, match="60 tokens a minute") as refused:
        quotas.require("a", 1)
    assert refused.value.retry == 31
    quotas.require("b", 1)
    now[0] = 31.0
    quotas.require("a", 1)
    now[0] = 1e6
    quotas.charge("a", 60)
    with pytest.raises(Refusal):
        quotas.require("a", 1)


def test_to_come_before_others_needs_a_key_with_that_right(tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\nplain\nswift urgent\nboth\nboth \t urgent\n")

    def ask(server: Any, priority: int, key: str = "") -> int:
        body = {"prompt": [1], "max_tokens": 1, "priority": priority}
        reply = server.http.post(COMPLETE, json=body, headers={"x-api-key": key})
        assert reply.status_code == 200 or reply.json()["error"]["param"] == "priority"
        return reply.status_code

    options = {"api_key": ("other",), "api_key_file": keys}
    llms = [LLM.from_engine(DummyEngine(), BYTES) for _ in range(3)]
    with running(llms[0], **options) as alone, fronted({"a": llms[1]}, **options) as several:
        for server in (alone, several):
            assert [ask(server, -1, key) for key in ("plain", "other", "swift", "both")] == [403, 403, 200, 200]
            assert [ask(server, priority, "plain") for priority in (0, 5)] == [200, 200]
    with running(llms[2]) as server:
        assert ask(server, -1) == 200, "without keys all are one"
    for line in ("key  with urgent", "urgent urgent urgent", "key soon"):
        keys.write_text(line)
        with pytest.raises(ConfigError, match="without spaces"):
            ServerConfig(api_key_file=keys).all_keys()
