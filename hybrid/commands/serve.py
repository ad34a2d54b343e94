"""`hybrid serve`: a model answers over HTTP."""

from __future__ import annotations

import json
import logging
import os
import shlex
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hybrid.commands.console import one_line, say
from hybrid.commands.flags import command, new_app
from hybrid.config import EngineConfig, check_config
from hybrid.errors import ConfigError
from hybrid.server.config import ServerConfig
from hybrid.settings import check_settings

if TYPE_CHECKING:
    from hybrid.serving.llm import LLM

app = new_app()
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
EMBEDDED_NAME = "embedded"


@command(app, "the server has ended")
def serve(config: EngineConfig, options: ServerConfig) -> None:
    """Answer over HTTP, as OpenAI's API does: any client of that API can be pointed at it."""
    check_settings(options)
    check_config(config)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ConfigError(f"hybrid serve needs {', '.join(missing)}; install them: pip install 'hybrid-moe[server]'")
    keys = options.all_keys()
    from hybrid.server.process import Process, listen
    from hybrid.server.service import Service
    from hybrid.server.telemetry import Telemetry
    from hybrid.serving.llm import LLM

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    service = Service(
        options, options.served_model_name or (_name(config),), Telemetry.open() if options.telemetry else None
    )
    with listen(options) as listening:
        address = _address(options, listening.getsockname()[1])
        say(f"listening at {address} while the model is loaded; {address}/ready tells when it is there")
        if not keys and options.host not in ("127.0.0.1", "::1", "localhost"):
            say("warning: there is no API key: whoever reaches this address may use the model; --api-key sets one")
        process = Process(
            service,
            lambda progress: LLM.from_config(config, progress, say),
            partial(_say_ready, address, service.names[0], bool(keys)),
            say,
        )
        try:
            process.run([listening])
        finally:
            service.close()
    if process.lost:  # not exit code 2, which says that starting again is of no use
        say(f"error: {one_line(process.error)}")
    if service.abandoned:  # a thread in a step that cannot be ended would keep the process
        say("the server has ended, and with it a step that could not be ended")
        os._exit(1)
    if process.lost:
        raise SystemExit(1)
    if process.error is not None:
        raise process.error
    say("the server has ended")


def _name(config: EngineConfig) -> str:
    return config.model_path.absolute().name if config.model_path else EMBEDDED_NAME


def _address(options: ServerConfig, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say_ready(address: str, name: str, with_key: bool, llm: LLM) -> None:
    from hybrid.plan.text import summary_text

    plan, key = llm.engine.plan, " -H 'Authorization: Bearer KEY'" if with_key else ""
    asked = {"model": name, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64}
    say(summary_text(plan))
    say(f"{llm.describe()}; {plan.isa} on {plan.threads} thread{'s' * (plan.threads != 1)}")
    say(
        f"ready at {address}; open it in a browser, or ask it:\n\n  curl {address}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(asked))}\n"
    )
