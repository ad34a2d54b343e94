"""Several servers behind a front: where requests go, and what becomes of them when a server dies. Needs no Ray."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from cluster_rig import Fronted, fronted  # noqa: E402
from dummy_engine import WATCHDOG, GatedEngine  # noqa: E402
from dummy_tokenizer import BYTES, SPECIAL  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from scripted_model import TEMPLATE  # noqa: E402
from server_rig import parse_events, until  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from hybrid import LLM, EngineConfig  # noqa: E402
from hybrid.cluster import replica as replica_module  # noqa: E402
from hybrid.cluster.affinity import LEAD, Affinity  # noqa: E402
from hybrid.cluster.asking import ReplicaLost  # noqa: E402
from hybrid.cluster.charges import Charges  # noqa: E402
from hybrid.cluster.config import ClusterConfig  # noqa: E402
from hybrid.cluster.prefixes import BLOCK, prefix_of  # noqa: E402
from hybrid.cluster.relay import Relay  # noqa: E402
from hybrid.cluster.shares import bind, processors_each, share  # noqa: E402
from hybrid.commands.serve import app  # noqa: E402
from hybrid.errors import ConfigError  # noqa: E402
from hybrid.machine.hardware import MemoryNode  # noqa: E402
from hybrid.server.config import ServerConfig  # noqa: E402
from hybrid.server.fields import completions_asked  # noqa: E402
from hybrid.server.quotas import Quotas  # noqa: E402
from hybrid.server.stream import PING, Opening  # noqa: E402
from hybrid.server.texts import TEXT_PATHS  # noqa: E402

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "ab"}]
STREAMS = {
    CHAT: {"messages": QUESTION, "temperature": 0, "max_tokens": 9},
    COMPLETE: {"prompt": "ab", "temperature": 0, "max_tokens": 9},
    "/v1/messages": {"model": "tiny", "max_tokens": 9, "messages": QUESTION, "temperature": 0},
    "/v1/responses": {"input": "ab", "max_output_tokens": 9, "temperature": 0},
    "/api/chat": {"model": "tiny", "messages": QUESTION, "options": {"temperature": 0, "num_predict": 9}},
    "/api/generate": {"model": "tiny", "prompt": "ab", "options": {"temperature": 0, "num_predict": 9}},
}


def gated() -> tuple[GatedEngine, LLM]:
    """One that says a letter in every step."""
    engine = GatedEngine(next_token=lambda tokens: ord("x"), max_seq_len=400, kv_token_budget=1600, max_rows=64)
    return engine, LLM.from_engine(engine, BYTES, frozenset([SPECIAL]), TEMPLATE)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def common(first: dict, second: dict) -> int:
    pairs = zip(prefix_of(first).marks, prefix_of(second).marks, strict=False)
    return sum(1 for one, other in pairs if one == other)


def test_a_conversation_that_goes_on_has_the_marks_of_its_beginning() -> None:
    turns = [said("system", "s"), said("user", "u"), said("assistant", "a"), said("user", "v")]
    for name in ("messages", "input"):
        assert common({name: turns[:2]}, {name: turns}) == len(prefix_of({name: turns[:2]}).marks) == 2
    assert common({"messages": turns}, {"messages": [said("system", "t"), *turns[1:]]}) == 0
    assert common({"system": "s", "messages": turns}, {"system": "s", "messages": turns[1:]}) == 1
    assert common({"tools": [{"name": "f"}], "messages": turns}, {"messages": turns}) == 0
    text = "x" * (2 * BLOCK) + "tail"
    assert common({"prompt": text}, {"prompt": text + " and more"}) == 2
    assert common({"instructions": "s", "input": text}, {"instructions": "s", "input": text[:-1]}) == 3
    assert prefix_of({"prompt": [1, 2, 3]}).marks and prefix_of({}).marks == prefix_of({"prompt": None}).marks == ()
    assert prefix_of({"prompt": "a\ud800"}).marks and prefix_of({"messages": "no list"}).marks


def test_what_clients_change_in_a_repeated_message_changes_no_mark() -> None:
    marked = {"role": "user", "content": [{"type": "text", "text": "u", "cache_control": {"type": "ephemeral"}}]}
    plain = {"role": "user", "content": [{"type": "text", "text": "u"}], "name": None}
    assert prefix_of({"messages": [marked]}).marks == prefix_of({"messages": [plain]}).marks


def test_a_request_goes_to_whoever_has_read_most_of_it_unless_that_is_too_busy() -> None:
    affinity, free = Affinity(), {"a": 0, "b": 0}
    short, long = prefix_of({"prompt": "x" * BLOCK}), prefix_of({"prompt": "x" * 4 * BLOCK})
    affinity.note(long, "b")
    affinity.note(short, "a")
    assert affinity.order(long, free) == ["b", "a"] and affinity.order(short, free) == ["a", "b"]
    assert (
        affinity.order(long, {"a": 0, "b": LEAD})[0] == "b" and affinity.order(long, {"a": 0, "b": LEAD + 1})[0] == "a"
    )
    assert affinity.order(long, {"a": 3}) == ["a"], "who has read a part, where the other is gone"
    quarter = affinity.order(long, {"a": 1, "c": 0}), affinity.order(long, {"a": 2, "c": 0})
    assert [order[0] for order in quarter] == ["a", "c"], "a quarter of the prompt is worth a quarter of the lead"


def test_requests_that_nobody_knows_are_spread() -> None:
    affinity, chosen = Affinity(), []
    for number in range(6):
        prefix = prefix_of({"prompt": f"{number}"})
        chosen.append(affinity.order(prefix, {"a": 0, "b": 0, "c": 0})[0])
        affinity.note(prefix, chosen[-1])
    assert sorted(chosen[:3]) == sorted(chosen[3:]) == ["a", "b", "c"]
    assert affinity.order(prefix_of({}), {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]


def test_what_is_remembered_is_bounded_and_the_longest_unused_goes_first() -> None:
    affinity = Affinity(capacity=2)
    prefixes = [prefix_of({"prompt": text}) for text in "xyz"]
    for prefix in (prefixes[0], prefixes[1], prefixes[0], prefixes[2]):
        affinity.note(prefix, "b")
    for name in "ab":
        affinity.note(prefix_of({}), name)
    assert [affinity.order(prefix, {"a": 0, "b": 0})[0] for prefix in prefixes] == ["b", "a", "b"]
    affinity.keep({"a"})
    assert affinity.order(prefixes[1], {"a": 0, "b": 0}) == ["b", "a"]


def test_sessions_stay_where_their_prefix_lies() -> None:
    with fronted({"a": LLM(), "b": LLM()}) as server:
        homes = set()
        for number in range(4):
            turns = [said("system", f"You are the teller of story {number}. " * 4), said("user", "Begin.")]
            places, cached = [], []
            for _ in range(3):
                reply = server.post(CHAT, messages=turns, max_tokens=8, temperature=0)
                places.append(reply.headers["x-hybrid-replica"])
                cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
                turns += [reply.json()["choices"][0]["message"], said("user", "Go on.")]
            assert len(set(places)) == 1 and 0 < cached[1] < cached[2]
            homes |= set(places)
        assert homes == {"a", "b"}


def test_keys_are_demanded_here_and_go_no_further() -> None:
    with fronted({"a": gated()[1]}, api_key=("secret", "other")) as server:
        for path in (CHAT, "/info", "/metrics", "/health", "/nothing"):
            assert server.http.post(path).status_code == server.http.get(path).status_code == 401
        assert server.http.get("/ready").json()["replicas"] == 1 and not server.replicas.asked
        headers = {"authorization": "Bearer other", "cookie": "c", "x-request-id": "mine", "traceparent": "t"}
        reply = server.http.post("/tokenize", json={"content": "ab"}, headers=headers)
        assert (reply.json()["tokens"], reply.headers.get_list("x-request-id")) == ([97, 98], ["mine"])
        ((_, asked),) = server.replicas.asked
        assert asked.client == "key 1" and dict(asked.headers)[b"traceparent"] == b"t"
        assert not [value for _, value in asked.headers if b"other" in value or value == b"c"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", STREAMS)
def test_a_replica_that_dies_before_a_word_loses_no_request(path: str, stream: bool) -> None:
    engines = dict(zip("ab", (gated(), gated()), strict=True))
    with (
        fronted({name: llm for name, (_, llm) in engines.items()}, ping_seconds=0.02) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        reply = pool.submit(server.post, path, **STREAMS[path], stream=stream)
        for tried in (1, 2):
            until(lambda tried=tried: len(server.replicas.asked) == tried)
            name = server.replicas.asked[-1][0]
            engine = engines[name][0]
            engine.rows()
            if tried == 1:
                server.on_loop(server.replicas.kill, name)
            engine.permit(1000)
        answer = reply.result(WATCHDOG)
        names = [asked for asked, _ in server.replicas.asked]
        told = names if stream else [name]  # a ping, where there was time for one, has told of the first
        assert answer.status_code == 200 and answer.headers["x-hybrid-replica"] in told
        assert '"error":{' not in answer.text and "".join(re.findall(r'"(x+)"', answer.text)) >= "x" * 9
        assert server.front.figures.moved._value.get() == 1


def test_an_answer_can_be_begun_anew_until_it_says_something() -> None:
    got = []

    async def send(message: dict) -> None:
        got.append(message)

    async def pass_on(relay: Relay, *bodies: bytes) -> None:
        await relay.pass_on({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"1")]}, "a")
        for body in bodies:
            await relay.pass_on({"type": "http.response.body", "body": body, "more_body": True}, "a")

    async def tell() -> None:
        relay = Relay({"path": CHAT}, send)
        await pass_on(relay, Opening(b"first role"))
        assert not got
        relay.begin_anew()
        await pass_on(relay, Opening(b"second role"), PING)
        assert [message.get("body") for message in got] == [None, PING] and not relay.begun
        relay.begin_anew()
        await pass_on(relay, Opening(b"third role"), b"word")
        assert [message["body"] for message in got[2:]] == [b"third role", b"word"] and relay.begun
        assert got[0]["headers"] == [(b"x-hybrid-replica", b"a")]
        with pytest.raises(ReplicaLost):
            relay.begin_anew()
        other = Relay({"path": CHAT}, send)
        await pass_on(other, PING)
        other.begin_anew()
        with pytest.raises(ReplicaLost):  # the client has a status already
            for message in ({"type": "http.response.start", "status": 503, "headers": []}, {"type": "b", "body": b"e"}):
                await other.pass_on(message, "b")

    asyncio.run(tell())


@pytest.mark.parametrize("path", STREAMS)
def test_a_replica_that_dies_amid_an_answer_ends_it_by_an_error(path: str) -> None:
    engine, llm = gated()
    with fronted({"a": llm, "b": gated()[1]}) as server:
        engine.permit(2)
        with server.http.stream("POST", path, json={**STREAMS[path], "stream": True}) as reply:
            lines = reply.iter_lines()
            while '"x"' not in (line := next(lines)) and "x" not in line.replace("tiny", ""):
                pass
            server.on_loop(server.replicas.kill, "a")
            rest = [line for line in lines if line]
        engine.permit(1000)
        assert "[DONE]" not in "".join(rest) and "the replica that wrote this answer is gone" in rest[-1]
        last = json.loads(rest[-1].removeprefix("data: "))
        if path == "/v1/responses":
            numbers = [json.loads(line[6:])["sequence_number"] for line in rest if line.startswith("data: ")]
            assert last["type"] == "error" and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        else:
            assert "error" in last
        assert server.front.figures.moved._value.get() == 0 and len(server.replicas.asked) == 1


def test_a_request_that_ends_every_replica_is_given_up() -> None:
    engines = [gated() for _ in range(5)]
    with fronted({str(n): llm for n, (_, llm) in enumerate(engines)}) as server, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, COMPLETE, prompt="a")
        for tried in range(1, 4):
            until(lambda tried=tried: len(server.replicas.asked) == tried)
            name = server.replicas.asked[-1][0]
            engines[int(name)][0].rows()
            server.on_loop(server.replicas.kill, name)
            engines[int(name)][0].permit(1000)
        assert reply.result(WATCHDOG).status_code == 500 and len(server.replicas.there) == 2


def test_limits_of_a_key_are_those_of_all_replicas_together() -> None:
    engines = dict(zip("ab", (gated(), gated()), strict=True))
    options = {"api_key": ("one", "two"), "key_requests": 3}

    def ask(path: str, key: str = "one", **body: Any) -> httpx.Response:
        return server.http.post(path, json=body, headers={"x-api-key": key})

    def taken(name: str) -> int:
        return [asked.path for replica, asked in server.replicas.asked if replica == name].count(COMPLETE)

    with fronted({name: llm for name, (_, llm) in engines.items()}, **options) as server, ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, COMPLETE, prompt=prompt, max_tokens=1) for prompt in ("a", ["b", "c"])]
        until(lambda: taken("a") == taken("b") == 1)
        paths = {
            path
            for path, methods in server.http.get("/openapi.json", headers={"x-api-key": "one"}).json()["paths"].items()
            if "post" in methods
        }
        limited = {path for path in paths if ask(path).status_code == 429}
        assert limited == paths - TEXT_PATHS and paths > TEXT_PATHS
        assert not limited & {"/tokenize", "/api/show"} and ask("/tokenize", content="a").status_code == 200
        running.append(pool.submit(ask, COMPLETE, key="two", prompt="d", max_tokens=1))
        until(lambda: taken("a") + taken("b") == 3)
        for engine, _ in engines.values():
            engine.permit(1000)
        assert [reply.result(WATCHDOG).status_code for reply in running] == [200] * 3
        assert ask(COMPLETE, prompt=["a"] * 4).json()["error"]["param"] == "n", "it may never have so many"
        assert ask(COMPLETE, prompt="a", n=3, max_tokens=1).status_code == 200
        assert (
            f"hybrid_front_limited_total {len(limited)}.0"
            in server.http.get("/metrics", headers={"x-api-key": "two"}).text
        )


def test_tokens_of_a_key_are_counted_wherever_they_were_computed_and_also_of_who_left() -> None:
    engines = dict(zip("ab", (gated(), gated()), strict=True))

    def ask(key: str, **body: Any) -> httpx.Response:
        return server.http.post(COMPLETE, json={"temperature": 0, "max_tokens": 2, **body}, headers={"x-api-key": key})

    llms = {name: llm for name, (_, llm) in engines.items()}
    with fronted(llms, api_key=("one", "two"), key_tokens_per_minute=40) as server:
        for engine, _ in engines.values():
            engine.permit(1000)
        assert [ask("one", prompt=prompt).status_code for prompt in ("a" * 30, "b" * 30, "c")] == [200, 200, 429]
        assert {name for name, _ in server.replicas.asked} == {"a", "b"}
        assert [ask("two", prompt=prompt, max_tokens=1).status_code for prompt in "ab"] == [200, 200]
        for replica in server.replicas.there.values():
            server.on_loop(replica.service.admission.quotas.charge, "key 1", 20)  # of who left
        assert [ask("two", prompt=prompt).status_code for prompt in ("a", "b", "c")] == [200, 200, 429]


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_early_is_charged_at_once_for_what_was_computed(monkeypatch, stream: bool) -> None:
    """The replica is asked nothing more that it could tell the front with."""
    monkeypatch.setattr(replica_module, "_COUNT_SECONDS", 0)
    monkeypatch.setattr(replica_module, "_TELL_SECONDS", 0.01)
    engine, llm = gated()
    engine.permit(3)  # two for the prompt, one for the second letter
    with fronted({"a": llm}, key_tokens_per_minute=90) as server:
        body = json.dumps({"prompt": "ab" * 50, "max_tokens": 99, "temperature": 0, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            until(lambda: server.front._quotas.total("") >= 100)
            assert server.replicas.there["a"].service.taken == 1, "it has not ended"
        until(lambda: not server.front._tasks)
        assert server.post(COMPLETE, prompt="c").status_code == 429 and len(server.replicas.asked) == 1
        engine.permit(1000)


def test_totals_of_a_replica_count_once_whatever_is_lost_on_the_way() -> None:
    quotas = Quotas(ServerConfig())
    charges = Charges(quotas)
    charges.begin("a", "k", 500)  # of a front that was before this one
    charges.note("a", "k", 530)
    charges.note("a", "k", 510)  # of another answer, which was under way longer
    charges.begin("a", "k", 570)
    charges.begin("b", "k", 0)
    charges.note("b", "k", 9)
    assert quotas.total("k") == 79


def test_where_no_key_is_demanded_a_question_that_costs_nothing_settles_no_debt() -> None:
    engine, llm = gated()
    with fronted({"a": llm}, key_tokens_per_minute=40) as server:
        engine.permit(1000)
        assert server.http.get("/v1/models").status_code == 200
        assert server.post(COMPLETE, prompt="c", max_tokens=1).status_code == 200
        server.on_loop(server.replicas.there["a"].service.admission.quotas.charge, "", 1000)  # of who left
        assert server.http.get("/v1/models").status_code == 200
        asked = [server.http.post(COMPLETE, json={"prompt": text, "max_tokens": 1}) for text in "ab"]
        assert [reply.status_code for reply in asked] == [200, 429]


@pytest.mark.parametrize(
    ("count", "body"),
    [
        *((1, {}), (3, {"n": 3}), (6, {"n": 3, "prompt": ["a", "b"]}), (2, {"prompt": [[1], [2]]})),
        *((1, {"prompt": [1, 2]}), (1, {"prompt": []}), (128, {"prompt": ["a"] * 999}), (1, {"prompt": "abc"})),
        *((1, {"n": True}), (1, {"n": 1 << 40}), (1, {"n": "9"}), (1, {"n": -3})),
    ],
)
def test_completions_are_counted_before_anything_is_checked(count: int, body: dict) -> None:
    assert completions_asked(body) == count


def test_where_none_runs_a_request_waits_for_one_so_long() -> None:
    with fronted({}, ClusterConfig(min_replicas=0, start_seconds=0.05)) as server:
        ready = server.http.get("/ready")
        assert (ready.status_code, ready.json()["replicas"]) == (200, 0), "one is started for whoever comes"
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "tiny" and not server.replicas.asked
        assert server.http.get("/info").json()["error"]["code"] == "loading"
        reply = server.post(COMPLETE, prompt="a", max_tokens=2)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_replica")
        assert reply.headers["retry-after"]
    engine, llm = gated()
    engine.permit(1000)
    with fronted({}, ClusterConfig(min_replicas=0)) as server, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, COMPLETE, prompt="a", max_tokens=2, temperature=0)
        until(lambda: server.front._tasks)
        server.replicas.add("late", llm)
        assert reply.result(WATCHDOG).json()["choices"][0]["text"] == "xx"
    with fronted({}, ClusterConfig(replicas=2)) as server:
        assert server.http.get("/ready").status_code == 503, "there ought to be some"


def test_what_cannot_be_is_refused_before_a_replica_is_asked() -> None:
    with fronted({}, ClusterConfig(min_replicas=0), max_body_mb=1) as server:
        server.replicas.full = True
        for content in (b"[]", b"{", b'{"a": NaN}', b"\xff"):
            assert server.http.post(CHAT, content=content).status_code == 400
        assert server.http.post(CHAT, content=b"x" * (2 << 20)).status_code == 413
        assert server.http.post(CHAT, content=b"{}", headers={"content-encoding": "gzip"}).status_code == 415
        assert server.http.get("/nothing").status_code == server.http.post("/nothing").status_code == 404
        assert server.http.get(CHAT).status_code == server.http.post("/v1/models").status_code == 405
        assert "<html" in server.http.get("/", headers={"accept": "text/html"}).text
        full = server.post("/v1/messages", model="tiny", max_tokens=2, messages=QUESTION)
        assert full.status_code == 503 and full.headers["retry-after"]
        assert full.json()["error"]["type"] == "overloaded_error"


def test_metrics_are_of_all_replicas_by_their_names() -> None:
    with fronted({"a": LLM(), "b": LLM()}) as server:
        for prompt in ("one", "two"):
            server.post(COMPLETE, prompt=prompt, max_tokens=2)
        text = server.http.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert text.count("# TYPE hybrid_generation_tokens_total ") == 1
        got = {sample.labels["replica"]: sample.value for sample in families["hybrid_generation_tokens"].samples}
        assert got == {"a": 2, "b": 2} and families["hybrid_replicas"].samples[0].value == 2
        health = server.http.get("/health").json()
        assert {name: state["ready"] for name, state in health["replicas"].items()} == {"a": True, "b": True}
        assert health["replicas"]["a"]["pid"] == os.getpid()
        for name in "ab":
            assert server.http.get(f"/cache?replica={name}").headers["x-hybrid-replica"] == name


def test_a_client_that_leaves_ends_its_request_where_it_runs() -> None:
    engine, llm = gated()
    with fronted({"a": llm}) as server:
        for stream in (b"true", b"false"):
            body = b'{"prompt": "abc", "max_tokens": 50, "stream": %s}' % stream
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head + body)
                engine.rows()
            until(lambda: not server.front._tasks and server.replicas.there["a"].service.taken == 0)


def test_draining_ends_what_takes_too_long_by_an_error() -> None:
    engine, llm = gated()
    server = Fronted({"a": llm}, ClusterConfig(replicas=2), drain_seconds=0.1)
    engine.permit(2)
    body = {"prompt": "ab", "stream": True, "max_tokens": 90, "temperature": 0}  # chance may say half a letter
    with server.http.stream("POST", COMPLETE, json=body) as reply:
        events = parse_events(reply.iter_lines())
        assert "choices" in next(events)
        server.process.end()
        assert list(events)[-1]["error"]["code"] == "shutting_down"
    engine.permit(1000)
    server.close()


def test_processors_are_shared_out_equally() -> None:
    assert [processors_each([8], count, None) for count in (1, 2, 3, 8)] == [8, 4, 2, 1]
    assert processors_each([64, 64], 2, None) == 64 and processors_each([64, 16], 2, None) == 32
    assert processors_each([64, 16], 3, None) == 21 and processors_each([8, 8], 4, 3) == 3
    for machines, count, threads, allowed in (([2], 3, None, 2), ([8], 3, 4, 2), ([], 1, None, 0)):
        with pytest.raises(ConfigError, match=f"at most {allowed}"):
            processors_each(machines, count, threads)


def test_a_replica_for_each_memory_node_keeps_to_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = []
    monkeypatch.setattr("os.sched_setaffinity", lambda thread, cpus: bound.append((thread, cpus)))
    nodes = (MemoryNode(0, (0, 1)), MemoryNode(1, (2, 3)))
    assert [bind(nodes, 2, place) for place in range(3)] == [True] * 3
    assert bound == [(0, (0, 1)), (0, (2, 3)), (0, (0, 1))]
    assert not bind(nodes, 3, 0) and not bind(nodes[:1], 2, 0) and len(bound) == 3
    assert share(EngineConfig(), 2, 3, 1) == EngineConfig(threads=2, memory_share=3, numa="off")
    assert share(EngineConfig(numa="2"), 2, 3, 1).numa == "2" and share(EngineConfig(), 2, 1, 0).numa == "auto"


def test_engines_that_share_a_machine_share_its_memory() -> None:
    with LLM() as alone, LLM(memory_share=4, threads=1) as one:
        plans = alone.engine.plan, one.engine.plan
        weights = sum(plans[0].weight_bytes.values())
        assert plans[1].memory_available == pytest.approx(plans[0].memory_available / 4, rel=0.2)
        assert plans[1].memory_available > weights and plans[1].prefix_bytes < plans[0].prefix_bytes


def test_replicas_that_cannot_be_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result
        return result.stderr

    assert "--min-replicas 3 is more than --replicas 2" in refused("--replicas", "2", "--min-replicas", "3")
    assert "from 1 to 1024" in refused("--replicas", "0")
    monkeypatch.setattr("hybrid.cluster.on_ray.find_spec", lambda name: None if "ray" in name else find_spec(name))
    for arguments in (("--replicas", "2"), ("--min-replicas", "0"), ("--ray-address", "auto")):
        assert "pip install 'hybrid-moe[cluster]'" in refused(*arguments)
