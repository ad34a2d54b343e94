"""`hybrid models` and docs/models.md say of every family what its code and its tests say."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import test_engine
from configs import CONFIGS, ON_HOST, OTHER_NAMES
from gguf_rig import ARCHITECTURES
from typer.testing import CliRunner

from hybrid.commands.models import app, others, table
from hybrid.formats import FORMATS
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec, supported_models
from hybrid.models.catalog import all_families
from hybrid.weights.checkpoints.gguf_architectures import MODEL_TYPES
from hybrid.weights.checkpoints.gguf_config import _FAMILIES

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs/models.md").read_text()
TESTS = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", DOCUMENT)


def test_every_family_is_listed_and_tested() -> None:
    listed = [family.model_type for family in all_families()]
    assert listed == list(supported_models())
    assert set(listed) == {*CONFIGS, *OTHER_NAMES}
    assert {family for family, _ in test_engine.CASES.values()} == set(CONFIGS)


@pytest.mark.parametrize("family", [f for f in all_families() if f.model_type in CONFIGS], ids=lambda f: f.model_type)
def test_a_family_is_what_its_tested_model_is(family) -> None:
    spec = model_spec(CONFIGS[family.model_type])
    halves = spec.halves(FormatMix.uniform("bf16"))
    kinds = {type(half).__name__ for place, half in halves if half.device_needs(place) is None}
    assert (family.experts, set(family.without_device)) == (bool(spec.moe_layers), kinds)
    assert bool(family.without_device) == (family.model_type in ON_HOST)
    assert family.name and "\n" not in family.name and len(family.name) < 80


def test_gguf_architectures_are_those_that_are_read() -> None:
    """And each makes the families that files of tests are made into."""
    assert list(MODEL_TYPES) == list(_FAMILIES)
    assert {model_type: name for name, found in MODEL_TYPES.items() for model_type in found} == ARCHITECTURES


def test_the_document_has_the_table_that_is_printed() -> None:
    assert "\n".join(table()) in DOCUMENT, "copy the table that `hybrid models` prints into docs/models.md"


def test_the_readme_names_every_family() -> None:
    """By what its name begins with, and once more where no device computes it."""
    section = (ROOT / "README.md").read_text().partition("## What it runs")[2].partition("| checkpoints |")[0]
    everywhere, _, on_host = section.partition("| of these on the CPU alone |")
    for family in all_families():
        beginning = re.escape(re.split(r",| and | to | with ", family.name)[0])
        word = re.compile(rf"(?<![\w.-]){beginning}(?![\w.-])")
        assert word.search(everywhere), family.name
        assert bool(word.search(on_host)) == bool(family.without_device), family.name


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_tests_that_the_document_names_are_there(file: str, name: str) -> None:
    functions = [node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if hasattr(node, "name")]
    assert (name or functions[0]) in functions


def test_the_command_prints_both_forms() -> None:
    text = CliRunner().invoke(app, []).stdout
    assert text == "\n".join([*table(), "", *others()]) + "\n"
    found = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert found["formats"] == list(FORMATS) and {"hermes", "harmony"} <= set(found["tools"])
    assert [family["model_type"] for family in found["families"]] == list(supported_models())
    mixtral = next(family for family in found["families"] if family["model_type"] == "mixtral")
    assert {"gguf": ["llama"], "device": True, "experts": True}.items() <= mixtral.items()
