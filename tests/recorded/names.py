"""Every name that the record takes of the program, but for `from hybrid import ...`: if files move, this changes."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from runpy import run_path
from typing import Any
from unittest.mock import patch

import numpy as np
from checkpoints import FP8, as_fp8, mxfp4_tensors, random_tensors, write_tensors
from configs import CONFIGS, ON_HOST

import cpu_kernels
from hybrid import LLM
from hybrid.engine.experts.report import report as _cache_report
from hybrid.models import model_spec

ROOT = Path(__file__).parent.parent.parent
__all__ = ["CONFIGS", "FP8", "ON_HOST", "as_fp8", "model_spec", "mxfp4_tensors", "random_tensors", "write_tensors"]
MANIFEST = "manifest.json"  # of a packed store
COUNTED = ("calls", "hits", "loading", "misses", "fills", "evictions", "late_copies", "streamed_layers", "streamed")


def isas() -> list[str]:
    """Instruction sets of this machine that are recorded, best first. Not AMX: most machines could not write a record
    that has it, and could not compare what only the best one of a record has.
    """
    return [isa for isa in cpu_kernels.available_isas() if isa != "amx"]


@cache
def compiler() -> str:
    """What compiled the kernels, as the linker noted it in the extension."""
    data = Path(cpu_kernels._ext.__file__).read_bytes()
    found = re.findall(rb"GCC: \([^)\0]*\) [0-9.]+|[a-zA-Z ]*clang version [0-9.]+", data)
    return ", ".join(sorted({text.decode() for text in found})) or "unknown"


def cache_counts(llm: LLM) -> list[int]:
    """What an expert cache counted, in the order of COUNTED."""
    found = _cache_report(llm.engine.experts)
    return [getattr(found, name) for name in COUNTED]


def watch_steps(llm: LLM, see: Callable[[np.ndarray], None]) -> None:
    """Have the logits of every step shown from now on."""
    forward = llm.engine.forward

    def watched(batch: Any) -> Any:
        result = forward(batch)
        see(result.logits)
        return result

    llm.engine.forward = watched


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `hybrid ARGUMENTS`, in this process."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["hybrid"].partition(":")
    return _called(lambda: getattr(import_module(module), name)(), "hybrid", *arguments)


def preprocess(*arguments: object) -> tuple[int, str, str]:
    """The same of `weights_preprocessor.py ARGUMENTS`."""
    script = str(ROOT / "weights_preprocessor.py")
    return _called(lambda: run_path(script, run_name="__main__"), script, *arguments)


def _called(run: Callable[[], Any], *arguments: object) -> tuple[int, str, str]:
    out, err, code = StringIO(), StringIO(), 0
    with patch.object(sys, "argv", [*map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            run()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(bool(error.code))
    return code, out.getvalue(), err.getvalue()
