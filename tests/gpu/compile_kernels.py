"""Compiles every kernel for a GPU that need not be there, and prints what came out as JSON lines.

Usage: compile_kernels.py CAPABILITY FORMAT..., for example 80 bf16. Without TRITON_INTERPRET, which would define them
otherwise.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_cache.kernels import lookup, router, sums, tiles
from gpu_cache.kernels.experts import FEW, MANY
from gpu_cache.kernels.formats import FORMATS

INTS = {"slot_ids", "tile_slot", "tile_first", "tile_last", "order", "ids", "slot_of"}
FLOATS = {"contributions", "weights", "logits", "correction"}
# Of arguments that Triton sees to be multiples of 16, as they are at run time.
EVEN = INTS | FLOATS | {"x", "experts", "bias", "out", "x_stride", "slot_bytes", "block_bytes", "header", "inputs"}


def main(capability: int, formats: list[str]) -> None:
    target = GPUTarget("cuda", capability, 32)
    for format in formats:
        for tiling, kernels in (
            (FEW, (tiles.few_gate_up, tiles.few_down)),
            (MANY, (tiles.many_gate_up, tiles.many_down)),
        ):
            shape = {"ROWS": tiling.rows, "BLOCKS": tiling.blocks}
            choices = {
                "FORMAT": format,
                "CHUNK": FORMATS[format].CHUNK,
                "ACTIVATION": "silu",
                "BIAS": True,
                "TOP_K": 8,
                "RANKS": 8,
            }
            for kernel in kernels:
                out = "*bf16" if "gate_up" in kernel.__name__ else "*fp32"
                show(kernel, target, {**choices, **shape}, {"x": "*bf16", "out": out})
    show(sums._sum, target, {"TOP_K": 8, "RANKS": 8, "COLUMNS": 256}, {"out": "*fp32"})
    show(lookup._look_up, target, {"PAIRS": 256}, {"out": "*i32"})
    for kind, groups in (("softmax", 1), ("topk_softmax", 1), ("sigmoid", 8), ("sparsemixer", 1)):
        routing = {"KIND": kind, "GROUPS": groups, "TOP_GROUPS": max(1, groups // 2), "CORRECTED": kind == "sigmoid"}
        size = {"EXPERTS": 128, "WIDTH": 128, "TOP_K": 8, "RANKS": 8, "RENORMALISE": True}
        show(router._choose, target, {**routing, **size}, {"scale": "fp32", "margin": "fp32"})


def show(kernel, target, choices, types) -> None:
    constants = {name: value for name, value in choices.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, guess(name)) for name in kernel.arg_names}
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in EVEN}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants, attrs=even), target=target)
    text = compiled.asm["ptx"]
    found = {"mma": text.count("mma."), "async": text.count("cp.async"), "cubin": len(compiled.asm["cubin"])}
    print(json.dumps({"kernel": kernel.__name__, "format": constants.get("FORMAT"), **found}), flush=True)


def guess(name: str) -> str:
    if name in INTS:
        return "*i32"
    if name in FLOATS:
        return "*fp32"
    return {"experts": "*u8", "bias": "*u8", "slot_bytes": "i64", "bias_bytes": "i64"}.get(name, "i32")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
