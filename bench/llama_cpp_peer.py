"""llama.cpp, of the package llama-cpp-python.

Its best settings for a CPU: mapped weights, repacked where it can, flash attention, F16 keys and values, steps of 512.
"""

from __future__ import annotations

from typing import Any

from llama_cpp import llama_cpp as api
from llama_peer import ALL, LlamaPeer

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_errors: list[str] = []


def _hear(level: int, text: bytes, data: object) -> None:
    """It tells hundreds of lines while loading."""
    if level == _ERROR and text.strip():
        _errors.append(text.decode(errors="replace").strip())


_LISTENER = api.llama_log_callback(_hear)  # a name of the module, because C keeps no reference to it
api.llama_log_set(_LISTENER, None)


class LlamaCpp(LlamaPeer):
    """Several sequences have a stream of cells each, which spares every query the others' cells; such tests start at
    depth 0, because llama.cpp restores no saved sequence into a stream.
    """

    name, package, api, errors = "llama.cpp", "llama-cpp-python", api, _errors

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
