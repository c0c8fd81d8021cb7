"""Records what an energy meter reads over time, at full rate, and sums up such a trace.

python -m profiler.energy --record idle.csv --seconds 60

python -m profiler.energy --record busy.csv --seconds 60 --load

python -m profiler.energy --show busy.csv
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from profiler.command_line import BadInput, run
from profiler.device import DeviceInfo, cpu_info
from profiler.energy import EnergySettings, measure_energy
from profiler.energy_trace import ReplayMeter, Trace, load_trace, record, save_trace, summary
from profiler.meters import NvmlCounterMeter, find_meter
from profiler.nvml import Unavailable, cuda_info, gpu_indices, open_probe

app = typer.Typer(add_completion=False)


def _reader(device: DeviceInfo) -> Callable[[], tuple[float | None, float | None]]:
    """Reads energy in mJ and power in W, each None where the device does not tell."""
    meter = find_meter(device)
    if device.kind == "cpu":
        return lambda: (meter.read_mj(), None)
    assert device.uuid is not None
    probe = open_probe(device.uuid)
    counter = isinstance(meter, NvmlCounterMeter)
    return lambda: (meter.read_mj() if counter else None, probe.power().watts)


def _load(device: str) -> Callable[[], Any]:
    import torch

    torch_device = torch.device(device)
    factor = torch.rand(2048, 2048, device=torch_device)
    out = torch.empty_like(factor)

    def work() -> None:
        torch.matmul(factor, factor, out=out)
        if torch_device.type == "cuda":
            torch.cuda.synchronize(torch_device)

    return work


def _device(name: str) -> DeviceInfo:
    if name == "cpu":
        return cpu_info(threads=1)
    if name == "all" or not name.startswith("cuda"):
        raise BadInput(f"--device {name}: must be cpu or cuda:N")
    (index,) = gpu_indices(name)
    return cuda_info(index)


def _record(device: str, seconds: float, load: bool) -> Trace:
    info = _device(device)
    try:
        read = _reader(info)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(f"recording {info.label}", total=seconds)
            about = f"{info.label} {info.uuid or ''}, driver {info.driver}, load: "
            return record(
                read,
                seconds,
                about + ("matmul 2048 fp32" if load else "none"),
                _load(device) if load else None,
                lambda elapsed_s: progress.update(task, completed=elapsed_s),
            )
    except Unavailable as error:
        raise BadInput(f"--device {device}: {error}") from error


def _replayed(trace: Trace) -> str:
    """What the windows make of a trace, played back in a time that passes with each launch."""
    now_s = 0.0

    def pass_s(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    meter = ReplayMeter(trace, lambda: now_s)
    reading = measure_energy(
        lambda number: pass_s(number * 1e-3), meter, EnergySettings(), lambda: now_s, pass_s
    )
    if reading.energy_mj is None:
        return f"windows of 5 s: no figure, {reading.reason}"
    flag = reading.details.get("energy_flag")
    return (
        f"windows of 5 s: {reading.energy_mj:.4g} W by {reading.source}, "
        f"coefficient of variation {reading.variation:.2%}" + (f"; {flag}" if flag else "")
    )


@app.command(help=__doc__)
def main(
    record_to: Annotated[Path | None, typer.Option("--record", help="CSV to write.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Length of the recording; default 60.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda:N, to record; default cuda:0.")
    ] = None,
    load: Annotated[bool, typer.Option("--load", help="Multiply matrices meanwhile.")] = False,
    show: Annotated[Path | None, typer.Option(help="CSV to sum up.")] = None,
) -> None:
    """Records a trace, or says what is in one."""
    if (record_to is None) == (show is None):
        raise BadInput("--record, --show: give one of them")
    if record_to is None:
        given = {"--seconds": seconds is not None, "--device": device is not None, "--load": load}
        for option in (name for name, there in given.items() if there):
            raise BadInput(f"{option}: applies to --record, not to --show")
    else:
        if not os.access(record_to.parent, os.W_OK):
            raise BadInput(f"--record {record_to}: cannot write in {record_to.parent}")
        save_trace(_record(device or "cuda:0", seconds or 60.0, load), record_to)
    path = record_to or show
    assert path is not None
    trace = load_trace(path)
    print(f"{path}: {trace.origin}, {trace.about}")
    for line in (*summary(trace), _replayed(trace)):
        print(line)


if __name__ == "__main__":
    run(app)
