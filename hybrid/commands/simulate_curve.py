"""`hybrid simulate --curve`: hits of every size of a cache, from one pass over a trace for each policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import ceil
from typing import TYPE_CHECKING, Any

from hybrid.commands.console import progress_bar, say
from hybrid.commands.simulate_output import heading
from hybrid.commands.spread import SPREAD, spread
from hybrid.commands.tables import markdown
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from gpu_cache.trace import Calls

Row = dict[str, Any]
SIZES = 32  # of a table at most; CSV and JSON have all
# What holds of every point: copies after every miss, at once and without a limit.
HELD: Row = {"admission": "always", "quota": None, "delay": 0, "seed": 0, "prefetch": "none"}


def curve_policies(words: Sequence[str] | None) -> list[str]:
    """The policies as they are spelt; None: all that have a curve. Raises ConfigError naming those that have none, and
    CacheError for those that there are not; of `all` a note names them.
    """
    from gpu_cache.policies import known_policy
    from gpu_cache.simulator import policy_names
    from hybrid.lab.curves import CURVE_POLICIES

    spelt = {name.lower(): name for name in CURVE_POLICIES}
    found, without = list[str](), list[str]()
    for word in words or ["all"]:
        if word.lower() == "all":
            found += CURVE_POLICIES
        elif word.lower() in spelt:
            found.append(spelt[word.lower()])
        else:
            without.append(known_policy(word, policy_names()))
    if without:
        raise ConfigError(
            f"--curve cannot be had of {', '.join(without)}: one pass gives the hits of every size only of "
            f"{', '.join(CURVE_POLICIES)}; replay the others with --nways"
        )
    if words is not None and "all" in map(str.lower, words):
        others = ", ".join(name for name in policy_names() if name not in CURVE_POLICIES)
        say(f"note: no curve from one pass, so that --nways has to replay them: {others}")
    return list(dict.fromkeys(found))


def run_curves(
    traces: Mapping[str, Calls], policies: Sequence[str], nblocks: Sequence[int], mappings: Sequence[str]
) -> Row:
    """As `hybrid simulate` describes replays: {"provenance": ..., "results": [...]}, a row for every size. With several
    traces "results" has their means and "replays" what these are the means of. Raises CacheError for what is no cache.
    """
    from gpu_cache.sweep import describe_trace, provenance
    from hybrid import __version__
    from hybrid.lab.curves import hits_of_sizes

    ways = list(product(nblocks, mappings, policies))
    replays: list[list[Row]] = []
    with progress_bar() as progress:
        for path, calls in traces.items():
            report = partial(progress, "curves" if len(traces) == 1 else f"curves of {path}")
            rows: list[Row] = []
            for at, (count, mapping, policy) in enumerate(ways):
                report(at, len(ways))
                hits = hits_of_sizes(calls, policy, count, mapping)
                rows += _sizes(
                    path, calls.total, hits.tolist(), {"policy": policy, "nblocks": count, "mapping": mapping}
                )
            report(len(ways), len(ways))
            replays.append(rows)
    described = [{"file": path, **describe_trace(calls)} for path, calls in traces.items()]
    about = {**provenance(__version__), "trace": described[0]}
    if len(traces) == 1:
        return {"provenance": about, "results": replays[0]}
    results = [_mean(rows) for rows in zip(*replays, strict=True)]
    flat = [row for rows in replays for row in rows]
    return {"provenance": {**about, "traces": described}, "results": results, "replays": flat}


def _sizes(path: str, calls: int, hits: Sequence[float], cache: Row) -> Iterator[Row]:
    for nways, found in enumerate(hits, 1):
        size = {"nways": nways, "slots": cache["nblocks"] * nways, "calls": calls, "hits": round(found)}
        yield {"trace": path, **cache, **HELD, **size, "hit_rate": round(found / calls, 6)}


def _mean(rows: Sequence[Row]) -> Row:
    """Of one size: the mean of the rates, whatever the lengths of the traces, and sums of what is counted."""
    mean = {name: value for name, value in rows[0].items() if name != "trace"} | {"traces": len(rows)}
    mean |= {name: sum(row[name] for row in rows) for name in ("calls", "hits")}
    mean["hit_rate"], mean["hit_rate" + SPREAD] = spread([row["hit_rate"] for row in rows])
    return mean


def curves_to_table(report: Row) -> str:
    """A markdown table with a row for a size and a column for a policy; of many sizes some."""
    results: list[Row] = report["results"]
    policies = list(dict.fromkeys(str(row["policy"]) for row in results))
    keys = [name for name in ("nblocks", "mapping") if len({row[name] for row in results}) > 1]
    fixed = "".join(f"; {name} {results[0][name]}" for name in ("nblocks", "mapping") if name not in keys)
    every: dict[tuple[Any, ...], int] = {}  # of each cache: how many sizes are between two rows
    by_size: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in results:
        cache = row["nblocks"], row["mapping"]
        every[cache] = max(every.get(cache, 1), ceil(row["nways"] / SIZES))
        by_size.setdefault((*cache, row["nways"], row["slots"]), {})[row["policy"]] = _percent(row)
    body = [
        [*(str(dict(zip(("nblocks", "mapping"), size, strict=False))[key]) for key in keys), *map(str, size[2:])]
        + [cells[policy] for policy in policies]
        for size, cells in by_size.items()
        if size[2] == 1 or size[2] % every[size[:2]] == 0
    ]
    columns = [*keys, "nways", "slots", *policies]
    lines = [heading(report) + fixed, "", *markdown(columns, body, [name == "mapping" for name in columns])]
    if len(body) < len(by_size):
        lines += ["", f"{len(body)} of {len(by_size)} sizes; --output csv has all"]
    return "\n".join(lines)


def _percent(row: Row) -> str:
    spread_of = row.get("hit_rate" + SPREAD)
    return f"{100 * row['hit_rate']:.1f}%" + ("" if spread_of is None else f" ± {100 * spread_of:.1f}")
