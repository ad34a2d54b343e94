"""What the machine can tell while steps run: the clock of its processors, and the energy that it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

_CPUS, _RAPL = Path("/sys/devices/system/cpu"), Path("/sys/class/powercap")
_HWMON = Path("/sys/class/hwmon")
_PROCESSORS = ("k10temp", "zenpower", "coretemp", "cpu_thermal")  # the drivers of processors' sensors
_WHOLE = ("Tctl", "Package id")  # the sensors of a whole processor, as their labels begin
_CPUINFO, _TASKS = Path("/proc/cpuinfo"), Path("/proc/self/task")
_TEMPERATURE_AGE = 1.0  # seconds, as the sensors themselves are slow
_FREQUENCY_AGE = 0.1  # seconds for which a frequency is taken as current: reading it is not free


@dataclass(frozen=True)
class Reading:
    """Clock in MHz, joules so far, and degrees Celsius of the processor; None where the machine does not tell."""

    cpu_mhz: float | None
    package_joules: float | None
    gpu_joules: float | None
    cpu_celsius: float | None = None


class Meters:
    """All of them together."""

    def __init__(self, cpus: Sequence[int] = ()) -> None:
        self._frequency, self._energy, self._temperature = FrequencyMeter(cpus), EnergyMeter(), TemperatureMeter()

    def read(self) -> Reading:
        energy = self._energy
        celsius = self._temperature.read()
        return Reading(self._frequency.read(), energy.package_joules(), energy.gpu_joules(), celsius)


class CoreMeter:
    """What share of the time since it was made the threads of this process stood ready and had no core to run on:
    other programs had it, or a quota was used up.
    """

    def __init__(self, tasks: Path = _TASKS) -> None:
        self._tasks = tasks
        self._start = self._read()

    def waited(self) -> float | None:
        """None where the system does not tell, or before anything has run."""
        ran, waited = (sum(part) for part in zip(*self._spent(), strict=True)) if self._start else (0, 0)
        return waited / (ran + waited) if ran else None

    def _spent(self) -> Iterator[tuple[int, int]]:
        """Nanoseconds of every thread, on a core and ready for one, since this was made."""
        for task, (ran, waited) in self._read().items():
            before = self._start.get(task, (0, 0))
            yield ran - before[0], waited - before[1]

    def _read(self) -> dict[str, tuple[int, int]]:
        found = {}
        for file in self._tasks.glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):  # a thread that ends while it is looked at
                ran, waited, _ = map(int, file.read_text().split())
                found[file.parent.name] = (ran, waited)
        return found


class FrequencyMeter:
    """Mean clock of some processors in MHz, None where the machine does not tell."""

    def __init__(self, cpus: Sequence[int] = ()) -> None:
        """cpus: numbers of the processors that compute; none: all."""
        names = [f"cpu{cpu}" for cpu in cpus] or ["cpu[0-9]*"]
        self._files = [file for name in names for file in sorted(_CPUS.glob(f"{name}/cpufreq/scaling_cur_freq"))]
        self._read_at = float("-inf")
        self._value: float | None = None

    def read(self) -> float | None:
        if monotonic() - self._read_at > _FREQUENCY_AGE:
            self._value, self._read_at = self._measure(), monotonic()
        return self._value

    def _measure(self) -> float | None:
        try:
            if self._files:
                values = [int(file.read_text()) / 1000 for file in self._files]
            else:
                lines = _CPUINFO.read_text().splitlines()
                values = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
        except (OSError, ValueError):
            return None
        return sum(values) / len(values) if values else None


class TemperatureMeter:
    """Degrees Celsius of the processor, of several the warmest; None where the machine does not tell."""

    def __init__(self) -> None:
        self._files = [file for folder in sorted(_HWMON.glob("hwmon*")) for file in _sensors(folder)]
        self._read_at = float("-inf")
        self._value: float | None = None

    def read(self) -> float | None:
        if self._files and monotonic() - self._read_at > _TEMPERATURE_AGE:
            self._value, self._read_at = self._measure(), monotonic()
        return self._value

    def _measure(self) -> float | None:
        try:
            return max(int(file.read_text()) / 1000 for file in self._files)
        except (OSError, ValueError):
            return None


def _sensors(folder: Path) -> list[Path]:
    """Those of a whole processor; where none says that it is, the first one of a processor's driver."""
    with contextlib.suppress(OSError):
        if (folder / "name").read_text().strip() in _PROCESSORS:
            labels = {file: file.read_text() for file in sorted(folder.glob("temp*_label"))}
            whole = [file for file, label in labels.items() if label.startswith(_WHOLE)]
            found = [folder / file.name.replace("_label", "_input") for file in whole]
            return found or sorted(folder.glob("temp*_input"))[:1]
    return []


class EnergyMeter:
    """Joules since it was made, of the processor packages (RAPL) and of the GPUs (NVML), None where not readable."""

    def __init__(self) -> None:
        self._packages = [counter for path in sorted(_RAPL.glob("intel-rapl:*")) if (counter := _package(path))]
        self._gpus = _gpu_counters()

    def package_joules(self) -> float | None:
        try:
            return sum(counter.read() for counter in self._packages) if self._packages else None
        except (OSError, ValueError):
            return None

    def gpu_joules(self) -> float | None:
        try:
            return sum(read() for read in self._gpus) if self._gpus else None
        except Exception:  # whatever the driver's library raises
            return None


class _RaplCounter:
    """A counter of microjoules that begins anew when it is full."""

    def __init__(self, path: Path) -> None:
        self._file, self._range = path / "energy_uj", int((path / "max_energy_range_uj").read_text())
        self._last, self._sum = self._value(), 0

    def read(self) -> float:
        value = self._value()
        self._sum += (value - self._last) % (self._range + 1)
        self._last = value
        return self._sum / 1e6

    def _value(self) -> int:
        return int(self._file.read_text())


def _package(path: Path) -> _RaplCounter | None:
    with contextlib.suppress(OSError, ValueError):
        if (path / "name").read_text().startswith("package"):
            return _RaplCounter(path)
    return None


def _gpu_counters() -> list[Callable[[], float]]:
    """For each GPU a function that reads its joules since it was made."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        starts = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]
    except Exception:  # not installed, no driver, or a GPU that does not count
        return []

    def counter(handle: object, start: int) -> Callable[[], float]:
        return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1000

    return [counter(handle, start) for handle, start in zip(handles, starts, strict=True)]
