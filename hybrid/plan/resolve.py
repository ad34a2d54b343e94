"""From a configuration to a plan: what `--device auto` means on this machine, then the plan of the model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hybrid.config import DEVICES, EngineConfig, check_config
from hybrid.errors import ConfigError
from hybrid.formats.mix import parse_mix
from hybrid.machine import gpu as usable
from hybrid.machine.hardware import probe
from hybrid.machine.rates import measured_rates
from hybrid.models import model_spec
from hybrid.plan.plan import Plan, make_plan
from hybrid.plan.route_trace import read_route_trace
from hybrid.weights.hub import with_local_model
from hybrid.weights.pack import Notice, describe

EMBEDDED_MODEL = Path(__file__).parent.parent / "assets" / "tiny_moe"


def plan_model(config: EngineConfig, notice: Notice | None = None) -> Plan:
    """The plan of the configured model on this machine, from its config.json alone: no weight is read or packed.

    notice: that of `resolve_device`, and called with a line if a trace routes in place of the model. Raises
    ConfigError, WeightsError or KernelError; a plan that does not fit comes back with `problem` set.
    """
    config = resolve_device(with_local_model(config, only_config=True), notice)
    hardware = probe(config.isa)
    if config.device == "cuda":
        hardware = replace(hardware, device_memory=_device_memory())
    path = config.model_path or EMBEDDED_MODEL
    contents, native = describe(path)
    spec = model_spec(contents)
    if config.route_trace:
        read_route_trace(config.route_trace, spec)
        if notice:
            notice(f"note: experts are those of {config.route_trace}, not of the model's routers: texts mean nothing")
    rates = None
    if config.chunk_size == "auto" and not (config.cached or config.step_device):
        rates = measured_rates(hardware, config.threads or hardware.default_threads)
    return make_plan(spec, hardware, config, parse_mix(config.weight_format, native), rates)


def resolve_device(config: EngineConfig, notice: Notice | None = None) -> EngineConfig:
    """A copy with a device in place of "auto": that of HYBRID_DEVICE, else a usable GPU, else the CPU.

    Other flags that exclude a GPU make it the CPU. notice: called with a line if a GPU is here and cannot be used.
    Raises ConfigError for values out of range.
    """
    check_config(config)
    if config.device == "auto" and (named := os.environ.get("HYBRID_DEVICE")):
        if named not in DEVICES:
            raise ConfigError(f"HYBRID_DEVICE is {named!r}; allowed: {', '.join(DEVICES)}, or unset it")
        config = replace(config, device=named)
        check_config(config)
    if config.device != "auto":
        return config
    on_cpu, on_gpu = (replace(config, device=device) for device in ("cpu", "cuda"))
    if not _wants_gpu(on_gpu) or not usable.gpu_is_here():  # the last imports no torch, which takes seconds
        return on_cpu
    problem = usable.why_unusable() or _planning_problem(on_gpu, on_cpu)
    if problem and notice:
        notice(f"note: a GPU is here but {problem}; going on with the CPU")
    return on_cpu if problem else on_gpu


def _wants_gpu(config: EngineConfig) -> bool:
    """Whether the rest of a configuration allows its device to be a GPU, and leaves it something to do."""
    try:
        check_config(config)
    except ConfigError:
        return False
    return config.step_on != "torch-cpu" and bool(config.cached or config.step_device)


def _planning_problem(on_gpu: EngineConfig, on_cpu: EngineConfig) -> str | None:
    """Why a model can be planned for the CPU alone; what forbids both is for the plan to come to say."""
    try:
        plan_model(on_gpu)
    except ConfigError as error:
        plan_model(on_cpu)
        return str(error)
    return None


def _device_memory() -> int:
    """Bytes that are free on the GPU. Raises ConfigError if there is none that can be used."""
    if problem := usable.why_unusable():
        raise ConfigError(f"--device cuda cannot be had: {problem}; use auto, cpu or simulated")
    return usable.free_bytes()
