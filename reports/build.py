"""SPINE and CLI: run folders -> one offline HTML page that says whether it pays here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from profiler.command_line import BadInput, output_folder
from profiler.command_line import run as run_command
from profiler.whole_file import write_whole
from reports import (
    ablation_section,
    accuracy_section,
    advice_section,
    energy_section,
    growth_section,
    kernel_sections,
    layer_section,
    model_sections,
    noise_section,
    prediction_section,
    provenance,
    rival_section,
    runs_section,
    verdict,
    where_section,
)
from reports.html import Page, Part, render
from reports.key_figures import key_figures
from reports.run_folder import RunFolder, load_run

app = typer.Typer(add_completion=False)


def compose(run: RunFolder, others: Sequence[RunFolder] = ()) -> Page:
    """The story: does it pay here, where, by how much, at what accuracy, how sure are we.

    Args:
        run: What the page is about.
        others: Set beside it, in a part of their own.
    """
    parts = (
        Part("Where does it pay?", (where_section.where(run), advice_section.advice(run))),
        Part(
            "By how much?",
            (
                kernel_sections.kernels(run),
                rival_section.rivals(run),
                layer_section.layers(run),
                growth_section.growth(run),
                growth_section.scaling(run),
            ),
        ),
        Part(
            "At what accuracy?",
            (
                accuracy_section.accuracy(run),
                ablation_section.ablation(run),
                energy_section.energy(run),
                model_sections.weights(run),
                model_sections.routing(run),
                model_sections.training(run),
                model_sections.agreement(run),
            ),
        ),
        Part("How sure are we?", (prediction_section.prediction(run), noise_section.noise(run))),
        Part("Where is it from?", (provenance.machine(run), provenance.method(run))),
    )
    side_by_side = (Part("Other runs", (runs_section.runs((run, *others)),)),) if others else ()
    device = run.device.label if run.device else "unknown"
    return Page(
        title="Does replacing multiplications by shifts and adds pay on this device?",
        subtitle=f"Device: {device} · run: {run.path.resolve().name}",
        verdict=verdict.decide(run),
        cards=key_figures(run),
        missing=tuple(run.absence(name) for name in run.missing),
        parts=side_by_side + parts,
    )


def build(
    run_folder: Path, out: Path | None = None, others: Sequence[Path] = ()
) -> tuple[Path, Page]:
    """Reads run folders and writes the report of the first.

    Args:
        run_folder: Holds some of our files.
        out: Where to write; ``report.html`` in the run folder by default.
        others: Further run folders, set beside it.

    Returns:
        Where it was written, and what it says.

    Raises:
        BadInput: If nothing of ours is there, a file is not readable, or ``out`` not writable.
    """
    run, *beside = (load_run(path) for path in (run_folder, *others))
    out = out or run_folder / "report.html"
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder, not a file")
    output_folder(out.parent)
    page = compose(run, beside)
    _write(out, render(page))
    return out, page


def _write(out: Path, html: str) -> None:
    try:
        write_whole(out, html)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from error


@app.command()
def main(
    run: Annotated[
        list[Path],
        typer.Option(
            help="Folder with the files of the other commands. Given again: another run or "
            "device, set beside the first."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in that folder.")
    ] = None,
) -> None:
    """Writes one self-contained page: does it pay on this device, where, by how much, how sure.

    Reads what there is of measurements.sqlite, latency_table.json, fit.json, results.json,
    versus_torch.json, scaling.json, ablation.json and advice.json, and says which command makes
    what is missing. Nothing is loaded from the network: the page can be sent, archived and printed.

    Several runs: `--run runs/a --run runs/b` sets their key figures side by side and says, row by
    row, what is faster or slower (see `python -m profiler.compare`).
    """
    console = Console()
    with Console(stderr=True).status("drawing the report"):
        written, page = build(run[0], out, run[1:])
    console.print(page.verdict.headline, markup=False, highlight=False)
    for line in page.missing:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(str(written), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(app)
