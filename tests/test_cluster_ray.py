"""Replicas on a Ray cluster of two nodes: sessions, a process that is killed, none and one again. Needs Ray Serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'hybrid-moe[cluster]'")

from ray.cluster_utils import Cluster  # noqa: E402

from hybrid.errors import ConfigError  # noqa: E402

ROOT = Path(__file__).parent.parent
SECONDS = 240  # for whatever is waited for, on a busy machine
QUICKLY = {  # Ray tells its autoscaler every ten seconds by itself
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two machines of one processor each."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUICKLY, "HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": path}.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        try:
            yield cluster.address
        finally:
            cluster.shutdown()


class Served:
    """`hybrid serve` with the flags that are given, until `end`."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "hybrid.serve", "--port", "0", "--log", "none", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        first = self.process.stderr.readline()
        self.said = [first]
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()
        self.http = httpx.Client(base_url=first.split()[2], timeout=SECONDS)

    def replicas(self) -> dict:
        return self.http.get("/health").json()["replicas"]

    def wait(self, count: int) -> dict:
        end = time.monotonic() + SECONDS
        while len(there := self.replicas()) != count or not all(state["ready"] for state in there.values()):
            assert time.monotonic() < end and self.process.poll() is None, (there, self.said)
            time.sleep(0.2)
        return there

    def end(self) -> None:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(SECONDS) == 0, self.said
        finally:
            self.process.kill()


def complete(server: Served, prompt: str, tokens: int) -> httpx.Response:
    return server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": tokens, "ignore_eos": True})


def streamed(server: Served, prompt: str, begun: threading.Event) -> str:
    body = {"prompt": prompt, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        text = ""
        for part in reply.iter_text():
            text += part
            begun.set()
    return text


def test_sessions_keep_their_replica_and_one_that_is_killed_loses_nothing_unbegun(address: str) -> None:
    server = Served("--replicas", "2", "--ray-address", address)
    try:
        there = server.wait(2)
        homes = set()
        for number in range(2):
            turns = [
                {"role": "system", "content": f"You tell story {number}. " * 6},
                {"role": "user", "content": "Go."},
            ]
            places, cached = set(), []
            for _ in range(3):
                reply = server.http.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 8})
                places.add(reply.headers["x-hybrid-replica"])
                cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
                turns += [reply.json()["choices"][0]["message"], {"role": "user", "content": "And then?"}]
            assert len(places) == 1 and 0 < cached[1] < cached[2]
            homes |= places
        assert homes == set(there)
        begun = [threading.Event() for _ in range(2)]
        with ThreadPoolExecutor(14) as pool:
            streams = []
            for number, event in enumerate(begun):
                streams.append(pool.submit(streamed, server, f"{number} once", event))
                assert event.wait(SECONDS)
            whole = [pool.submit(complete, server, f"{n} upon a time", 400) for n in range(12)]
            victim = next(iter(there))
            while server.replicas()[victim]["running"] < 3:  # the stream, and two that have not begun to answer
                assert not all(one.done() for one in whole)
            os.kill(there[victim]["pid"], signal.SIGKILL)
            assert [one.result().status_code for one in whole] == [200] * 12
            assert {one.result().json()["usage"]["completion_tokens"] for one in whole} == {400}
            ends = [("[DONE]" in one.result(), "replica_lost" in one.result()) for one in streams]
        metrics = server.http.get("/metrics").text
        moved = int(float(metrics.split("\nhybrid_front_moved_total ")[1].split()[0]))
        assert moved >= 2 and f"\nhybrid_front_lost_total {moved + 1}.0\n" in metrics, "the stream had begun"
        assert sorted(ends) == [(False, True), (True, False)]
        assert set(server.wait(2)) != set(there), "another one is started"
    finally:
        server.end()


def test_none_runs_without_requests_and_one_comes_with_them(address: str) -> None:
    flags = ("--min-replicas", "0", "--scale-up-seconds", "0", "--scale-down-seconds", "1")
    server = Served("--replicas", "2", *flags, "--ray-address", address)
    try:
        server.wait(1)
        server.wait(0)
        assert server.http.get("/ready").status_code == 200
        assert complete(server, "Once", 5).json()["usage"]["completion_tokens"] == 5
        server.wait(0)
    finally:
        server.end()


def test_the_application_of_ray_serve_answers_at_its_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import yaml
    from ray import serve

    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    from ray_serve import app

    with pytest.raises(ConfigError, match="'replcas' is no setting"):
        app({"replcas": 2})
    with pytest.raises(ConfigError, match="port is for Ray Serve"):
        app({"port": 1})
    (application,) = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())["applications"]
    assert application["import_path"] == f"{app.__module__}:{app.__name__}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address, log_to_driver=False)
    try:
        with pytest.raises(ConfigError, match="4 replicas are too many for 2 processors"):
            app(application["args"])
        serve.shutdown()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"replicas": 2, "api_key": ["secret"]}), name="hybrid")
        body = {"prompt": "Once", "max_tokens": 5, "ignore_eos": True}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            assert client.post("/v1/completions", json=body).status_code == 401
            client.headers["authorization"] = "Bearer secret"
            assert len(client.get("/health").json()["replicas"]) == 2
            whole = client.post("/v1/completions", json=body)
            assert whole.json()["usage"]["completion_tokens"] == 5 and whole.headers["x-hybrid-replica"]
            told = client.post("/v1/completions", json={**body, "stream": True})
            assert told.text.endswith("data: [DONE]\n\n") and told.text.count("data: ") > 2
    finally:
        serve.shutdown()
        ray.shutdown()
