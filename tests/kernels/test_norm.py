"""Embedding rows are exact, norms within rounding."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_reference import assert_near, rms_norm
from rig import BF16, Rig, aligned, packed, random_bf16, row_stride


@pytest.mark.parametrize(("vocab", "hidden"), [(16, 32), (131, 90), (203, 33)])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_embedding_is_the_row_of_the_table(isa, vocab, hidden, threads) -> None:
    table = random_bf16(np.random.default_rng(0), vocab, hidden)
    tokens = [vocab - 1, 0, 15, vocab // 2, 0]
    output = aligned((6, row_stride(hidden)), np.float32, fill=-7)
    rig = Rig(isa, threads, vocab=vocab)
    rig.add(
        "embed",
        table=packed("bf16", table)[0],
        output=output,
        hidden=hidden,
        pairs=row_stride(hidden) // 2,
        output_stride=row_stride(hidden),
    )
    rig.run(5, tokens=tokens)
    assert np.array_equal(output[:5, :hidden], table[tokens].astype(np.float32))
    assert (output[5:] == -7).all() and (output[:, hidden:] == -7).all()


@pytest.mark.parametrize("width", [16, 90, 300, 601])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_norm_is_within_rounding(isa, width, rows, size) -> None:
    random = np.random.default_rng(width)
    stride, eps = row_stride(width), 1e-6
    x = aligned((rows, stride), np.float32)
    x[:, :width] = size * random.standard_normal((rows, width))
    weight = random.standard_normal(width).astype(np.float32)
    output, exact = aligned((rows, stride), BF16), aligned((rows, stride), np.float32)
    arguments = {"input": x, "weight": weight, "width": width, "input_stride": stride, "output_stride": stride}
    for f32 in (exact, None):
        rig = Rig(isa, 2)
        outputs = {"output": output, "output_f32": f32, "output8": None, "output8_stride": 0}
        rig.add("norm", eps=eps, logit_rows=False, **outputs, **arguments)
        rig.run(rows)
        expected = rms_norm(x[:, :width], weight, eps)
        assert_near(output[:, :width], expected.as_bf16())
        assert_near(exact[:, :width], expected)
        assert not output[:, width:].any() and not exact[:, width:].any()
        output[...] = 0
