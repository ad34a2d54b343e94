"""What experts and copies cost on this machine: measured once, kept in a file, and again when the hardware changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.errors import HybridError
from hybrid.files import read_json_object, write_json
from hybrid.machine.hardware import HardwareSpec

VERSION = 1
ROWS = (1, 2, 4, 8, 32, 128, 512)  # that an expert gets; prompts have many, tokens one


@dataclass(frozen=True)
class ExpertTimes:
    """Seconds of one expert for some numbers of rows, ascending: on the threads when those of a row run together, and
    on the device, beside what it takes to begin there. None: not measured, for a simulated device or none.
    """

    rows: tuple[int, ...]
    threads: tuple[float, ...]
    device: tuple[float, ...] | None = None
    device_start: float = 0.0

    def on_threads(self, rows: int) -> float:
        return _between(self.rows, self.threads, rows)

    @property
    def row_on_threads(self) -> float:
        """Of an expert with many rows, each of them."""
        return self.threads[-1] / self.rows[-1]

    @property
    def row_on_device(self) -> float:
        """The same there, only where it was measured."""
        return self.on_device(self.rows[-1]) / self.rows[-1]

    def on_device(self, rows: int) -> float:
        """Only where it was measured."""
        assert self.device is not None, "the device was not measured"
        return _between(self.rows, self.device, rows)


@dataclass(frozen=True)
class LinkSpeed:
    """Bytes a second between host and device, from pinned memory: alone, and while the threads read memory.

    reads: what the threads read alone; reads_beside: while copies to the device run. latency: seconds of a small copy.
    """

    to_device: float
    to_host: float
    to_device_beside: float
    reads: float
    reads_beside: float
    latency: float


@dataclass(frozen=True)
class MachineProfile:
    """experts: by `expert_key`. link: None without a device."""

    experts: Mapping[str, ExpertTimes]
    link: LinkSpeed | None = None


def machine_mark(hardware: HardwareSpec, threads: int, device: str = "") -> str:
    """What tells one machine, as it is used, from another. device: its name and driver, or nothing."""
    cpu = (hardware.cpu_model, hardware.isa, hardware.cpus, threads)
    parts = (*cpu, hardware.memory_total, len(hardware.nodes), device)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cached_profile(
    folder: Path | None, mark: str, key: str, measure: Callable[[], tuple[ExpertTimes, LinkSpeed | None]]
) -> MachineProfile:
    """The profile that the file of this machine in `folder` holds, with `key` measured if it is not in it.

    folder: None keeps nothing. A file that cannot be read is measured anew; one that cannot be written is not kept.
    """
    path = folder / f"machine-{mark}.json" if folder else None
    known = _read(path) if path else None
    if known and key in known.experts:
        return known
    times, link = measure()
    found = MachineProfile({key: times}, link)
    if known:
        found = replace(known, experts={**known.experts, key: times}, link=link or known.link)
    if path:
        with suppress(HybridError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"version": VERSION, **_to_dict(found)})
    return found


def _between(rows: tuple[int, ...], seconds: tuple[float, ...], count: int) -> float:
    """By the straight line between the two nearest; beyond the last in proportion to the rows."""
    if count >= rows[-1]:
        return seconds[-1] * count / rows[-1]
    after = next(i for i, known in enumerate(rows) if known >= count)
    if rows[after] == count or after == 0:
        return seconds[after]
    share = (count - rows[after - 1]) / (rows[after] - rows[after - 1])
    return seconds[after - 1] + share * (seconds[after] - seconds[after - 1])


def _to_dict(profile: MachineProfile) -> dict[str, Any]:
    experts = {key: asdict(times) for key, times in profile.experts.items()}
    return {"experts": experts, "link": asdict(profile.link) if profile.link else None}


def _read(path: Path) -> MachineProfile | None:
    try:
        body = read_json_object(path)
        if body.pop("version") != VERSION:
            return None
        experts = {key: _times(times) for key, times in body["experts"].items()}
        return MachineProfile(experts, LinkSpeed(**body["link"]) if body["link"] else None)
    except (HybridError, KeyError, TypeError, AttributeError, ValueError):
        return None


def _times(body: Mapping[str, Any]) -> ExpertTimes:
    device = body["device"]
    rows, threads = tuple(map(int, body["rows"])), tuple(map(float, body["threads"]))
    if not rows or len(rows) != len(threads):
        raise ValueError("rows and seconds do not match")
    return ExpertTimes(rows, threads, tuple(map(float, device)) if device else None, float(body["device_start"]))
