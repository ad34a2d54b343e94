"""The program of the process that converts tokenizer files. It is started by its path, so it imports nothing of ours.

`transformers` reads the files of a model directory, and what would be its tokenizer.json goes to standard output. It is
told never to run code of the directory and never to ask; and there is nobody to ask: standard input is empty.
"""

from __future__ import annotations

import json
import os
import resource
import sys

_MEMORY = 32 << 30  # addresses; torch, which transformers may import, takes many and uses few
_SECONDS = 600


def _main(path: str) -> None:
    for which, value in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever is printed is no answer
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        answer = {"tokenizer": tokenizer.backend_tokenizer.to_str()}
    except BaseException as error:  # many kinds, one meaning; a panic of compiled code is no Exception
        answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    with open(answers, "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    sys.path += sys.argv[2:]
    _main(sys.argv[1])
