"""CPU kernels and the executor that runs them. Knows nothing of models: plans come in as ops over addresses."""

from cpu_kernels import _ext
from cpu_kernels._ext import (
    Arena,
    Executor,
    KvLayout,
    Part,
    Routing,
    ThreadPool,
    available_isas,
    missing_features,
    peak_flops,
    read_bandwidth,
)

KEY_BLOCK: int = _ext.KEY_BLOCK  # keys of one partial softmax
TILE_ROWS: int = _ext.TILE_ROWS  # query rows times heads of one attention tile

__all__ = [
    "KEY_BLOCK",
    "TILE_ROWS",
    "Arena",
    "Executor",
    "KvLayout",
    "Part",
    "Routing",
    "ThreadPool",
    "available_isas",
    "missing_features",
    "peak_flops",
    "read_bandwidth",
]
