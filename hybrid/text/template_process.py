"""The program of the process that renders chat templates. It is started by its path, so it imports nothing of ours.

A template is a program of a stranger. Jinja's sandbox keeps it from objects and files; this process keeps what it
computes within limits of time and memory, which no sandbox inside an interpreter can. On standard input, a socket, it
reads requests and writes answers: eight bytes of length, then JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # the folders of jinja2 and of what it needs, for no others are searched

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LENGTH_BYTES = 8
_MEMORY_PER_BYTE = 32  # of a request, for what is made of it before the template begins


class Generation(Extension):
    """`{% generation %}` marks what the assistant says, for those who train. It is rendered like everything else."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class PlainDict:
    """`dict` as templates may use it: without what else a class has."""

    __call__: Callable[..., Any] = staticmethod(dict)
    fromkeys: Callable[..., Any] = staticmethod(dict.fromkeys)


class PlainNamespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def make_environment() -> ImmutableSandboxedEnvironment:
    """What chat templates may expect besides Jinja itself, as `transformers` documents it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": PlainDict(),
        "namespace": PlainNamespace,
    }
    return environment


def render(source: str, variables: Mapping[str, Any], max_length: int) -> str:
    """Raises whatever the template raises, and OverflowError where its text becomes too long."""
    pieces, length = [], 0
    for piece in _compiled(source).generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_length:
            raise OverflowError
    return "".join(pieces)


def answer(request: bytes) -> dict[str, Any]:
    """The rendered text, or what hindered it: an `error` of the template's, or a `limit` that it hit."""
    try:
        source, variables, limits = json.loads(request)
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + limits["seconds"])
        _limit(resource.RLIMIT_AS, limits["memory"] + _MEMORY_PER_BYTE * len(request))
        return {"text": render(source, variables, limits["length"])}
    except MemoryError:
        return {"limit": "memory"}
    except OverflowError as error:
        return {"error": str(error)} if str(error) else {"limit": "length"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except Exception as error:  # whatever the template does wrong
        return {"error": str(error)[:2000] or type(error).__name__}


def serve(descriptor: int) -> None:
    """Answer until the other side is gone."""
    while header := _read(descriptor, LENGTH_BYTES):
        reply = json.dumps(answer(_read(descriptor, int.from_bytes(header)))).encode()
        message = memoryview(len(reply).to_bytes(LENGTH_BYTES) + reply)
        while message:
            message = message[os.write(descriptor, message) :]


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    return make_environment().from_string(source)


def _read(descriptor: int, length: int) -> bytes:
    """So many bytes, or none where the other side is gone."""
    parts: list[bytes] = []
    while length:
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no room for {name!r:.80}: names must not begin with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked decides what Ctrl-C ends
    for which in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # no file is written here, whatever a template finds
        _limit(which, 0)
    serve(0)


if __name__ == "__main__":
    _main()
