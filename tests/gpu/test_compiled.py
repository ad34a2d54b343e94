"""The kernels become machine code for real GPUs, which Triton compiles for without having one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install '.[live]'")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("capability", "formats"), [(80, ["bf16", "fp8", "int4", "int8", "mxfp4"]), (90, ["bf16"])])
def test_every_kernel_compiles_and_experts_use_tensor_cores_and_asynchronous_loads(
    tmp_path, capability, formats
) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability), *formats]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == len(formats) * 4 + 6 and all(kernel["cubin"] > 0 for kernel in kernels)
    experts = [kernel for kernel in kernels if kernel["format"]]
    assert [k for k in experts if not k["mma"] or not k["async"]] == []
