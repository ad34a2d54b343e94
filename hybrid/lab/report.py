"""The report of an experiment: one HTML file that needs no other, with its CSV and figures beside it."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_cache.costs import Machine
from gpu_cache.prefetch import Prefetch
from hybrid.errors import ConfigError
from hybrid.files import csv_kind, output_file
from hybrid.lab.claims import Finding, findings, rows_of
from hybrid.lab.curves import SizeCurve, size_curves
from hybrid.lab.curves import rows_of as curve_rows
from hybrid.lab.experiment import Experiment, file_name
from hybrid.lab.figures import curves_figure, hit_rate_figure, styled
from hybrid.lab.grid import BOUND
from hybrid.lab.html import Figure, Section, Table, Text, figure_of, write_page
from hybrid.lab.outcomes import Outcome, Place, Range, outcomes_of, records
from hybrid.lab.parts import Model
from hybrid.lab.replays import Row, Source, kept_provenance, kept_replays, read_sources
from hybrid.lab.verdict import MARGIN, verdicts

REPORT, CSV, CLAIMS_CSV, CURVES_CSV = "report.html", "results.csv", "claims.csv", "curves.csv"


def report(experiment: Experiment, folder: Path | None = None) -> Path:
    """Write the report of an experiment whose replays are all there; returns its path.

    folder: None: the experiment's. Raises ConfigError for missing replays, and where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("a report needs matplotlib, which is not installed: pip install 'hybrid-moe[research]'")
    folder = folder or experiment.folder
    sources = read_sources(experiment)
    outcomes = outcomes_of(kept_replays(experiment, sources, folder))
    write_csv(folder / CSV, records(experiment, outcomes))
    claims = findings(experiment, sources, outcomes)
    write_csv(folder / CLAIMS_CSV, rows_of(claims))
    sections = [Section("", [Text(text) for text in experiment.about.split("\n\n") if text.strip()])]
    if claims:
        sections.append(Section("What was published, and what is found here", [_claims(claims)]))
    curves: list[SizeCurve] = []
    for model in experiment.models:
        members = [one for one in outcomes if one.model == model.name]
        traces = [source for source in sources if source.model is model]
        sections.append(_model(experiment, model, traces, members, folder))
        of_model = size_curves(experiment, model, traces)
        sections[-1].parts += _curve_figures(model, of_model, folder)
        curves += of_model
    write_csv(folder / CURVES_CSV, curve_rows(curves))
    sections.append(Section("Where this comes from", [_provenance(kept_provenance(experiment, folder))]))
    write_page(folder / REPORT, experiment.title, sections)
    return folder / REPORT


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows with the same columns; None is an empty cell. Without rows nothing is written."""
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with output_file(path, csv_kind(list(rows[0]))) as file:
        file.write(text.getvalue().encode())


def _model(
    experiment: Experiment, model: Model, traces: Sequence[Source], outcomes: Sequence[Outcome], folder: Path
) -> Section:
    section = Section(model.name, [Text(_about(source)) for source in traces])
    if not outcomes:
        return section
    machines = experiment.machines_of(model)
    if machines:
        section.parts.append(_verdicts(outcomes, machines))
    path = folder / f"{file_name(model.name)}-hits.svg"
    rows = [_figure_row(one) for one in outcomes]
    styled(lambda: hit_rate_figure(rows, f"Hit rate of expert caches\n{model.name}"), path)
    section.parts.append(figure_of(path))
    section.parts.append(_table(outcomes, model.expert_mb, machines))
    return section


def _curve_figures(model: Model, curves: Sequence[SizeCurve], folder: Path) -> list[Figure]:
    """All curves of a model in one figure."""
    if not curves:
        return []
    path = folder / f"{file_name(model.name)}-curves.svg"
    styled(lambda: curves_figure(curve_rows(curves), f"Hit rate of every size\n{model.name}"), path)
    return [figure_of(path)]


def _about(source: Source) -> str:
    calls = source.calls
    sequences = len(set(calls.sequence.tolist()))
    return (
        f"{source.file}: {calls.total} calls of {calls.layers} layers of {calls.experts} experts, in {calls.steps} "
        f"steps of {sequences} sequences."
    )


def _figure_row(one: Outcome) -> Row:
    place = one.place
    row: Row = {**place._asdict(), "slots": place.slots, "policy": one.policy, "admission": one.admission}
    if one.prefetch != Prefetch.name:
        row["policy"] += f", {one.prefetch} prefetch"
    if one.machine:
        row["admission"] += f" for {one.machine}"
    row |= {what: one.mean(what) for what in ("hits", "calls")}
    return {**row, "hit_rate": one.hit_rate, "upper_bound": one.bound if one.policy == BOUND else None}


def _verdicts(outcomes: Sequence[Outcome], machines: dict[str, Machine]) -> Table:
    rows = [
        [one.machine, str(one.slots), f"{one.cpu:.2f}", f"{one.fixed:.2f}", f"{one.cache:.2f}", one.best, one.text]
        for one in verdicts(outcomes, machines)
    ]
    columns = ["machine", "slots", "CPU alone", "best fixed experts", "best cache", "which", "verdict"]
    caption = (
        "Does a cache pay? Predicted tokens/s of one sequence that decodes; fixed experts are chosen in hindsight. "
        f"Speeds within {MARGIN - 1:.0%} are not told apart."
    )
    return Table(caption, columns, rows, [True, False, False, False, False, True, True])


def _table(outcomes: Sequence[Outcome], expert_mb: float | None, machines: dict[str, Machine]) -> Table:
    """A row for each outcome; differences are to the first policy of the same cache."""
    columns = ["cache", "slots", "policy", "hits, %", "95 %", "beside the first, points", "regret, points"]
    columns += ["copies a step", *(["MB a step"] if expert_mb is not None else [])]
    columns += [f"tokens/s, {name}" for name in machines]
    first: dict[Place, Outcome] = {}
    rows = []
    for one in outcomes:
        base = first.setdefault(one.place, one)
        regret = "-" if one.regret is None else f"{100 * one.regret:.1f}"
        row = [str(one.place), str(one.place.slots), one.name, f"{100 * one.hit_rate:.1f}"]
        row += [_range(one.hit_interval, 100, "{:.1f}"), "" if one is base else _beside(one, base), regret]
        row += [f"{one.copies_per_step:.2f}"]
        row += [f"{one.copies_per_step * expert_mb:.1f}"] if expert_mb is not None else []
        row += [
            f"{one.tokens_per_second(rates):.2f}" if one.machine in (None, name) else ""
            for name, rates in machines.items()
        ]
        rows.append(row)
    caption = (
        "Hit rates over all calls with intervals of 95 % from resampled sequences or runs of steps; regret: what the "
        "bound hits beyond them."
    )
    return Table(caption, columns, rows, [name in ("cache", "policy") for name in columns])


def _beside(one: Outcome, base: Outcome) -> str:
    apart, ends = one.points_beside(base)
    return f"{apart:+.1f} ({_range(ends, 1, '{:+.1f}')})"


def _range(ends: Range | None, times: float, form: str) -> str:
    return "-" if ends is None else " to ".join(form.format(times * end) for end in ends)


def _claims(found: Sequence[Finding]) -> Table:
    rows = [
        [
            one.model,
            one.claim.says,
            one.place,
            one.published,
            f"{one.ours:.3f}".rstrip("0").rstrip("."),
            _range(one.range, 1, "{:.1f}"),
            one.holds,
            one.claim.source,
            one.claim.explained,
        ]
        for one in found
    ]
    columns = ["model", "claim", "cache", "published", "here", "95 %", "holds", "source", "why it differs"]
    said = Counter(one.holds for one in found)
    caption = f"In % of calls, or in points; {said['yes']} of {len(found)} hold, {said['unsure']} are unsure."
    numbers = ("published", "here", "95 %")
    return Table(caption, columns, rows, [name not in numbers for name in columns])


def _provenance(about: Row) -> Table:
    rows = [[name, text] for name, text in _lines(about)]
    return Table("Provenance", ["what", "value"], rows, [True, True])


def _lines(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested objects and lists as lines."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _lines(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for at, item in enumerate(value, 1):
            yield from _lines(item, f"{name} {at}")
    else:
        yield name, str(value)
