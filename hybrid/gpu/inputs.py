"""Inputs of a step on the device: its rows, where their keys and values go, and which mirrored tokens they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid.core import Batch
from hybrid.formats.block import round_up
from hybrid.gpu.mirror import KvMirror, Run, extents_of, rings_of, seen_places
from hybrid.gpu.parts import RopeFrequencies, growth, rope_table, scaled

KEYS = 256  # rings are read in multiples of this, so that shapes do not change with every token


@dataclass(frozen=True)
class Group:
    """Runs of equal length whose attention is computed together. rows: int64 [rows], indexes into the step. rings: of
    the mirror. keys: number of places of each ring that are read. seen: by window, bool [runs, rows of a run, keys].
    """

    sequences: tuple[int, ...]
    rows: Tensor
    rings: slice | Tensor
    keys: int
    seen: dict[int | None, Tensor]


@dataclass(frozen=True)
class StepInputs:
    """embedded: float32 [rows, hidden]. sequences, places: int64 [rows], where in the mirror keys and values go.
    tables: cosines and sines of every rope. growths: of the queries that turn by each, see `growth`. older: by window,
    whether any row sees tokens that are not mirrored. taken: int32 [MoE layers, rows, top_k], experts that replace
    those of the routers, or None.
    """

    embedded: Tensor
    logit_rows: Tensor
    sequences: Tensor
    places: Tensor
    tables: tuple[tuple[Tensor, Tensor], ...]
    growths: tuple[Tensor | None, ...]
    groups: tuple[Group, ...]
    older: dict[int | None, bool]
    taken: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.sequences)

    @property
    def whole(self) -> bool:
        """Whether every token that its rows see is mirrored."""
        return not any(self.older.values())

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Key of steps that launch identical work. None unless every row is one decode token whose context is fully
        mirrored.
        """
        if len(self.groups) != 1 or len(self.groups[0].sequences) != self.rows or not self.whole:
            return None
        (group,) = self.groups
        return (group.keys, len(self.logit_rows), *group.sequences)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.embedded, self.logit_rows, self.sequences, self.places)
        if self.taken is not None:
            yield self.taken
        for table in self.tables:
            yield from table
        yield from (growth for growth in self.growths if growth is not None)
        for group in self.groups:
            yield group.rows
            if isinstance(group.rings, Tensor):
                yield group.rings
            yield from group.seen.values()

    def copy_from(self, other: StepInputs) -> StepInputs:
        """Copy another step's values into these tensors, in place; shapes must match."""
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)
        return self


def runs_of(batch: Batch, mirror: KvMirror, refill: Callable[[int, int, int], None]) -> list[Run]:
    """Split the rows into runs of one sequence each, and extend the mirror by them. refill: called with a sequence and
    positions [start, end) of it that are to be mirrored too.
    """
    found, row = [], 0
    for sequence, same in groupby(batch.sequences.tolist()):
        rows, position = len(list(same)), int(batch.positions[row])
        start, end = mirror.missing(sequence, position, rows)
        if start < end:
            refill(sequence, start, end)
            mirror.refill(sequence, start, end)
        found.append(Run(sequence, row, rows, position, *mirror.extend(sequence, position, rows)))
        row += rows
    return found


def make_inputs(
    batch: Batch,
    runs: Sequence[Run],
    embedding: Tensor,
    ropes: Sequence[RopeFrequencies],
    windows: Set[int | None],
    capacity: int,
    taken: npt.NDArray[np.int32] | None = None,
    embedding_scale: float = 1.0,
) -> StepInputs:
    """embedding: [vocab, hidden], on the device. ropes: on the device. capacity: places of a
    ring. taken: as in StepInputs, on the host.
    """
    device = embedding.device
    tokens, sequences, positions, logit_rows, lengths = (
        torch.from_numpy(array).to(device, torch.int64, copy=True)
        for array in (batch.token_ids, batch.sequences, batch.positions, batch.logit_rows, batch.known_lengths())
    )
    return StepInputs(
        embedded=scaled(embedding[tokens].float(), embedding_scale),
        logit_rows=logit_rows,
        sequences=sequences,
        places=positions % capacity,
        tables=tuple(rope_table(positions, lengths, rope) for rope in ropes),
        growths=tuple(growth(positions, rope) for rope in ropes),
        groups=tuple(_group(group, windows, capacity, device) for group in _together(runs)),
        older={window: any(_sees_older(run, window) for run in runs) for window in windows},
        taken=None if taken is None else torch.from_numpy(taken).to(device, copy=True),
    )


def _group(runs: Sequence[Run], windows: Set[int | None], capacity: int, device: torch.device) -> Group:
    rows = torch.cat([torch.arange(run.row, run.row + run.rows) for run in runs]).to(device)
    sequences, keys = tuple(run.sequence for run in runs), min(capacity, round_up(max(run.end for run in runs), KEYS))
    extents = extents_of(runs, device)
    seen = {window: seen_places(extents, runs[0].rows, keys, capacity, window) for window in windows}
    return Group(sequences, rows, rings_of(sequences, device), keys, seen)


def _together(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups for attention: all decode rows together, each prompt alone."""
    decoding = [run for run in runs if run.rows == 1]
    return [*([decoding] if decoding else []), *([run] for run in runs if run.rows > 1)]


def _sees_older(run: Run, window: int | None) -> bool:
    return run.start > (0 if window is None else max(0, run.position - window + 1))
