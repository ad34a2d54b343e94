"""The program of the process that tries a grammar before it is compiled. It is started by its path, so it imports
nothing of ours.

A grammar is a program of a stranger: whoever compiles it may run out of stack or memory, which would end the process.
On standard input it reads one request as JSON, on standard output it writes the answer.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # the folders of llguidance and of what it needs, for no others are searched

_STACK = 2 << 20  # less than the threads have that compile and use what passes here


class _Bytes:
    """A tokenizer whose token i is byte i; 256 ends a text."""

    eos_token_id, bos_token_id = 256, None
    special_token_ids = (256,)

    def __init__(self) -> None:
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def answer(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The same parts, those of llama.cpp's grammars as Lark's; or what is wrong with one."""
    try:
        return {"parts": [_tried(part) for part in parts]}
    except MemoryError:
        return {"limit": "memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except BaseException as error:  # a panic of the compiled code is no Exception
        return {"error": str(error)[:2000] or type(error).__name__}


def _tried(part: dict[str, Any]) -> dict[str, Any]:
    """Compile it for bytes, and look what may come first. Raises ValueError."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    if "gbnf" in part:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        part = {"lark_grammar": gbnf_to_lark(part["gbnf"])}
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=[256], slices=[])
    matcher = LLMatcher(tokenizer, json.dumps({"grammars": [part]}), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return part


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _main() -> None:
    request = json.load(sys.stdin)
    replies: list[dict[str, Any]] = []
    for which, value in (
        (resource.RLIMIT_CPU, request["seconds"]),
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _limit(which, value)
    threading.stack_size(_STACK)
    thread = threading.Thread(target=lambda: replies.append(answer(request["parts"])))
    thread.start()
    thread.join()
    print(json.dumps(replies[0]))


if __name__ == "__main__":
    _main()
