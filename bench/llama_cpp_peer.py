"""llama.cpp, of the package llama-cpp-python.

Its best settings for a CPU: mapped weights, repacked where it can, flash attention, F16 keys and values, steps of 512.
"""

from __future__ import annotations

from typing import Any

from llama_cpp import llama_cpp as api
from llama_peer import ALL, Listener, LlamaPeer

_LISTENER = Listener()
_HEAR = api.llama_log_callback(_LISTENER)  # a name of the module, because C keeps no reference to it
api.llama_log_set(_HEAR, None)


class LlamaCpp(LlamaPeer):
    """Several sequences have a stream of cells each, which spares every query the others' cells; such tests start at
    depth 0, because llama.cpp restores no saved sequence into a stream.
    """

    name, package, api, listener = "llama.cpp", "llama-cpp-python", api, _LISTENER

    def model_parameters(self) -> Any:
        parameters = api.llama_model_default_params()
        parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP
        return parameters

    def context_parameters(self, sequences: int, unified: bool) -> Any:
        parameters = api.llama_context_default_params()
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.kv_unified = unified
        parameters.n_outputs_max = sequences
        return parameters

    def clear(self, context: Any) -> None:
        api.llama_memory_clear(api.llama_get_memory(context), False)

    def remove(self, context: Any, sequence: int, start: int, end: int) -> None:
        api.llama_memory_seq_rm(api.llama_get_memory(context), sequence, start, end)

    def move(self, context: Any, sequence: int, distance: int) -> None:
        api.llama_memory_seq_add(api.llama_get_memory(context), sequence, 0, ALL, distance)

    def share(self, context: Any, source: int, target: int) -> None:
        api.llama_memory_seq_cp(api.llama_get_memory(context), source, target, ALL, ALL)
