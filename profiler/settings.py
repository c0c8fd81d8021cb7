"""From the options of a command to what it works on: a sweep's shapes and the devices."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from kernels.targets import KernelTarget
from profiler import nvml
from profiler.accounting import Accounting
from profiler.command_line import BadInput, load_config
from profiler.device import DeviceInfo, cpu_info
from profiler.model_workloads import model_layers
from profiler.rpc import remote_site
from profiler.samples import PRESETS, TimingSettings
from profiler.sites import Site, cpu_site, cuda_site
from profiler.sweep_config import SweepConfig

SWEEPS = Path(__file__).parent / "sweeps"

# Instruction sets to build for instead of this CPU's own, and LLVM's name of a chip with no more.
CHIPS = {"avx2": "x86-64-v3", "avx512f": "x86-64-v4"}


@dataclass(frozen=True)
class Setting:
    """On what and how a sweep measures.

    Attributes:
        site: The device.
        config: What to measure.
        run: Name of the sweep.
        roofs: What the device can do at most, measured in this sweep.
        launch_overheads: What a launch costs in ms, ``ours`` and ``torch``; likewise.
        noise_floor: Least relative difference that counts as one, measured in this sweep.
        accounting: Where the time goes.
    """

    site: Site
    config: SweepConfig
    run: str
    roofs: dict[str, float] = field(default_factory=dict)
    launch_overheads: dict[str, float] = field(default_factory=dict)
    noise_floor: float | None = None
    accounting: Accounting = field(default_factory=Accounting)

    @property
    def device(self) -> DeviceInfo:
        """Who is measured."""
        return self.site.device

    @property
    def target(self) -> KernelTarget:
        """What kernels are built for."""
        return self.site.target

    @property
    def timing(self) -> TimingSettings:
        """How long and how precisely."""
        return PRESETS[self.config.timing]


def config_for(config: str | None, model: str | None, batch: int | None) -> tuple[str, SweepConfig]:
    """The sweep that was asked for: a TOML, or the layers of a model on 1 image or a batch of them.

    Raises:
        BadInput: If both were given, or a batch without a model, or the TOML is bad.
        ModelError: If timm does not know the model.
    """
    if model is None and batch is not None:
        raise BadInput(
            f"--batch {batch}: applies to --model; a sweep's own shapes name their tokens"
        )
    if model is None:
        return load_config(config or "quick-cpu", SWEEPS, SweepConfig)
    if config is not None:
        raise BadInput("--config and --model: give one of them")
    images = 1 if batch is None else batch
    shapes = dict.fromkeys(layer.shape for layer in model_layers(model, images))
    return f"{model}-b{images}", SweepConfig(shapes=tuple(shapes))


def settings_for(
    config: SweepConfig, name: str, device: str, threads: str | None, isa: str | None = None
) -> list[Setting]:
    """One Setting for each device of this machine that was asked for.

    With ``isa`` kernels are built for less than this CPU can do, and that is a device of its own.

    Raises:
        BadInput: On a malformed option, or if all GPUs were asked for and there is none.
        DeviceError: If a device is not there.
    """
    accounting = Accounting()
    if device == "cpu":
        counts = thread_counts(threads) or config.threads or (len(os.sched_getaffinity(0)),)
        if isa is not None and isa not in CHIPS:
            raise BadInput(f"--isa {isa}: must be one of {', '.join(CHIPS)}")
        chip = CHIPS[isa] if isa else None
        sites = [cpu_site(cpu_info(count, isa), chip) for count in counts]
    elif threads is not None or isa is not None:
        option = f"--threads {threads}" if threads is not None else f"--isa {isa}"
        raise BadInput(f"{option}: applies to CPUs, not to --device {device}")
    else:
        sites = [cuda_site(nvml.cuda_info(index), index) for index in nvml.gpu_indices(device)]
    return [Setting(site, config, name, accounting=accounting) for site in sites]


def remote_settings(
    config: SweepConfig,
    name: str,
    device: str,
    threads: str | None,
    tracker: str | None,
    key: str | None,
    chip: str | None,
    triple: str | None,
) -> list[Setting]:
    """One Setting for each thread count of a device behind TVM's RPC tracker; 1 by default.

    Raises:
        BadInput: On a malformed option.
        DeviceError: If the tracker has no such device.
    """
    if tracker is None or key is None:
        raise BadInput("--rpc and --key: one needs the other")
    if device != "cpu":
        raise BadInput(f"--device {device}: with --rpc, only CPUs are measured")
    accounting = Accounting()
    counts = thread_counts(threads) or config.threads or (1,)
    sites = [remote_site(tracker, key, count, chip, triple) for count in counts]
    return [Setting(site, config, name, accounting=accounting) for site in sites]


def thread_counts(threads: str | None) -> tuple[int, ...]:
    """The whole numbers of ``--threads 1,2``; none without the option.

    Raises:
        BadInput: If it is none of these.
    """
    if threads is None:
        return ()
    parts = [part.strip() for part in threads.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise BadInput(f"--threads {threads}: must be whole numbers separated by commas")
    return tuple(dict.fromkeys(int(part) for part in parts))
