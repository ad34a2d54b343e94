"""`hybrid trace`: traces of routing, whoever recorded them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from hybrid.commands import flags as f
from hybrid.commands.console import progress_bar, say, show, show_json
from hybrid.commands.flags import command, new_app
from hybrid.commands.tables import markdown
from hybrid.errors import ConfigError, cache_errors
from hybrid.files import check_output
from hybrid.files.traces import Opened, format_by_suffix, kind_of_format, open_trace_file, write_trace

if TYPE_CHECKING:
    from gpu_cache.traces.base import TraceFormat
    from gpu_cache.traces.facts import Facts

app = new_app()

_PATH: dict[str, Any] = {"parser": f.parse_path}
Source = Annotated[Path, typer.Argument(help="A trace of any format.", metavar="TRACE", **_PATH)]
Paths = Annotated[list[Path], typer.Argument(help="Traces, and where to write.", metavar="TRACE... TARGET", **_PATH)]
From = Annotated[str | None, typer.Option("--from", help="Its format.", metavar="FORMAT", show_default="by content")]
To = Annotated[str | None, typer.Option(help="The format of TARGET.", metavar="FORMAT", show_default="by name")]
Layers = Annotated[int | None, typer.Option(help="MoE layers of the model.", metavar="N", show_default="what it has")]
Experts = Annotated[int | None, typer.Option(help="Experts of a layer.", metavar="N", show_default="what it has")]
Count = Annotated[int, typer.Option("-n", "--count", help="How many.", metavar="N", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

OWN = ("csv", "parquet")  # formats of this project, which hold everything
_NOTED = 4  # scores of a line of `head`


@command(app, "TARGET is as it was")
def convert(paths: Paths, source: From = None, to: To = None, layers: Layers = None, experts: Experts = None) -> None:
    """Write traces as one in another format; of several, sequences and steps are numbered on.

    The formats are those of `hybrid trace formats`, which says what each cannot hold.
    """
    if len(paths) < 2:
        raise ConfigError(f"{paths[0]}: there is no TARGET to write to; give a trace, and a file for it")
    *sources, target = paths
    with cache_errors(), progress_bar() as bar:
        from gpu_cache.traces import joined, known_format

        known = known_format(to) if to else format_by_suffix(target)
        check_output("", target, kind_of_format(known))
        opened = [_open(path, source, layers, experts, bar) for path in sources]
        whole = joined([one.trace for one in opened], [str(path) for path in sources])
        write_trace(target, whole, known, partial(bar, f"writing {target.name}"))
    for said in _losses(opened, known):
        say(said)


@command(app)
def info(path: Source, source: From = None, layers: Layers = None, experts: Experts = None, json: Json = False) -> None:
    """Say what a trace holds: the model's sizes, tokens, calls, and how often experts are chosen again."""
    with cache_errors(), progress_bar() as bar:
        from gpu_cache.traces.facts import facts_of

        opened = _open(path, source, layers, experts, bar)
        facts = facts_of(opened.trace)
    if json:
        return show_json(_as_json(opened, facts), indent=1)
    show("\n".join([f"format     {opened.format.name}: {opened.format.about}", *_counts(facts), *_reuse(facts)]))


@command(app)
def head(path: Source, count: Count = 12, source: From = None, layers: Layers = None, experts: Experts = None) -> None:
    """Show the first calls of a trace: what each token chose at each layer, best first."""
    with cache_errors(), progress_bar() as bar:
        from gpu_cache.traces.base import choices

        opened = _open(path, source, layers, experts, bar)
    columns = ("step", "sequence", "position", "layer", "experts", "scores")
    rows = [
        [str(c.step), str(c.sequence), str(c.position), str(c.layer), _list(c.experts), _scores(c.scores)]
        for c in islice(choices(opened.trace, lambda done, total: None), count)
    ]
    show("\n".join(markdown(columns, rows, [False] * 4 + [True] * 2)))


@command(app)
def check(path: Source, source: From = None, layers: Layers = None, experts: Experts = None) -> None:
    """Say which rules a trace keeps. Ids that no model has are an error of every command that reads it."""
    with cache_errors(), progress_bar() as bar:
        from gpu_cache.traces import rules

        opened = _open(path, source, layers, experts, bar)
        verdicts = rules.check(opened.trace)
    show("\n".join(f"{'no ' if v.broken else 'yes'}  {v.rule}" + f"; {v.where}" * (v.broken > 0) for v in verdicts))
    broken = [verdict for verdict in verdicts if verdict.broken]
    if broken:
        raise ConfigError(
            f"{path}: breaks {len(broken)} of {len(verdicts)} rules, the first in {broken[0].broken} rows"
        )


