"""Imports go one way, nothing needs torch, and looking at the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = (
    ("core", "errors", "phases", "settings"),
    ("config", "hardware"),
    ("models", "weights"),
    ("ops", "program", "nodes", "partition", "placement", "memory", "device_step", "device_memory", "supported")
    + ("cache_plan", "plan", "plan_text"),
    (
        "binding",
        "route_trace",
        "routes",
        "slot_program",
        "gpu",
        "devices",
        "verdict",
        "streaming",
        "warm",
        "machine_profile",
        "profiling",
        "decode_history",
        "device_report",
        "expert_pieces",
        "experts",
    ),
    ("kv", "sampler", "tokenizer", "detokenizer", "chat", "planning", "engine"),
    ("scheduler",),
    ("llm",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMMANDS = len(LEVELS)  # every module that is not named above is part of a command
KNOWS_NOTHING_OF = {"cpu_kernels": ("hybrid", "gpu_cache"), "gpu_cache": ("hybrid", "cpu_kernels")}
WITH_TORCH = ("hybrid/gpu", "gpu_cache/kernels", "gpu_cache/devices/torch_streams.py")
FILES = sorted(path for package in ("hybrid", *KNOWS_NOTHING_OF) for path in ROOT.glob(f"{package}/**/*.py"))


def imported(path: Path) -> set[str]:
    """The absolute names of the modules that a file imports anywhere in it, type checking included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(name: str) -> str:
    """`hybrid.weights.pack` belongs to `weights`."""
    return name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_its_own_level_or_lower_ones(path: Path) -> None:
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    names = imported(path)
    if package in KNOWS_NOTHING_OF:
        assert not [name for name in names if name.split(".")[0] in KNOWS_NOTHING_OF[package]]
    elif rest != ["__init__"]:
        own = LEVEL.get(rest[0], COMMANDS)
        higher = [n for n in names if n.startswith("hybrid.") and LEVEL.get(layer(n), COMMANDS) > own]
        assert not higher, f"{path.name} imports upwards: {higher}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_but_the_code_of_devices_imports_torch(path: Path) -> None:
    if any(path.is_relative_to(ROOT / place) for place in WITH_TORCH):
        return
    assert not [name for name in imported(path) if name.split(".")[0] in ("torch", "triton", "xformers")]


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


HEAVY = {"numpy", "torch", "transformers", "tokenizers", "typer", "rich", "cpu_kernels", "hybrid.serving.llm"}


def test_importing_the_package_or_the_console_script_imports_nothing_heavy() -> None:
    assert not HEAVY & modules_after("import hybrid, hybrid.cli")


def test_the_flags_of_run_need_no_model_library() -> None:
    assert not (HEAVY - {"typer"}) & modules_after("import hybrid.commands.run, hybrid.commands.bench")


def test_the_library_never_imports_torch() -> None:
    assert "torch" not in modules_after(
        "import hybrid.serving.llm, hybrid.commands.conversation, hybrid.engine.experts.runtime"
    )


def test_the_package_offers_its_names_lazily() -> None:
    import hybrid

    assert hybrid.SamplingParams.__module__ == "hybrid.core"
    assert set(hybrid.__all__) <= set(dir(hybrid))
    assert isinstance(hybrid.__version__, str)
    for name in hybrid.__all__:
        assert getattr(hybrid, name)
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        hybrid.LMM  # noqa: B018
