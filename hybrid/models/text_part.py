"""The text model of a model of more than text, whose vision or audio towers are not used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec

MODULE = "language_model"  # the module of the whole that holds the text model
Family = Callable[[Mapping[str, Any]], ModelSpec]


def read_text_part(config: Mapping[str, Any], model_type: str, families: Mapping[str, Family]) -> ModelSpec:
    """The spec of `text_config`, whose `model_type` must be one of these families, the first if it has none."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            "config.json: text_config is missing or no object; it must describe the text model: "
            "take the complete config.json of the model"
        )
    family = Fields(text, "text_config.").choice("model_type", default=next(iter(families)), allowed=tuple(families))
    tied = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    try:
        spec = families[family]({**text, **tied})  # what the whole says of the head holds
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.json: ", "config.json: text_config: ", 1)) from None
    return replace(spec.inside(MODULE), model_type=model_type)
