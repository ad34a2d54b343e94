"""Seconds of experts and copies on this machine: measured once, stored in a file, measured again on new hardware."""

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
    """Seconds of one expert by number of rows, ascending. threads: with the top_k experts of a row run together.
    device: None where no device was measured. device_start: time to start a layer there.
    """

    rows: tuple[int, ...]
    threads: tuple[float, ...]
    device: tuple[float, ...] | None = None
    device_start: float = 0.0

    def on_threads(self, rows: int) -> float:
        return _between(self.rows, self.threads, rows)

    @property
    def seconds_per_row_on_threads(self) -> float:
        """Seconds per row for many rows."""
        return self.threads[-1] / self.rows[-1]

    @property
    def seconds_per_row_on_device(self) -> float:
        """Seconds per row for many rows. The device must have been measured."""
        return self.on_device(self.rows[-1]) / self.rows[-1]

    def on_device(self, rows: int) -> float:
        """Seconds of an expert. The device must have been measured."""
        assert self.device is not None, "the device was not measured"
        return _between(self.rows, self.device, rows)


@dataclass(frozen=True)
class LinkSpeed:
    """Bytes per second between host and device, from pinned memory. to_device_beside: while the threads read memory.

    reads: bytes per second that the threads read; reads_beside: while copies to the device run. latency: seconds of a
    small copy.
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
    """A hash of the hardware and of how it is used. device: its name and driver, or empty."""
    cpu = (hardware.cpu_model, hardware.isa, hardware.cpus, threads)
    parts = (*cpu, hardware.memory_total, len(hardware.nodes), device)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cached_profile(
    folder: Path | None, mark: str, key: str, measure: Callable[[], tuple[ExpertTimes, LinkSpeed | None]]
) -> MachineProfile:
    """The profile in this machine's file in `folder`, after measuring `key` if it is not in it.

    folder: None stores nothing. An unreadable file is replaced by a new measurement; failures to write are ignored.
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
    """Linear interpolation between the nearest row counts; beyond the last in proportion to the rows."""
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
    except (HybridError, KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return None


def _times(body: Mapping[str, Any]) -> ExpertTimes:
    device = body["device"]
    rows, threads = tuple(map(int, body["rows"])), tuple(map(float, body["threads"]))
    if not rows or len(rows) != len(threads):
        raise ValueError("rows and seconds do not match")
    return ExpertTimes(rows, threads, tuple(map(float, device)) if device else None, float(body["device_start"]))
