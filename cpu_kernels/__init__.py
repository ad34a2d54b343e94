"""CPU kernels and the executor that runs them. Knows nothing of models: plans come in as ops over addresses."""

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

__all__ = [
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
