"""`hybrid serve`: a model answers over HTTP."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from hybrid.cluster.config import ClusterConfig
from hybrid.commands.console import one_line
from hybrid.commands.flags import command, new_app
from hybrid.commands.signals import end_at_once, ending_signals
from hybrid.config import EngineConfig, check_config
from hybrid.errors import ConfigError
from hybrid.server.config import ServerConfig
from hybrid.settings import check_settings

if TYPE_CHECKING:
    from hybrid.server.exchange import App
    from hybrid.server.process import Closable, Load, Process, Served

T = TypeVar("T", bound="Closable")
app = new_app()
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@command(app, "the server has ended")
def serve(config: EngineConfig, options: ServerConfig, cluster: ClusterConfig) -> None:
    """Answer over HTTP, as OpenAI's API does: any client of that API can be pointed at it."""
    with ending_signals(end_at_once):  # until it listens; what is imported does not bear exceptions
        check_settings(options)
        check_settings(cluster)
        check_config(config)
        cluster.check()
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            install = "install them: pip install 'hybrid-moe[server]'"
            raise ConfigError(f"hybrid serve needs {', '.join(missing)}; {install}")
        options.all_keys()
        _serve(config, options, cluster)


def _serve(config: EngineConfig, options: ServerConfig, cluster: ClusterConfig) -> None:
    from hybrid.server.log import lines_to, stderr, tell

    names = options.names_of(config.model_path)
    with lines_to(stderr()):
        if cluster.alone:
            _serve_alone(config, options, names)
        else:
            _serve_replicas(config, options, cluster, names)
        tell("the server has ended")


def _serve_alone(config: EngineConfig, options: ServerConfig, names: tuple[str, ...]) -> None:
    from hybrid.server.app import build
    from hybrid.server.log import tell
    from hybrid.server.service import Service
    from hybrid.server.telemetry import Telemetry
    from hybrid.serving.llm import LLM

    service = Service(options, names, Telemetry.open() if options.telemetry else None)
    load = partial(LLM.from_config, config, notice=tell)
    try:
        process = _run(options, names, build(service), service, load, lambda llm: service.described())
    finally:
        service.close()
    if process.lost:  # not exit code 2, which says that starting again is of no use
        tell(f"error: {one_line(process.error)}")
    if service.abandoned:  # a thread in a step that cannot be ended would keep the process
        tell("the server has ended, and with it a step that could not be ended")
        logging.shutdown()
        os._exit(1)
    if process.lost:
        raise SystemExit(1)
    if process.error is not None:
        raise process.error


def _serve_replicas(
    config: EngineConfig, options: ServerConfig, cluster: ClusterConfig, names: tuple[str, ...]
) -> None:
    from hybrid.cluster.front import Front
    from hybrid.cluster.on_ray import RayCluster, require_ray
    from hybrid.server.gate import Gate

    require_ray()
    front, ray = Front(options, cluster, names), RayCluster(cluster)
    load = partial(ray.open, config, options, names)
    try:
        process = _run(options, names, Gate(front, options), front, load, lambda replicas: replicas.described)
    finally:
        front.close()
        ray.close()
    if process.error is not None:
        raise process.error


def _run(
    options: ServerConfig,
    names: tuple[str, ...],
    app: App,
    service: Served[T],
    load: Load[T],
    describe: Callable[[T], list[str]],
) -> Process[T]:
    """Listen, load and answer until a signal. describe: what is loaded, for people."""
    from hybrid.server.log import tell
    from hybrid.server.process import Process, listen

    keys = options.all_keys()
    with listen(options) as listening:
        address = _address(options, listening.getsockname()[1])
        tell(f"listening at {address} while the model is loaded; {address}/ready tells when it is there")
        if not keys and options.host not in ("127.0.0.1", "::1", "localhost"):
            tell("warning: there is no API key: whoever reaches this address may use the model; --api-key sets one")

        def on_ready(loaded: T) -> None:
            for line in [*describe(loaded), _how_to_ask(address, names[0], bool(keys))]:
                tell(line)

        process = Process(app, service, load, on_ready, tell)
        with ending_signals(process.handle_exit):
            process.run([listening])
        return process


def _address(options: ServerConfig, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _how_to_ask(address: str, name: str, with_key: bool) -> str:
    key = " -H 'Authorization: Bearer KEY'" if with_key else ""
    asked = {"model": name, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64}
    return (
        f"ready at {address}; open it in a browser, or ask it:\n\n  curl {address}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(asked))}\n"
    )
