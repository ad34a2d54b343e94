"""Chat templates rendered in a process of their own, within limits of time, memory and length.

One process serves all templates, one render at a time; threads that render at once get one each, and up to two are kept
for later. A process that hits a limit is given up.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybrid.errors import RequestError

_PROGRAM = Path(__file__).with_name("template_process.py")
_LENGTH_BYTES = 8
_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH")  # all that the process needs; what else is there are the user's secrets
_KEPT = 2
_PATIENCE = 60  # seconds for a process that gets no processor, or is stopped


@dataclass(frozen=True)
class Limits:
    """Of one render: seconds of processor time, bytes of memory, characters of text."""

    seconds: int = 2
    memory: int = 1 << 29
    length: int = 1 << 26


def render(source: str, variables: Mapping[str, Any], limits: Limits | None = None) -> str:
    """Render a Jinja template with variables of plain data. Raises RequestError."""
    limits = limits or Limits()
    try:
        request = json.dumps([source, variables, asdict(limits)]).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"this is no data for a chat template ({_one_line(error)}); give plain data") from None
    process = _take()
    try:
        reply = process.ask(request, limits)
    except BaseException:  # Ctrl-C too: an answer that nobody reads must not be taken for the next one
        process.end()
        raise
    if "limit" in reply:
        process.end()
        raise RequestError(_too_much(reply["limit"], limits))
    _put_back(process)
    if "text" not in reply:
        reason = " ".join(str(reply.get("error")).split())
        raise RequestError(f"the chat template refuses these messages: {reason}")
    return str(reply["text"])


class _Process:
    def __init__(self) -> None:
        # -I and -S: nothing of the user's folders or variables is run or searched.
        command = [sys.executable, "-I", "-S", str(_PROGRAM), *_folders("jinja2", "markupsafe")]
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            self._socket, theirs = socket.socketpair()
        except OSError as error:
            raise _cannot_start(error) from None
        self._socket.settimeout(_PATIENCE)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=kept,
                process_group=0,
            )
        except OSError as error:
            self._socket.close()
            raise _cannot_start(error) from None
        finally:
            theirs.close()

    def ask(self, request: bytes, limits: Limits) -> dict[str, Any]:
        try:
            self._socket.sendall(len(request).to_bytes(_LENGTH_BYTES) + request, socket.MSG_NOSIGNAL)
            length = int.from_bytes(self._receive(_LENGTH_BYTES))
            if length > 16 * limits.length:
                return {"limit": "length"}
            reply = json.loads(self._receive(length))
        except TimeoutError:
            return {"limit": "patience"}
        except (EOFError, OSError):
            return {"limit": self._why_it_ended()}
        except ValueError:
            return {"limit": "sense"}
        return reply if isinstance(reply, dict) else {"limit": "sense"}

    def end(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """In a forked child, whose process this is not."""
        self._socket.close()
        self._process.returncode = 0  # no warning that it still runs

    def _receive(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._socket.recv(min(length, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "seconds"
        return f"exit code {code}"


def _cannot_start(error: OSError) -> RequestError:
    return RequestError(
        f"the process that renders chat templates cannot be started ({error.strerror}: {sys.executable}); "
        "render the messages yourself and give the prompt"
    )


_idle: list[_Process] = []


def _take() -> _Process:
    with suppress(IndexError):
        return _idle.pop()
    return _Process()


def _put_back(process: _Process) -> None:
    if len(_idle) < _KEPT:
        _idle.append(process)
    else:
        process.end()


def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget_all() -> None:
    while _idle:
        _idle.pop().forget()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)


def _folders(*modules: str) -> list[str]:
    """Where these modules are found."""
    specs = [find_spec(module) for module in modules]
    return sorted({str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin})


def _too_much(limit: str, limits: Limits) -> str:
    reason = {
        "seconds": f"takes more than {limits.seconds} s of processor time",
        "memory": f"needs more than {limits.memory >> 20} MiB of memory",
        "length": f"makes a prompt of more than {limits.length} characters",
        "patience": f"has no answer after {_PATIENCE} s",
    }.get(limit, f"ended its process ({limit})")
    return f"the chat template {reason}; give fewer or shorter messages, or another template"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
