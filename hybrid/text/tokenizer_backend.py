"""The compiled tokenizer behind ours: read within bounds, and whatever goes wrong in it a named error."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import ConfigError, HybridError
from hybrid.files.reading import Reading, read_file

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = Reading(256 << 20, "restore the file", streams=False)
_MAX_GROWTH = 1000  # characters that may be made of one; tables of Unicode make up to 33
_MAX_COPIES = 16  # of a text, that a tokenizer makes one sequence of


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises ConfigError."""
    return parse_backend(read_file(path, TOKENIZER_FILE), path)


def parse_backend(data: bytes, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes. path: what errors name."""
    import tokenizers

    with backend_errors(f"{path} cannot be read", "restore the file", ConfigError):
        backend = tokenizers.Tokenizer.from_buffer(data)
    _check_growth(backend, path)
    return backend


@contextmanager
def backend_errors(what: str, advice: str, error: type[HybridError]) -> Iterator[None]:
    """What the compiled code raises as one line: plain Exceptions, and for a panic a BaseException."""
    try:
        yield
    except Exception as problem:
        reason = problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        reason = problem  # type: ignore[assignment]
    else:
        return
    line = " ".join(str(reason).split())[:300] or type(reason).__name__
    raise error(f"{what} ({line}); {advice}") from None


def has_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether it decodes pieces whose characters stand for bytes."""
    return '"ByteLevel"' in json.dumps(_state(backend.decoder))


def _check_growth(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Refuse one that makes gigabytes of a short text: the compiled code would end the process."""
    for name in ("normalizer", "decoder"):
        part = getattr(backend, name)
        growth = _growth(_state(part)) if part is not None else 1
        if growth > _MAX_GROWTH:
            raise ConfigError(
                f"{path}: its {name} may make {growth:.3g} characters of one, {_MAX_GROWTH} are allowed; "
                "fetch the file again"
            )
    copies = _copies(_state(backend.post_processor)) if backend.post_processor is not None else 1
    if copies > _MAX_COPIES:
        raise ConfigError(f"{path}: its post_processor repeats a text {copies} times, {_MAX_COPIES} are allowed")


def _state(part: Any) -> Any:
    try:
        return json.loads(part.__getstate__())
    except Exception:  # parts written in Python have none, and are not in files
        return {}


def _growth(part: Any) -> float:
    """How many characters a normalizer or a decoder makes of one at most."""
    if not isinstance(part, Mapping):
        return 1
    growth = 1.0
    for inner in (*part.get("normalizers", ()), *part.get("decoders", ())):
        growth = min(growth * _growth(inner), 1e300)
    kind = part.get("type")
    if kind == "Replace":
        pattern, content = part.get("pattern", {}), str(part.get("content", ""))
        replaced = len(pattern.get("String", "")) if isinstance(pattern, Mapping) else 0
        growth *= max(1, len(content) / replaced) if replaced else 1 + len(content)
    elif kind == "Precompiled":
        growth *= _longest_replacement(str(part.get("precompiled_charsmap") or ""))
    return growth


def _longest_replacement(charsmap: str) -> int:
    """Of a table of sentencepiece: the length of a trie, the trie, and texts that end with zeros."""
    try:
        table = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1
    return max(1, *map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))


def _copies(part: Any) -> int:
    if not isinstance(part, Mapping):
        return 1
    copies = 1
    for inner in part.get("processors", ()):
        copies = min(copies * _copies(inner), 1 << 60)
    pieces = part.get("single") or ()
    return copies * max(1, sum("Sequence" in piece for piece in pieces))
