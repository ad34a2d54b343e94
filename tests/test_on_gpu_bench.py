"""`bench/on_gpu.py` runs every step, keeps what each found, and goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import on_gpu  # noqa: E402
from on_gpu import DONE, FAILED, SLOW, Step, run_steps, steps  # noqa: E402


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path) -> None:
    chosen = [
        Step("bad", python("import sys; sys.exit('no such luck')"), 60),
        Step("slow", python("import time; time.sleep(1000)"), 1),
        Step("figures", python("print('{}'); import sys; print('a note', file=sys.stderr)"), 60, prints=True),
        Step("file", python("import sys; open(sys.argv[2], 'w').write('[1]')"), 60, output="--output"),
    ]
    ended = run_steps(tmp_path, chosen)
    assert [ended[step.name].status for step in chosen] == [FAILED, SLOW, DONE, DONE]
    assert "no such luck" in (tmp_path / "bad.log").read_text()
    assert (tmp_path / "figures.json").read_text() == "{}\n" and "a note" in (tmp_path / "figures.log").read_text()
    assert (tmp_path / "file.json").read_text() == "[1]"
    assert json.loads((tmp_path / "steps.json").read_text())["bad"]["code"] == 1


def test_what_ended_well_is_not_run_again(tmp_path) -> None:
    count = tmp_path / "count"
    again = Step("again", python(f"open({str(count)!r}, 'a').write('x')"), 60)
    fails = Step("fails", python(f"open({str(count)!r}, 'a').write('y'); exit(3)"), 60)
    for _ in range(2):
        run_steps(tmp_path, [again, fails])
    assert count.read_text() == "xyy"


@pytest.mark.parametrize("stand_in", [False, True])
def test_steps_have_names_of_their_own_and_run_what_is_there(tmp_path, stand_in) -> None:
    found = list(steps(tmp_path, stand_in))
    assert len({step.name for step in found}) == len(found) and found[0].name == "tests"
    for step in found:
        for word in step.command:
            assert not word.startswith(("bench/", "tests/")) or (on_gpu.ROOT / word).exists()
