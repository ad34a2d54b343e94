"""What a server is told: where it listens, who may ask, and the limits of what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybrid.errors import ConfigError
from hybrid.files.reading import Reading, read_file
from hybrid.settings import setting

_KEYS = Reading(1 << 20, "give a text file with one key in each line", prefix="--api-key-file")
LOGS = ("text", "json", "none")
_URGENT = "urgent"  # behind a key in the file
EMBEDDED_NAME = "embedded"


@dataclass(frozen=True)
class ServerConfig:
    """Settings of `hybrid serve` alone."""

    GROUP: ClassVar[str] = "server"
    COMMAND: ClassVar[str] = "serve"

    host: str = setting("127.0.0.1", "Address to listen at; 0.0.0.0 is every one of this machine.")
    port: int = setting(8000, "Port to listen at; 0 takes a free one.", minimum=0, maximum=65535)
    api_key: tuple[str, ...] = setting((), "A key that clients must give", secret=True)
    api_key_file: Path | None = setting(
        None, "File with such keys, one in each line; 'KEY urgent' may ask for a priority below 0."
    )
    open_metrics: bool = setting(False, "Let /metrics be read without a key.")
    served_model_name: tuple[str, ...] = setting((), "What clients call the model, in place of its folder's name")
    max_queue: int = setting(256, "Completions that may wait; more are refused with 503.", minimum=0, maximum=1 << 20)
    key_requests: int | None = setting(
        None, "Completions of one API key that may run or wait; more are refused with 429.", minimum=1, maximum=1 << 20
    )
    key_tokens_per_minute: int | None = setting(
        None, "Tokens that one API key may have computed and produced in a minute.", minimum=1, maximum=1 << 40
    )
    max_body_mb: int = setting(8, "Largest request, in MiB.", minimum=1, maximum=1024)
    drain_seconds: float = setting(30.0, "How long running requests may go on after SIGTERM.", minimum=0, maximum=86400)
    step_seconds: float = setting(
        300.0, "A step that takes longer is taken for stuck: its requests fail.", minimum=0, above=True, maximum=86400
    )
    ping_seconds: float = setting(
        15.0, "A stream that is silent for so long sends a comment.", minimum=0, above=True, maximum=3600
    )
    send_seconds: float = setting(
        60.0, "A client that takes nothing for so long is cut off.", minimum=0, above=True, maximum=86400
    )
    telemetry: bool = setting(
        False, "Send a span for each request by OpenTelemetry, where OTEL_EXPORTER_OTLP_ENDPOINT says."
    )
    log: str = setting("text", f"A line on stderr for each request: one of {', '.join(LOGS)}.", choices=LOGS)

    def names_of(self, model: Path | None) -> tuple[str, ...]:
        """What clients call a model; the first is how it calls itself."""
        return self.served_model_name or (model.absolute().name if model else EMBEDDED_NAME,)

    def all_keys(self) -> dict[str, bool]:
        """All keys, those of the file too, and whether each may ask for a priority below 0. Raises ConfigError; no
        keys: whoever reaches the address may ask for anything.
        """
        keys = dict.fromkeys(self.api_key, False)
        if self.api_key_file is not None:
            lines = read_file(self.api_key_file, _KEYS).decode("utf-8", "replace").splitlines()
            found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                raise ConfigError(f"--api-key-file {self.api_key_file} has no key; write one in each line")
            for line in found:
                key, *marks = line.split()
                keys |= {key: True} if marks == [_URGENT] else {line: keys.get(line, False)}
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("--api-key: a key must be printable ASCII without spaces, and not empty")
        return keys
