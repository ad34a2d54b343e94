"""A mistake that ASan must find, or its silence about the tests means nothing: a norm of two rows into room for one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rig import BF16, ISAS, Rig, aligned  # noqa: E402

WIDTH = 256


def overflow(isa: str) -> None:
    rig = Rig(isa)
    rig.add(
        "norm",
        eps=1e-6,
        logit_rows=False,
        input=aligned((2, WIDTH), np.float32, fill=1),
        weight=aligned(WIDTH, np.float32, fill=1),
        output=aligned((1, WIDTH), BF16),
        output_f32=None,
        output8=None,
        output8_stride=0,
        width=WIDTH,
        input_stride=WIDTH,
        output_stride=WIDTH,
    )
    rig.run(2)


if __name__ == "__main__":
    overflow(ISAS[0])
