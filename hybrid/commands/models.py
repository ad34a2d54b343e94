"""`hybrid models`: the families that can be loaded, and what works of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hybrid.commands.console import show, show_json
from hybrid.commands.flags import command, new_app
from hybrid.settings import check_settings, setting

if TYPE_CHECKING:
    from hybrid.models.catalog import Family

app = new_app()

COLUMNS = ("model_type", "models", "feed-forward", "GGUF architecture", "device")


@dataclass(frozen=True)
class ModelsOptions:
    """How the list is printed."""

    COMMAND: ClassVar[str] = "models"
    GROUP: ClassVar[str] = "output"

    json: bool = setting(False, "Print one JSON object.")


@command(app)
def models(options: ModelsOptions) -> None:
    """List the families of models that can be loaded, and what works of each."""
    check_settings(options)
    if options.json:
        show_json(report(), indent=1)
    else:
        show("\n".join([*table(), "", *others()]))


def table() -> list[str]:
    """A row for each family."""
    from hybrid.commands.tables import markdown
    from hybrid.models.catalog import all_families

    return markdown(COLUMNS, [_row(family) for family in all_families()], [True] * len(COLUMNS))


def others() -> list[str]:
    """What does not depend on the family: formats, and what a chat template decides."""
    found = shared()
    return [
        "formats of weights: " + ", ".join(found["formats"]),
        "published quantisations: " + ", ".join(found["quantisations"]),
        "told by the chat template: calls of tools (" + ", ".join(found["tools"]) + "),",
        "  reasoning (" + ", ".join(found["reasoning"]) + ")",
    ]


def shared() -> dict[str, list[str]]:
    """The same as lists of words."""
    from hybrid.formats import FORMATS
    from hybrid.text.answer_format import DIALECTS, HARMONY, REASONING_MARKS
    from hybrid.weights.checkpoints.published import KNOWN

    return {
        "formats": list(FORMATS),
        "quantisations": list(KNOWN),
        "tools": [*DIALECTS, HARMONY],
        "reasoning": [*REASONING_MARKS, HARMONY],
    }


def report() -> dict[str, Any]:
    """What `--json` prints."""
    from hybrid.models.catalog import all_families

    found = [
        {
            "model_type": family.model_type,
            "models": family.name,
            "experts": family.experts,
            "gguf": _architectures(family),
            "device": not family.without_device,
            "without_device": list(family.without_device),
        }
        for family in all_families()
    ]
    return {"families": found, **shared()}


def _row(family: Family) -> tuple[str, ...]:
    device = f"no: {', '.join(family.without_device)}" if family.without_device else "yes"
    architectures = ", ".join(_architectures(family)) or "-"
    return family.model_type, family.name, "experts" if family.experts else "dense", architectures, device


def _architectures(family: Family) -> list[str]:
    """Those of GGUF files that hold such models."""
    from hybrid.weights.checkpoints.gguf_architectures import MODEL_TYPES

    return [name for name, model_types in MODEL_TYPES.items() if family.model_type in model_types]
