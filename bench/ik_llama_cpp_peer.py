"""ik_llama.cpp, of the package ik-llama-cpp-python.

Its best settings for a CPU: weights repacked when they are read, flash attention, its third form of latent attention,
fused experts, F16 keys and values, steps of 512. All sequences share one stream of cells: it has no other.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ik_llama_cpp import _ctypes_api as bindings
from llama_peer import ALL, Listener, LlamaPeer

from hybrid.commands.measure import Test

_LISTENER = Listener()
_HEAR = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_LISTENER)  # C keeps no reference to it


def _bound(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C interface that the package does not bind."""
    function = getattr(bindings._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


_CONTEXT, _INT, _SIZE, _BYTES = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t, ctypes.POINTER(ctypes.c_uint8)
_FUNCTIONS = {
    "llama_log_set": (None, ctypes.c_void_p, ctypes.c_void_p),
    "llama_print_system_info": (ctypes.c_char_p,),
    "llama_synchronize": (None, _CONTEXT),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), _CONTEXT, _INT),
    "llama_kv_cache_seq_rm": (ctypes.c_bool, _CONTEXT, _INT, _INT, _INT),
    "llama_kv_cache_seq_cp": (None, _CONTEXT, _INT, _INT, _INT, _INT),
    "llama_kv_cache_seq_add": (None, _CONTEXT, _INT, _INT, _INT, _INT),
    "llama_state_seq_get_size": (_SIZE, _CONTEXT, _INT, _INT),
    "llama_state_seq_get_data": (_SIZE, _CONTEXT, _BYTES, _SIZE, _INT, _INT),
    "llama_state_seq_set_data": (_SIZE, _CONTEXT, _BYTES, _SIZE, _INT, _INT),
}
api = SimpleNamespace(**vars(bindings))
vars(api).update({name: _bound(name, *types) for name, types in _FUNCTIONS.items()})
api.llama_model_free = bindings.llama_free_model
api.llama_log_set(_HEAR, None)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """The library prints to standard output, where the report belongs."""
    flush, kept = ctypes.CDLL(None).fflush, os.dup(1)
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


class IkLlamaCpp(LlamaPeer):
    name, package, api, listener = "ik_llama.cpp", "ik-llama-cpp-python", api, _LISTENER
    state_flags, amx = (0,), ()  # it has no products of tiles

    def __init__(self, path: Path, threads: int, tests: Sequence[Test]) -> None:
        with _printing_to_stderr():
            super().__init__(path, threads, tests)

    def model_parameters(self) -> Any:
        parameters = api.llama_model_default_params()
        parameters.repack_tensors = True
        parameters.mla = api.llama_context_default_params().mla_attn  # what loading prepares is what a context takes
        return parameters

    def context_parameters(self, sequences: int, unified: bool) -> Any:
        """The library's defaults are what its authors advise. Its flash attention stops the process where a row sees
        nothing of a part of the cells (0.1.5), so several sequences do without.
        """
        parameters = api.llama_context_default_params()
        parameters.flash_attn = unified
        return parameters

    def clear(self, context: Any) -> None:
        api.llama_kv_cache_clear(context)

    def remove(self, context: Any, sequence: int, start: int, end: int) -> None:
        api.llama_kv_cache_seq_rm(context, sequence, start, end)

    def move(self, context: Any, sequence: int, distance: int) -> None:
        api.llama_kv_cache_seq_add(context, sequence, 0, ALL, distance)

    def share(self, context: Any, source: int, target: int) -> None:
        api.llama_kv_cache_seq_cp(context, source, target, ALL, ALL)
