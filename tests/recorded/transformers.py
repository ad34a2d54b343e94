"""Write the record of what transformers makes of the models of the tests: `python tests/recorded/transformers.py`.

Needs the `live` extra. Runs the tests that ask for such numbers, computes each anew, and notes the versions that did.
After a change of a test's models or of a quantiser this is run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent.parent
FILES = ("test_engine.py", "test_formats_engine.py", "test_models.py", "test_rope.py", "test_sampler.py")


def main() -> None:
    environment = {**os.environ, "HYBRID_TEST_ORACLE": "record"}
    command = [sys.executable, "-m", "pytest", *(str(TESTS / name) for name in FILES)]
    subprocess.run(command, env=environment, cwd=TESTS.parent, check=True)
    made = {name: version(name) for name in ("numpy", "torch", "transformers")}
    (TESTS / "recorded/transformers/made.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
