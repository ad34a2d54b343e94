"""Every file that the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(
        f"docs/{name}.md"
        for name in (
            "structure",
            "extending",
            "settings",
            "models",
            "python",
            "chat",
            "hybrid",
            "kernels",
            "amx",
            "attention",
            "layers",
            "cache",
            "cache_bounds",
            "cache_engine",
            "cache_laboratory",
            "cache_results",
            "shared_machines",
            "server",
            "texts",
        )  # fmt: skip
    ),
]
# A path in backquotes, or in bold ones, from any of these folders.
ROOTS = [
    ROOT,
    ROOT / "hybrid",
    ROOT / "cpu_kernels",
    ROOT / "cpu_kernels/src",
    ROOT / "cpu_kernels/src/executor",
    ROOT / "gpu_cache",
]
NAMED = re.compile(r"`([\w./<>*-]+/[\w.<>*-]*|[\w-]+\.(?:py|cpp|h|md))`")
OTHERS = ("/", "expert_choices.csv", "DIR/", "config.json", "org/", "additional_chat_templates/")


def named(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return [name for name in NAMED.findall(text) if "<" not in name and not name.startswith(OTHERS)]


def found(name: str) -> bool:
    """Where it says, or anywhere below if it is a bare name."""
    if "/" not in name:
        return any(
            next(ROOT.glob(f"{package}/**/{name}"), None) for package in ("hybrid", "cpu_kernels", "gpu_cache", ".")
        )
    return any(next(root.glob(name.rstrip("/")), None) for root in ROOTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_that_a_document_names_are_there(document: str) -> None:
    names = named(document)
    assert names, "nothing was looked for"
    assert not [name for name in names if not found(name)]
