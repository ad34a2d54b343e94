"""Traces of MoE-PolicyLang: JSON lines, whose first says the model, and parquet with a list of experts in each row."""

from __future__ import annotations

import io
import json
from typing import Any, BinaryIO

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import MAX_EXPERTS, Trace, import_parquet
from gpu_cache.traces.base import (
    MAX_VALUES,
    Progress,
    Rows,
    Sizes,
    Source,
    TraceFormat,
    begin_of_choices,
    by_sequence,
    choices,
    finish,
    passes_of,
)

_HEADER = {"num_layers", "num_experts", "top_k"}
_COLUMNS = ("prompt_id", "token_idx", "layer_idx", "selected_experts")
_SCORES = "router_scores"
_LACKS = "steps: a token is taken to be computed with those before it, as long as layers do not begin anew"


def _header(source: Source) -> dict[str, Any]:
    """Empty if the first line is none."""
    try:
        header = json.loads(source.line)
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) and set(header) >= _HEADER else {}


def _read(source: Source, sizes: Sizes) -> Trace:
    """Rows are {"p": prompt, "t": token, "l": layer, "e": experts, "s": scores}, in the order of computation."""
    rows = Rows(source.name, Sizes(sizes.layers, sizes.experts or _experts(source)))
    lines = source.lines()
    next(lines, None)
    step, last = -1, (-1, 0)
    for number, text in lines:
        try:
            row = json.loads(text)
            prompt, token, layer, experts = row.get("p", 0), row["t"], row["l"], row["e"]
            scores = row.get("s")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise rows.refuse(number, f"is {text[:60]!r}; allowed: JSON with p, t, l, e and s") from None
        if not all(type(value) is int for value in (prompt, token, layer)) or not isinstance(experts, list):
            raise rows.refuse(
                number, f"has no numbers of prompt, token and layer, or no list of experts: {text[:60]!r}"
            )
        if not isinstance(scores, list | None):
            raise rows.refuse(number, f"has no list of scores: {text[:60]!r}")
        step += prompt != last[0] or layer < last[1]
        last = (prompt, layer)
        rows.add(number, step, prompt, token, layer, experts, scores)
    return rows.trace()


def _experts(source: Source) -> int:
    experts = _header(source).get("num_experts")
    if type(experts) is not int or not 1 <= experts <= MAX_EXPERTS:
        raise CacheError(f"{source.name}: line 1 has num_experts {experts!r:.40}; allowed: 1 to {MAX_EXPERTS}")
    return experts


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    top_k = int(trace.rank.max()) + 1
    entries = int(np.count_nonzero(trace.rank == 0))
    header = {"model_name": "", "num_layers": trace.layers, "num_experts": trace.experts, "top_k": top_k}
    header |= {"num_entries": entries, "records_full_softmax": False}
    file.write(json.dumps(header).encode() + b"\n")
    for choice in choices(by_sequence(trace), progress):
        row = {"p": choice.sequence, "t": choice.position, "l": choice.layer, "e": choice.experts, "s": choice.scores}
        file.write(json.dumps(row).encode() + b"\n")


def _read_parquet(source: Source, sizes: Sizes) -> Trace:
    try:
        columns = _columns_of(source)
    except CacheError:
        raise
    except Exception as error:  # a damaged file makes pyarrow raise many kinds
        raise CacheError(f"{source.name}: is not a whole trace ({' '.join(str(error).split())[:160]})") from None
    return finish(columns, sizes, source.name)


def _columns_of(source: Source) -> dict[str, Any]:
    parquet = import_parquet()
    missing = [name for name in _COLUMNS if name not in source.columns]
    if missing:
        raise CacheError(
            f"{source.name}: has no column {', '.join(missing)}; record the experts, not the softmax alone"
        )
    scored = _SCORES in source.columns
    table = parquet.read_table(io.BytesIO(source.whole), columns=[*_COLUMNS, *([_SCORES] * scored)])
    chosen = table["selected_experts"].combine_chunks()
    counts = np.diff(chosen.offsets.to_numpy())
    if table.num_rows == 0 or int(counts.sum()) > MAX_VALUES:
        raise CacheError(f"{source.name}: has {int(counts.sum())} experts; allowed: 1 to {MAX_VALUES}")
    prompt, token, layer = (table[name].to_numpy().astype(np.int64) for name in _COLUMNS[:3])
    columns = {"step": passes_of(layer, prompt), "sequence": prompt, "position": token, "layer": layer}
    columns = {name: np.repeat(column, counts) for name, column in columns.items()}
    columns["rank"] = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    columns["expert"] = chosen.flatten().to_numpy().astype(np.int64)
    score = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    if scored and table[_SCORES].null_count == 0:
        score = table[_SCORES].combine_chunks().flatten().to_numpy().astype(np.float32)
    if len(score) != len(columns["expert"]):
        raise CacheError(f"{source.name}: has {len(columns['expert'])} experts and {len(score)} scores")
    return {**columns, "score": score}


def _write_parquet(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    parquet = import_parquet()
    import pyarrow

    ordered = by_sequence(trace)
    begins = begin_of_choices(ordered)
    ends = np.append(begins, len(ordered)).astype(np.int32)
    columns = {
        name: pyarrow.array(values[begins].astype(np.int32))
        for name, values in zip(_COLUMNS, (ordered.sequence, ordered.position, ordered.layer), strict=False)
    }
    columns["selected_experts"] = pyarrow.ListArray.from_arrays(ends, ordered.expert.astype(np.int32))
    columns[_SCORES] = pyarrow.ListArray.from_arrays(ends, ordered.score)
    parquet.write_table(pyarrow.table(columns), file)
    progress(len(ordered), len(ordered))


FORMATS = (
    TraceFormat(
        "policylang",
        "JSON lines of MoE-PolicyLang",
        ".jsonl",
        _LACKS,
        lambda source: bool(_header(source)),
        _read,
        _write,
    ),
    TraceFormat(
        "policylang-parquet",
        "parquet of MoE-PolicyLang (needs pyarrow)",
        "",
        _LACKS,
        lambda source: set(source.columns) >= set(_COLUMNS[:3]),
        _read_parquet,
        _write_parquet,
    ),
)
