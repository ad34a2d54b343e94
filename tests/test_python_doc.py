"""The examples of docs/python.md run as they stand, one after the other; and what `record_trace` promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cpu_kernels", exc_type=ImportError)

from hybrid import LLM, SamplingParams
from hybrid.errors import CapacityError, ConfigError

DOCUMENT = Path(__file__).parent.parent / "docs/python.md"
TWO = SamplingParams(max_tokens=2)


def test_the_examples_run_as_they_stand(tmp_path) -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(examples) == 8
    trace = tmp_path / "trace.csv"
    script = "\n".join(examples).replace('"trace.csv"', repr(str(trace)))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "cache.nblocks 0 is out of range" in result.stdout
    assert trace.read_text().startswith("step,")


def test_a_trace_is_written_while_the_block_runs_whatever_ends_it(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    with LLM(threads=1, routes=True, max_seq_len=64) as llm:
        with llm.record_trace(path):
            llm.generate([1, 2, 3], TWO)
        whole = path.read_text()
        llm.generate([1, 2, 3], TWO)
        assert path.read_text() == whole and llm.engine.routes.observer is None
        with pytest.raises(KeyError), llm.record_trace(str(path)):
            llm.generate([1], TWO)
            raise KeyError
        assert path.read_text().count("\n") < whole.count("\n")
        with pytest.raises(ConfigError, match="record_trace .*no directory"), llm.record_trace(tmp_path / "no/t.csv"):
            pass
        with (
            pytest.raises(ConfigError, match=r"a trace ends in .csv or .parquet"),
            llm.record_trace(tmp_path / "t.txt"),
        ):
            pass
        told: list[str] = []
        with llm.record_trace("/dev/full", told.append):
            assert llm.generate([1, 2, 3], TWO)[0].token_ids
        assert len(told) == 1
        with pytest.raises(CapacityError), llm.record_trace("/dev/full"):
            llm.generate([1, 2, 3], TWO)
        with llm.record_trace(path):
            llm.generate([1, 2, 3], TWO)
            llm.close()
        assert path.read_text().count("\n") == whole.count("\n")
    unseen = pytest.raises(ConfigError, match="open it with routes=True")
    with LLM(threads=1, max_seq_len=64) as llm, unseen, llm.record_trace(path):
        pass
