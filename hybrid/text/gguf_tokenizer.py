"""The tokenizer of a GGUF file as the tokenizer.json that its model had: from its vocabulary and merges or scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.files.gguf import read_gguf_header
from hybrid.text.gguf_patterns import CUTTINGS

MODELS = ("gpt2", "llama", "gemma4")  # pairs of bytes with merges; pieces with scores; pieces with merges
_PIECES = ("sarvam-moe",)  # names of patterns of vocabularies of pieces that are called gpt2
SPACE = "▁"  # what stands for a space in pieces
_PREFIX = "tokenizer.ggml."
_UNKNOWN, CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens that a text may hold whole
_MAX_PIECE = 256  # characters of a piece that is cut in two in every place


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokens. Ids that are not told are None."""

    path: Path
    model: str
    tokens: list[str]
    types: list[int]
    metadata: Mapping[str, Any]

    def id(self, name: str) -> int | None:
        """The id of a token by its name in the metadata, such as bos."""
        value = self.metadata.get(f"{_PREFIX}{name}_token_id")
        if value is None or (type(value) is int and value in (-1, 0xFFFF_FFFF)):
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self.refuse(f"{_PREFIX}{name}_token_id is {value!r:.40}, there are {len(self.tokens)} tokens")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(_PREFIX + name, default)
        if type(value) is not bool:
            raise self.refuse(f"{_PREFIX}{name} is {value!r:.40}, it must be true or false")
        return value

    def values(self, name: str, kind: type) -> list[Any]:
        found = self.metadata.get(_PREFIX + name, [])
        if not isinstance(found, list) or not all(type(value) is kind for value in found):
            raise self.refuse(f"{_PREFIX}{name} is not a list of {kind.__name__}")
        return found

    def refuse(self, problem: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: the tokenizer in it cannot be used: {problem}; take another copy of the model"
        )


def read_vocabulary(path: Path) -> Vocabulary | None:
    """The vocabulary in a GGUF file, None where there is none. Raises ConfigError and WeightsError."""
    metadata = read_gguf_header(path).metadata
    model = metadata.get(f"{_PREFIX}model", "none")
    if model in ("none", "no_vocab"):
        return None
    found = Vocabulary(path, str(model), [], [], metadata)
    if model not in MODELS:
        raise found.refuse(f"{_PREFIX}model is {model!r:.40}, known are {', '.join(MODELS)}")
    found.tokens.extend(found.values("tokens", str))
    found.types.extend(found.values("token_type", int) or [1] * len(found.tokens))
    if not found.tokens or len(found.types) != len(found.tokens):
        raise found.refuse(f"it has {len(found.tokens)} tokens and {len(found.types)} types of tokens")
    return found


def make_tokenizer(vocabulary: Vocabulary) -> bytes:
    """The contents of a tokenizer.json. Raises ConfigError."""
    pieces = vocabulary.model != "gpt2" or vocabulary.metadata.get(f"{_PREFIX}pre") in _PIECES
    own = _of_pieces(vocabulary) if pieces else _of_bytes(vocabulary)
    tokenizer = {"version": "1.0", "added_tokens": list(_added(vocabulary)), **own}
    return json.dumps(tokenizer, ensure_ascii=False).encode(errors="surrogatepass")


def adds_bos(vocabulary: Vocabulary) -> bool:
    cutting = CUTTINGS.get(str(vocabulary.metadata.get(f"{_PREFIX}pre")))
    default = vocabulary.model != "gpt2" if cutting is None else cutting.adds_bos
    return vocabulary.flag("add_bos_token", default)


def _of_bytes(vocabulary: Vocabulary) -> dict[str, Any]:
    pre = vocabulary.metadata.get(f"{_PREFIX}pre")
    if pre not in CUTTINGS:
        raise vocabulary.refuse(f"{_PREFIX}pre is {pre!r:.40}, known are {', '.join(sorted(CUTTINGS))}")
    cutting, ids = CUTTINGS[pre], _ids(vocabulary)
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in cutting.patterns
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, bytes_]},
        "post_processor": _template(vocabulary, adds_bos(vocabulary)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(ids, _merges(vocabulary, ids), ignore_merges=cutting.whole),
    }


def _of_pieces(vocabulary: Vocabulary) -> dict[str, Any]:
    ids, unknown = _ids(vocabulary), vocabulary.id("unknown")
    merges = _merges_of(ids, _scores(vocabulary)) if vocabulary.model == "llama" else _merges(vocabulary, ids)
    prefix = vocabulary.flag("add_space_prefix", vocabulary.model == "llama")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), replace],
        },
        "pre_tokenizer": None,
        "post_processor": _template(vocabulary, adds_bos(vocabulary)),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(
            ids,
            merges,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """By text; of two tokens with one text, a text is cut into the first."""
    found: dict[str, int] = {}
    for index, token in enumerate(vocabulary.tokens):
        found.setdefault(token, index)
    return found


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    defaults = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {**defaults, **options, "vocab": ids, "merges": merges}


def _pair(merge: str) -> tuple[str, str]:
    """The two texts of a merge; only the first may begin with a space."""
    first, _, second = merge[1:].partition(" ")
    return merge[:1] + first, second


def _merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Those that the file tells."""
    pairs = (_pair(merge) for merge in vocabulary.values("merges", str))
    return [pair for pair in pairs if _is_known(pair, ids)]


def _scores(vocabulary: Vocabulary) -> list[float]:
    scores = vocabulary.values("scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise vocabulary.refuse(f"it has {len(vocabulary.tokens)} tokens and {len(scores)} scores")
    return scores


def _is_known(merge: tuple[str, str], ids: Mapping[str, int]) -> bool:
    """Whether both texts and what is made of them are tokens: others make no token of a text."""
    return merge[0] in ids and merge[1] in ids and "".join(merge) in ids


def _merges_of(ids: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs that make a piece, those of the highest score first."""
    ordered = sorted(ids, key=lambda piece: (-scores[ids[piece]], ids[piece]))
    return [pair for piece in ordered for pair in _cuts(piece, ids)]


def _cuts(piece: str, ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if len(piece) <= _MAX_PIECE:
        pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        yield from (pair for pair in pairs if pair[0] in ids and pair[1] in ids)


def _added(vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """Tokens that are found in a text before it is cut."""
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if token and kind in (_UNKNOWN, CONTROL, _USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            yield {"id": index, "content": token, **flags, "special": kind != _USER_DEFINED}


def _template(vocabulary: Vocabulary, with_bos: bool) -> dict[str, Any] | None:
    """What is put before and behind a text."""
    bos = vocabulary.id("bos") if with_bos else None
    eos = vocabulary.id("eos") if vocabulary.flag("add_eos_token", False) else None
    if bos is None and eos is None:
        return None
    first, last = ([] if index is None else [_special(vocabulary, index)] for index in (bos, eos))
    ids = {index for index in (bos, eos) if index is not None}
    texts = {vocabulary.tokens[index]: index for index in ids}
    return {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last],
        "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, *last],
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in texts.items()},
    }


def _special(vocabulary: Vocabulary, index: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": vocabulary.tokens[index], "type_id": 0}}
