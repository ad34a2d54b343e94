"""CPU kernels and the executor that runs them. Knows nothing of models: plans come in as ops over addresses."""

from cpu_kernels import _ext
from cpu_kernels._ext import (
    Activation,
    Arena,
    Executor,
    ExpertSet,
    Format,
    KvLayout,
    MappedRange,
    Part,
    Reading,
    Routing,
    Scoring,
    StateLayout,
    ThreadPool,
    available_isas,
    conv_state_bytes,
    delta_state_bytes,
    missing_features,
    ngram_state_bytes,
    peak_flops,
    peak_int_ops,
    phase_seconds,
    read_bandwidth,
    reading,
    scratch_bytes,
)

KEY_BLOCK: int = _ext.KEY_BLOCK  # keys of one partial softmax
INDEX_BLOCK: int = _ext.INDEX_BLOCK  # keys that an indexer of blocks selects together
MAX_DELTA_DIM: int = _ext.MAX_DELTA_DIM  # dimensions of keys and values in the gated delta rule
MAX_NGRAM: int = _ext.MAX_NGRAM  # tokens of an n-gram that is looked up
MAX_NODES: int = _ext.MAX_NODES  # memory nodes that an executor can join
RUN_TOKENS: int = _ext.RUN_TOKENS  # of a run, within which a recurrent state can go back
TILE_ROWS: int = _ext.TILE_ROWS  # query rows times heads of one attention tile

__all__ = [
    "INDEX_BLOCK",
    "KEY_BLOCK",
    "MAX_DELTA_DIM",
    "MAX_NGRAM",
    "MAX_NODES",
    "RUN_TOKENS",
    "TILE_ROWS",
    "Activation",
    "Arena",
    "Executor",
    "ExpertSet",
    "Format",
    "KvLayout",
    "MappedRange",
    "Part",
    "Reading",
    "Routing",
    "Scoring",
    "StateLayout",
    "ThreadPool",
    "available_isas",
    "conv_state_bytes",
    "delta_state_bytes",
    "missing_features",
    "ngram_state_bytes",
    "peak_flops",
    "peak_int_ops",
    "phase_seconds",
    "read_bandwidth",
    "reading",
    "scratch_bytes",
]
