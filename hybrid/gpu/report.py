"""How a device computed the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DeviceReport:
    """decoding, prompts: whose attention was taken for rows of either kind; the seconds of a call, by name, of all that
    were tried. replayed: works that ran by CUDA graphs; notes: one line for each thing that made steps slower.
    """

    decoding: str
    decoding_seconds: Mapping[str, float]
    prompts: str
    prompts_seconds: Mapping[str, float]
    replayed: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        graphs = f"{self.replayed} works by CUDA graphs" if self.replayed else "no CUDA graphs"
        decoding = _choice(self.decoding, self.decoding_seconds)
        chosen = f"attention {decoding} to decode, {_choice(self.prompts, self.prompts_seconds)} for prompts; {graphs}"
        return "\n".join([f"device       {chosen}", *(f"             {note}" for note in self.notes)])


def _choice(name: str, seconds: Mapping[str, float]) -> str:
    """The times of all that were tried, the fastest first."""
    if not seconds:
        return f"by {name}"
    times = ", ".join(f"{other} {seconds[other] * 1e6:.0f}" for other in sorted(seconds, key=seconds.__getitem__))
    return f"by {name} (us: {times})"
