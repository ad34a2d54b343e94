"""The web page without a browser: its files, their headers, the gate, and what GET /activity tells it."""

from __future__ import annotations

import re
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from dummy_engine import WATCHDOG  # noqa: E402
from server_rig import QUESTION, running  # noqa: E402

from hybrid import LLM, EngineConfig  # noqa: E402
from hybrid.config import CacheConfig  # noqa: E402
from hybrid.server.page import FOLDER, PATHS  # noqa: E402

HTML = {"accept": "text/html,application/xhtml+xml"}
NAMED = re.compile(r"""(?:src|href)="([^"#][^"]*)"|from "([^"]+)"|url\(([^)]+)\)|@import""")
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nothing fetches


@pytest.fixture(scope="module")
def server():
    with running(LLM(), api_key=("secret-key",)) as server:
        yield server


def sources() -> dict[str, str]:
    return {file.name: file.read_text() for file in FOLDER.iterdir()}


def test_every_file_is_sent_without_a_key_and_under_a_strict_policy(server) -> None:
    for path in PATHS:
        reply = server.http.get(path, headers=HTML)
        assert reply.status_code == 200 and reply.content == (FOLDER / (path[6:] or "index.html")).read_bytes()
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" == policy["frame-ancestors"] and policy["script-src"] == "'self'"
        assert "unsafe" not in reply.headers["content-security-policy"] and "http" not in str(policy)
        assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["cache-control"] == "no-cache"
        again = server.http.get(path, headers={**HTML, "if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path, kind in (("/", "text/html"), ("/page/main.js", "text/javascript"), ("/page/page.css", "text/css")):
        assert server.http.get(path, headers=HTML).headers["content-type"].startswith(kind)


def test_clients_of_ollama_are_told_that_somebody_is_there(server) -> None:
    assert server.http.get("/").text == "hybrid is running\n" and server.http.get("/").headers["vary"] == "accept"
    assert server.http.head("/").status_code == 200
    assert server.http.get("/", headers=HTML).headers["vary"] == "accept"


def test_the_files_name_nothing_but_each_other() -> None:
    for name, text in sources().items():
        for address in re.findall(r"https?://[^\s\"'`)]*", text):
            assert address == NAMESPACE or not re.match(r"https?://\w", address), (name, address)
        for found in NAMED.finditer(text):
            address = next(filter(None, found.groups()), "import")
            assert f"/page/{address.removeprefix('/page/').removeprefix('./')}" in PATHS, (name, address)


def test_nothing_becomes_markup_or_runs_that_came_as_a_text() -> None:
    for name, text in sources().items():
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "DOMParser",
        ):
            assert word not in text, (name, word)
        if name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
        assert len(text.splitlines()) < 400


def test_only_the_files_pass_without_a_key(server) -> None:
    for path in (
        "/activity",
        "/info",
        "/cache",
        "/page/",
        "/page",
        "/page/none.js",
        "/page/../info",
        "/page%2fmain.js",
    ):
        assert server.http.get(path, headers=HTML).status_code == 401, path
    assert server.http.get("/activity", headers={"x-api-key": "secret-key"}).status_code == 200


def test_the_page_may_ask_its_own_server_by_whatever_address_it_came() -> None:
    def status(server, host: str, origin: str) -> int:
        return server.http.get("/activity", headers={"host": host, "origin": origin, "x-api-key": "k"}).status_code

    with running(LLM(), host="0.0.0.0", api_key=("k",)) as server:
        assert status(server, "moe.example:8000", "https://moe.example:8000") == 200
        assert status(server, "moe.example:8000", "https://moe.example") == 403
        assert status(server, "moe.example", "https://moe.example.evil") == status(server, "moe.example", "null") == 403
    with running(LLM(), host="0.0.0.0") as server:
        assert status(server, "192.168.1.5:8000", "http://192.168.1.5:8000") == 200
        assert status(server, "[fd00::5]:8000", "http://[fd00::5]:8000") == 200
        assert status(server, "rebound.example:8000", "http://rebound.example:8000") == 403


def test_what_the_machine_does() -> None:
    with running(LLM(speculate=False)) as server:
        before = server.http.get("/activity").json()
        server.post("/v1/chat/completions", messages=QUESTION, max_tokens=5, ignore_eos=True)
        now = server.http.get("/activity").json()
        spec = server.service.llm.llm.engine.spec
        rows = {kind: now["rows"][kind] - before["rows"][kind] for kind in ("prompt", "decode")}
        assert now["engine"]["layers"] == list(spec.moe_layers) and rows["decode"] == 4 and rows["prompt"] > 4
        use = [
            [new - old for new, old in zip(*both, strict=True)]
            for both in zip(now["engine"]["use"], before["engine"]["use"], strict=True)
        ]
        assert {sum(layer) for layer in use} == {(rows["prompt"] + 4) * spec.top_k}
        assert now["queue"] == {"running": 0, "waiting": 0, "sequences": 8, "limit": 256}
        assert now["engine"]["kept"] == 1 and now["engine"]["kept_tokens"] > 4 and now["engine"]["running_tokens"] == 0
        assert now["memory"]["weights"] > 1e6 and now["engine"]["resident"] is None


def test_it_tells_what_lies_on_a_device() -> None:
    config = EngineConfig(device="simulated", cache=CacheConfig(2, 4, delay=0), max_seq_len=256, threads=1)
    with running(LLM.from_config(config)) as server:
        server.post("/v1/chat/completions", messages=QUESTION, max_tokens=12)
        now = server.http.get("/activity").json()
        assert 0 < len(now["engine"]["resident"]) <= 8 and sum(now["expert_cache"].values()) > 0


def test_a_long_step_keeps_nobody_waiting() -> None:
    with running(LLM()) as server:
        begun, over = threading.Event(), threading.Event()
        step = threading.Thread(target=lambda: server.service.llm.llm.run(lambda: (begun.set(), over.wait(WATCHDOG))))
        step.start()
        begun.wait()
        seen = [server.http.get("/activity").json() for _ in range(2)]
        over.set()
        step.join()
        assert [one["engine"] for one in seen] == [None, None] and seen[0]["queue"]["running"] == 0
        assert server.http.get("/activity").json()["engine"]