@command(app)
def formats(json: Json = False) -> None:
    """List the formats: whose they are, whether they are read and written, and what they cannot hold."""
    from gpu_cache.traces import FORMATS

    if json:
        return show_json([_format_as_json(known) for known in FORMATS], indent=1)
    rows = [
        [known.name, "yes" if known.read else "", "yes" if known.write else "", known.about, known.lacks or "nothing"]
        for known in FORMATS
    ]
    show("\n".join(markdown(("format", "read", "written", "what it is", "what it lacks"), rows, [True] * 5)))


def _open(path: Path, source: str | None, layers: int | None, experts: int | None, bar: Any) -> Opened:
    from gpu_cache.traces import known_format

    wanted = known_format(source) if source else None
    return open_trace_file(path, layers, experts, "", wanted, partial(bar, f"reading {path.name}"))


def _losses(opened: Sequence[Opened], written: TraceFormat) -> list[str]:
    """What is made up because a file did not have it, and what is lost."""
    read = [one.format for one in opened]
    lines = {f"note: {known.name} lacks {known.lacks}" for known in read if known.lacks and known is not written}
    if written.lacks and any(known is not written for known in read):
        lines.add(f"note: {written.name} cannot hold {written.lacks}")
    early = [one.trace.next_expert is not None for one in opened]
    if any(early) and written.name not in OWN:
        lines.add(f"note: {written.name} cannot hold what routers say one layer early")
    elif any(early) and not all(early):
        lines.add(f"note: {early.count(False)} of {len(early)} traces lack what routers say one layer early: -1 there")
    return sorted(lines)


def _counts(facts: Facts) -> list[str]:
    few, many = facts.top_k
    each = str(few) if few == many else f"{few} to {many}"
    all_experts = facts.layers * facts.experts
    prompts = f", {facts.prompt_tokens:,} of them in prompts" if facts.prompt_tokens else ""
    return [
        f"model      {facts.layers} MoE layers of {facts.experts} experts, {each} for a token",
        f"tokens     {facts.tokens:,} in {facts.sequences:,} sequence{'s' * (facts.sequences != 1)}{prompts}; "
        f"{facts.steps:,} steps, of up to {facts.largest_step:,} tokens",
        f"calls      {facts.calls:,}, and {facts.rows:,} with those that a step repeats; "
        f"{facts.called:,} of {all_experts:,} experts are called ({facts.called / all_experts:.0%})",
        f"scores     {'of the gate' if facts.scored else 'not recorded: all are equal'}",
        f"early      {_early(facts.early)}",
    ]


def _early(share: float) -> str:
    if not share:
        return "what routers say one layer early is not recorded"
    return f"what routers say one layer early, of {share:.1%} of the calls before the last layer"


def _reuse(facts: Facts) -> list[str]:
    reuse = facts.reuse
    if reuse is None:
        return ["reuse      not known: no sequence has two tokens with all their layers"]
    rows = [
        ["those of the token before", reuse.tokens[0], reuse.one_of_token, reuse.same_sets],
        *(
            [f"those of the last {distance + 1} tokens", reuse.window[distance], None, None]
            for distance in range(1, min(3, len(reuse.window)))
        ),
        ["numbers of the layer before", reuse.layers, reuse.one_across, reuse.same_sets_across],
        ["by chance", reuse.chance, reuse.chance_of_one, reuse.chance_of_all],
    ]
    cells = [[name, *(_share(value) for value in values)] for name, *values in rows]
    return ["", *markdown(("experts that are", "share of them", "at least one", "all"), cells, [True, *[False] * 3])]


def _share(value: Any) -> str:
    """A mean over layers; of a model of one layer there is none before it."""
    return "" if value is None or not np.size(value) else f"{np.mean(value) * 100:.1f}%"


def _as_json(opened: Opened, facts: Facts) -> dict[str, Any]:
    said = asdict(facts)
    if facts.reuse is not None:
        said["reuse"] = {name: np.asarray(value).tolist() for name, value in said["reuse"].items()}
    return {"format": opened.format.name, **said}


def _format_as_json(known: TraceFormat) -> dict[str, Any]:
    return {
        "name": known.name,
        "about": known.about,
        "suffix": known.suffix,
        "lacks": known.lacks,
        "read": known.read is not None,
        "written": known.write is not None,
    }


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _scores(scores: Sequence[float]) -> str:
    return " ".join(f"{score:.3f}" for score in scores[:_NOTED]) + " ..." * (len(scores) > _NOTED)
