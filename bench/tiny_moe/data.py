"""Tokenizer training and packing of documents into rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from corpus import CHUNK, END, documents
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = [END, "<|im_start|>", "<|im_end|>"]
# The split rule of the Qwen tokenizers. Digits stay single, which makes small sums learnable.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(vocab_size: int, count: int = 20_000) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(documents(count, seed=1)), trainer)
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of an exported model."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def encode(tokenizer: Tokenizer, count: int, progress: Progress) -> list[np.ndarray]:
    """All documents as token arrays, each closed by the end marker."""
    task = progress.add_task("writing text", total=count)
    end = tokenizer.token_to_id(END)
    arrays = []
    for block in documents(count, seed=0):
        for encoding in tokenizer.encode_batch_fast(block):
            arrays.append(np.array([*encoding.ids, end], dtype=np.uint16))
        progress.advance(task, CHUNK)
    progress.remove_task(task)
    return arrays


class Rows:
    """Endless rows of fixed length that always start at the start of a document.

    A document cut off at the end of a row is repeated at the start of the next, so that every one is seen
    whole and from position zero, which is how it will be prompted.
    """

    def __init__(self, arrays: list[np.ndarray], position: int = 0) -> None:
        self.arrays = arrays
        self.position = position

    def row(self, length: int) -> np.ndarray:
        """The next row."""
        parts, filled = [], 0
        while filled < length:
            array = self.arrays[self.position % len(self.arrays)]
            parts.append(array)
            filled += len(array)
            whole = filled <= length or len(parts) == 1
            self.position += int(whole)
        return np.concatenate(parts)[:length]

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """A batch with one token more than the length, for the shifted targets."""
        return torch.from_numpy(np.stack([self.row(length + 1) for _ in range(rows)]).astype(np.int64))

    def batches(self, rows: int, length: int) -> Iterator[torch.Tensor]:
        """Endless batches."""
        while True:
            yield self.batch(rows, length)
