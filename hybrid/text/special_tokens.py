"""Tokens that only the files beside tokenizer.json know, gathered as `transformers` 5 does.

tokenizer_config.json   bos_token, eos_token and others by name; extra_special_tokens (once additional_special_tokens);
                        added_tokens_decoder, which if present makes the next two files obsolete
special_tokens_map.json names again, which replace those of tokenizer_config.json
added_tokens.json       texts and ids
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import ConfigError
from hybrid.files import is_file, read_json_object
from hybrid.text.tekken import NAMED, TEKKEN

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# What the classes of transformers take for names that no file gives.
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "CohereTokenizer": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"},
}


@dataclass(frozen=True)
class SpecialTokens:
    """What the files of a model directory say; `named` has names of the model's own as well (think_token).

    keeps: what tokenizer.json says of an id counts more than `by_id`. defaults: names that no file gives, and what the
    class of the tokenizer takes if the vocabulary has it.
    """

    named: Mapping[str, Any] = field(default_factory=dict)
    extra: tuple[Any, ...] = ()
    by_id: Mapping[int, Any] = field(default_factory=dict)
    keeps: bool = True
    defaults: Mapping[str, str] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        """Names and texts: the variables of a chat template."""
        return {name: text for name, token in self.named.items() if (text := token_text(token)) is not None}

    def add_to(self, backend: Tokenizer) -> None:
        """Make the tokenizer know them; new ids are given out in the order of ids, then names, then the others."""
        from tokenizers import AddedToken

        present = backend.get_added_tokens_decoder()
        by_id = {index: _added(token) for index, token in self.by_id.items()}
        tokens = [token for _, token in sorted(({**by_id, **present} if self.keeps else by_id).items())]
        known, exact = {token.content for token in (*present.values(), *tokens)}, set()
        for given in (*self.named.values(), *self.extra):
            token = _added(given) if isinstance(given, dict) else AddedToken(str(given), special=True)
            if token.content not in known and repr(token) not in exact:
                exact.add(repr(token))
                tokens.append(token)
        names = set(self.texts().values())
        for token in tokens:
            token.special = token.special or token.content in names
        if tokens:
            backend.add_tokens(tokens)


def read_special_tokens(model_path: Path) -> SpecialTokens:
    """Gather them from the files of a model directory. Raises ConfigError and WeightsError."""
    config = read_json(model_path / _CONFIG)
    older = "additional_special_tokens"
    if older in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop(older)
    own = {name: config.pop(name) for name in [*config] if _is_own(name, config[name])}
    own |= _take_names(config)
    keeps = "added_tokens_decoder" not in config
    if keeps:
        _merge_map(config, read_json(model_path / _MAP))
        own |= _take_names(config)
        by_id = _from_texts(read_json(model_path / _ADDED), config, model_path / _ADDED)
    else:
        by_id = _by_id(config["added_tokens_decoder"], model_path / _CONFIG)
    extra = config["extra_special_tokens"] if "extra_special_tokens" in config else config.get(older)
    named = {
        name: config.get(name) for name in (*_NAMES, *config) if name in _NAMES or _is_own(name, config[name])
    } | own
    named = {name: token for name, token in named.items() if token_text(token)}
    tokenizer_class = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    usual = NAMED if not tokenizer_class and is_file(model_path / TEKKEN) else _DEFAULTS.get(tokenizer_class, {})
    defaults = {name: text for name, text in usual.items() if name not in config}
    extra = tuple(token for token in extra if token_text(token)) if isinstance(extra, list) else ()
    return SpecialTokens(named, extra, by_id, keeps, defaults)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file. Raises WeightsError, for a link to nowhere too."""
    return read_json_object(path) if os.path.lexists(path) else {}


def token_text(token: Any) -> str | None:
    """Files write a token as its text or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_own(name: str, token: Any) -> bool:
    """Whether it is a token that a model names for itself, such as think_token."""
    return name.endswith("_token") and name not in _NAMES and isinstance(token, str)


def _take_names(config: dict[str, Any]) -> dict[str, Any]:
    """extra_special_tokens may be an object that gives names."""
    return config.pop("extra_special_tokens") if isinstance(config.get("extra_special_tokens"), dict) else {}


def _merge_map(config: dict[str, Any], tokens: dict[str, Any]) -> None:
    for name, value in tokens.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            config[name] = [*(config.get(name) or []), *value]
        else:
            config[name] = {**value, "special": True} if isinstance(value, dict) and "content" in value else value


def _by_id(decoder: Any, path: Path) -> dict[int, Any]:
    if not isinstance(decoder, dict) or not all(
        key.isdecimal() and len(key) < 20 and token_text(token) is not None for key, token in decoder.items()
    ):
        raise ConfigError(f"{path}: added_tokens_decoder is {decoder!r:.80}; it must map ids to tokens")
    return {int(key): token for key, token in decoder.items()}


def _from_texts(texts: dict[str, Any], config: dict[str, Any], path: Path) -> dict[int, Any]:
    if not all(type(index) is int and index >= 0 for index in texts.values()):
        raise ConfigError(f"{path}: it holds {texts!r:.80}; it must map texts of tokens to ids")
    extra = config.get("extra_special_tokens")
    given = [*(config.get(name) for name in _NAMES), *(extra if isinstance(extra, list) else ())]
    # An object of tokenizer_config.json is not recognised here: so it is in transformers.
    special = {token_text(token) for token in given if not (isinstance(token, dict) and "__type" in token)}
    return {
        index: {"content": text, "normalized": text not in special, "special": text in special}
        for text, index in texts.items()
    }


def _added(token: Any) -> AddedToken:
    from tokenizers import AddedToken

    if not isinstance(token, dict):
        return AddedToken(str(token))
    flags = {name: token[name] for name in _FLAGS if isinstance(token.get(name), bool)}
    return AddedToken(token["content"], **flags)
