"""Mistral's tokenizers that were published with the pattern of another: told of, or corrected, as `transformers` does.

The tokenizer.json of Mistral Small 3.1 and others, which versions of `transformers` before 5 wrote, cuts texts into
words with a pattern that is not the one that the model was trained with. `transformers` says so and goes on, unless
`fix_mistral_regex` in tokenizer_config.json is true: then it takes the right pattern.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import ConfigError
from hybrid.text.gguf_patterns import TEKKEN
from hybrid.text.special_tokens import read_json

if TYPE_CHECKING:
    import tokenizers

FIELD = "fix_mistral_regex"
_FAMILIES = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
_MANY = 100_000  # tokens: older vocabularies of Mistral have fewer, and no pattern
_BEFORE_5 = re.compile(r"[0-4]\.|5(\.0)*\.?(dev|a|b|rc)")


def correct_pattern(backend: tokenizers.Tokenizer, model_path: Path, notice: Callable[[str], None] | None) -> None:
    """Give a tokenizer the pattern that it should have, where tokenizer_config.json asks for it. notice: told in a line
    of a pattern that may be wrong, where that says nothing. Raises ConfigError.
    """
    if not _may_be_wrong(backend, model_path):
        return
    wanted = read_json(model_path / "tokenizer_config.json").get(FIELD)
    if wanted not in (None, True, False):
        raise ConfigError(
            f"{model_path / 'tokenizer_config.json'}: {FIELD} is {wanted!r:.80}; it must be true or false"
        )
    if wanted:
        _take_pattern(backend)
    elif wanted is None and notice:
        notice(
            f"note: the tokenizer.json of {model_path} may cut texts otherwise than its model learnt; tokens are those "
            f'of the file, as transformers has them; "{FIELD}": true in tokenizer_config.json corrects them'
        )


def _may_be_wrong(backend: tokenizers.Tokenizer, model_path: Path) -> bool:
    """Whether it is of a model whose tokenizer.json an old version has written, and cuts words in another way."""
    if backend.get_vocab_size() <= _MANY or backend.pre_tokenizer is None:
        return False
    config = read_json(model_path / "config.json")
    version = config.get("transformers_version")
    old = not isinstance(version, str) or not version or _BEFORE_5.match(version)
    return bool(config.get("model_type") in _FAMILIES and old and _first_pattern(backend) != TEKKEN)


def _first_pattern(backend: tokenizers.Tokenizer) -> str | None:
    """The regular expression by which a tokenizer cuts first."""
    state: Any = json.loads(backend.pre_tokenizer.__getstate__())
    first = (state.get("pretokenizers") or [state])[0]
    pattern = first.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, dict) else None


def _take_pattern(backend: tokenizers.Tokenizer) -> None:
    """In place of the first of several steps, or before the only one."""
    from tokenizers import Regex, pre_tokenizers

    present, split = backend.pre_tokenizer, pre_tokenizers.Split(Regex(TEKKEN), "isolated")
    if isinstance(present, pre_tokenizers.Sequence):
        present[0] = split
        backend.pre_tokenizer = present
        return
    if isinstance(present, pre_tokenizers.Metaspace):
        present = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, present])
