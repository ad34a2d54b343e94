"""Eight layers of Qwen3-30B-A3B with a tokenizer: a packed store in int8, and the same weights as a GGUF file in Q8_0.

usage: python bench/server_slice.py DIR

What `bench/serve.py` compares servers with: `hybrid serve --model-path DIR/int8`, `llama-server -m DIR/q8_0.gguf`. Each
word of its prompts is a token, as in a vocabulary of a real model; the weights, and so the answers, are random. Takes
some minutes, 22 GB of the disk meanwhile and 12 GB in the end.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from gguf_file import END, write_gguf
from load import WORDS
from synthetic_checkpoint import make_config, write_checkpoint

from hybrid.files import write_json
from hybrid.formats.mix import parse_mix
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import pack

LAYERS = 8


def tokenizer(size: int, end: int) -> dict[str, Any]:
    """The content of a tokenizer.json: bytes, the words of the load with the space before them, and others that stand
    for themselves. end: the token that ends a text.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    tokens, merges = sorted(ByteLevel.alphabet()), list[list[str]]()
    for word in WORDS:
        known = "Ġ"
        for letter in word:
            if known + letter not in tokens:
                merges.append([known, letter])
                tokens.append(known + letter)
            known += letter
    tokens += [f"Ġx{number}" for number in range(size - len(tokens))]
    tokens[end] = END
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}


def main() -> None:
    folder = Path(sys.argv[1])
    source = folder / "checkpoint"
    config = make_config("qwen3-30b-a3b", layers=LAYERS)
    write_checkpoint(source, config, seed=0)
    write_json(source / "tokenizer.json", tokenizer(config["vocab_size"], config["eos_token_id"]))
    checkpoint = Checkpoint.open(source)
    pack(checkpoint, folder / "int8", parse_mix("int8", checkpoint.native))
    write_gguf(checkpoint, folder / "q8_0.gguf", "Q8_0")
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
