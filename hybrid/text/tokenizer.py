"""Text to tokens and back, through the tokenizer files of a model directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import ConfigError, RequestError
from hybrid.text.special_tokens import read_json, read_special_tokens

if TYPE_CHECKING:
    import tokenizers

_SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


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
        ids = list(self._backend.encode(text, add_special_tokens=special_tokens).ids)
        if special_tokens and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)


def load_tokenizer(model_path: Path) -> Tokenizer | None:
    """The tokenizer of a model directory, None where it has no tokenizer files. Raises ConfigError."""
    backend = _load_backend(model_path)
    if backend is None:
        return None
    tokens = read_special_tokens(model_path)
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


def import_transformers(module: str) -> Any:
    """Import a module of transformers without its notice that torch is missing: nothing here needs torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return import_module(module)


def _load_backend(model_path: Path) -> tokenizers.Tokenizer | None:
    fast = model_path / "tokenizer.json"
    if fast.is_file():
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_file(str(fast))
        except Exception as error:  # the Rust side raises plain Exception
            raise ConfigError(f"{fast} cannot be read ({_first_line(error)}); restore the file") from None
    if any((model_path / name).is_file() for name in _SLOW_FILES):
        return _convert_backend(model_path)
    return None


def _convert_backend(model_path: Path) -> tokenizers.Tokenizer:
    """For models without tokenizer.json (sentencepiece, for example): transformers converts their files."""
    loader = import_transformers("transformers").AutoTokenizer
    logging = import_transformers("transformers.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it tries on the way is nobody's concern
    try:
        backend: tokenizers.Tokenizer = loader.from_pretrained(str(model_path), local_files_only=True).backend_tokenizer
        return backend
    except Exception as error:  # many kinds, one meaning
        raise ConfigError(
            f"the tokenizer files in {model_path} cannot be read ({_first_line(error)}); "
            "add the tokenizer.json of the model"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _token_ids(eos: Any, path: Path) -> frozenset[int]:
    """One id or a list of them. Some files write -1 for none."""
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in ids):
        raise ConfigError(f"{path}: eos_token_id is {eos!r:.80}; it must be a token id or a list of them")
    return frozenset(token for token in ids if token >= 0)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
