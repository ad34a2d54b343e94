"""Text to tokens and back, through the tokenizer files of a model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import ConfigError, RequestError
from hybrid.files import is_file
from hybrid.text.convert import CONVERTED, convert_tokenizer, needs_conversion
from hybrid.text.mistral_pattern import correct_pattern
from hybrid.text.special_tokens import read_json, read_special_tokens
from hybrid.text.tokenizer_backend import backend_errors, has_byte_level, parse_backend, read_backend

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Encodes and decodes. `bos_id` is None when the model names no token that begins a text; `eos_ids` is empty or has
    the one that ends a text.

    adds_bos: a text begins with `bos_id`, whether or not the backend adds it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None = None,
        eos_id: int | None = None,
        adds_bos: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = frozenset(() if eos_id is None else (eos_id,))
        self._adds_bos = adds_bos and bos_id is not None
        added = backend.get_added_tokens_decoder()
        self.added: Mapping[str, int] = {token.content: i for i, token in added.items()}
        self.specials: Mapping[str, int] = {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids; `special_tokens` lets the tokenizer add its own (a bos token, for example).

        Raises RequestError for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
                "which no UTF-8 text can hold; remove it"
            ) from None
        with backend_errors("the tokenizer fails on this text", "change the text, or its tokenizer.json", RequestError):
            ids = list(self._backend.encode(text, add_special_tokens=special_tokens).ids)
        if special_tokens and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are not UTF-8 become U+FFFD."""
        with backend_errors("the tokenizer fails on these tokens", "restore its tokenizer.json", RequestError):
            return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece

    @property
    def byte_level(self) -> bool:
        """Whether the characters of a piece stand for bytes."""
        return has_byte_level(self._backend)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)


def load_tokenizer(
    model_path: Path, store_path: Path | None = None, notice: Callable[[str], None] | None = None
) -> Tokenizer | None:
    """The tokenizer of a model directory, None where it has no tokenizer files. Raises ConfigError.

    store_path: the store of the model, which has the tokenizer.json that was made of other files. notice: told in a
    line of a tokenizer that may cut texts wrongly.
    """
    backend = _load_backend(model_path, store_path)
    if backend is None:
        return None
    correct_pattern(backend, model_path, notice)
    tokens = read_special_tokens(model_path)
    with backend_errors(f"the tokens of {model_path} cannot be added", "restore its tokenizer files", ConfigError):
        tokens.add_to(backend)
    texts = {**tokens.defaults, **tokens.texts()}
    bos_id, eos_id = (
        backend.token_to_id(texts[name]) if name in texts else None for name in ("bos_token", "eos_token")
    )
    adds_bos = read_json(model_path / "tokenizer_config.json").get("add_bos_token") is True
    return Tokenizer(backend, bos_id, eos_id, adds_bos)


def read_eos_ids(model_path: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that end a text: from generation_config.json, else config.json, else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(model_path / name)
        for values in (config, config.get("text_config")):
            eos = values.get("eos_token_id") if isinstance(values, dict) else None
            if eos is not None and (ids := _token_ids(eos, model_path / name)):
                return ids
    return tokenizer.eos_ids if tokenizer else frozenset()


def _load_backend(model_path: Path, store_path: Path | None) -> tokenizers.Tokenizer | None:
    if is_file(model_path / CONVERTED):
        return read_backend(model_path / CONVERTED)
    if not needs_conversion(model_path):
        return None
    if store_path and is_file(store_path / CONVERTED):
        return read_backend(store_path / CONVERTED)
    return parse_backend(convert_tokenizer(model_path), model_path)


def _token_ids(eos: Any, path: Path) -> frozenset[int]:
    """One id or a list of them. Some files write -1 for none."""
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in ids):
        raise ConfigError(f"{path}: eos_token_id is {eos!r:.80}; it must be a token id or a list of them")
    return frozenset(token for token in ids if token >= 0)
