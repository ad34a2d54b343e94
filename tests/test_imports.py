"""Imports go one way, nothing needs torch, and looking at the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms of hybrid/, lowest first: a room imports those before it, and its own files. Those of one line know nothing
# of each other.
ORDER = (
    ("printable",),
    ("core", "errors", "ops"),
    ("files", "formats", "settings"),
    ("config", "models", "text"),
    ("machine",),
    ("weights",),
    ("plan",),
    ("gpu",),
    ("engine",),
    ("serving",),
    ("lab", "server"),
    ("cluster",),
    ("commands",),
    ("cli", "main", "serve"),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MAX_ROOMS = 24
KNOWS_NOTHING_OF = {"cpu_kernels": ("hybrid", "gpu_cache"), "gpu_cache": ("hybrid", "cpu_kernels")}
WITH_TORCH = ("hybrid/gpu", "hybrid/machine/gpu.py", "gpu_cache/kernels", "gpu_cache/devices/torch_streams.py")
FILES = sorted(path for package in ("hybrid", *KNOWS_NOTHING_OF) for path in ROOT.glob(f"{package}/**/*.py"))


@cache
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


def room(name: str) -> str:
    """`hybrid.weights.pack` is in the room `weights`."""
    return name.split(".")[1]


def test_a_file_imports_its_own_room_or_lower_ones() -> None:
    assert {path: found for path in FILES if (found := imported_upwards(path))} == {}


def imported_upwards(path: Path) -> set[str]:
    """Rooms and packages that a file may not import, and does."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    names = imported(path)
    if package in KNOWS_NOTHING_OF:
        return {name for name in names if name.split(".")[0] in KNOWS_NOTHING_OF[package]}
    if rest == ["__init__"]:
        return set()
    others = {room(name) for name in names if name.startswith("hybrid.")} - {rest[0], "__version__"}
    return {other for other in others if LEVEL[other] >= LEVEL[rest[0]]}


def test_the_rooms_are_those_of_the_order() -> None:
    found = {
        path.stem for path in (ROOT / "hybrid").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(LEVEL) and len(found) <= MAX_ROOMS


def test_no_files_import_each_other_in_a_circle() -> None:
    """Not within a room either, nor inside a function or for type checking."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    waiting = {name: imported(path) & set(modules) - {name} for name, path in modules.items()}
    while free := [name for name, needed in waiting.items() if not needed & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting, f"among these is a circle: {sorted(waiting)}"


def test_nothing_but_the_code_of_devices_imports_torch() -> None:
    others = [path for path in FILES if not any(path.is_relative_to(ROOT / place) for place in WITH_TORCH)]
    torch = {"torch", "triton", "xformers"}
    assert [path for path in others if torch & {name.split(".")[0] for name in imported(path)}] == []


# They run what they read, or fetch what somebody names.
UNSAFE = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "requests", "urllib.request", "http.client",
          "ftplib", "telnetlib", "xmlrpc")  # fmt: skip


def test_nothing_is_unpickled_and_no_address_fetched() -> None:
    files = [path for path in FILES if path.is_relative_to(ROOT / "hybrid")]
    starts = tuple(f"{module}." for module in UNSAFE)
    found = [(path, name) for path in files for name in imported(path) if f"{name}.".startswith(starts)]
    assert len(files) > 100 and not found


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
