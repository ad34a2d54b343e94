"""The text model of a model of more than text, whose vision or audio towers are not used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec

MODULE = "language_model"  # the module of the whole that holds the text model
_TIED = "tie_word_embeddings"
Family = Callable[[Mapping[str, Any]], ModelSpec]


def read_text_part(
    config: Mapping[str, Any],
    model_type: str,
    families: Mapping[str, Family],
    *,
    tied: bool = False,
    either: bool = False,
) -> ModelSpec:
    """The spec of `text_config`, whose `model_type` must be one of these families, the first if it has none.

    tied: whether the head is the embedding where nothing says so. either: whether it is where the text alone says so
    and the whole says otherwise; what the whole says holds if not.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            "config.json: text_config is missing or no object; it must describe the text model: "
            "take the complete config.json of the model"
        )
    family = Fields(text, "text_config.").choice("model_type", default=next(iter(families)), allowed=tuple(families))
    whole = Fields(config)
    held = whole.flag(_TIED, default=tied)
    if either or not whole.has(_TIED):
        held = Fields(text, "text_config.").flag(_TIED) or held
    try:
        spec = families[family]({**text, _TIED: held})
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.json: ", "config.json: text_config: ", 1)) from None
    return replace(spec.inside(MODULE), model_type=model_type)
