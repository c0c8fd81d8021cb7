"""SPINE and CLI: a run folder -> one offline HTML page that says whether it pays here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from profiler.command_line import BadInput, output_folder
from profiler.command_line import run as run_command
from reports import (
    energy_section,
    kernel_sections,
    model_sections,
    prediction_section,
    provenance,
    verdict,
)
from reports.html import Page, render
from reports.run_folder import RunFolder, load_run

app = typer.Typer(add_completion=False)


def compose(run: RunFolder) -> Page:
    """The story: does it pay here, by how much and at what accuracy, where, how sure are we."""
    return Page(
        title="Does replacing multiplications by shifts and adds pay on this device?",
        subtitle=f"Device: {run.device.label if run.device else 'unknown'} · run: {run.path.name}",
        verdict=verdict.decide(run),
        cards=verdict.key_figures(run),
        missing=tuple(run.absence(name) for name in run.missing),
        sections=(
            model_sections.accuracy(run),
            kernel_sections.kernels(run),
            prediction_section.prediction(run),
            model_sections.routing(run),
            model_sections.training(run),
            model_sections.weights(run),
            energy_section.energy(run),
            model_sections.agreement(run),
            provenance.machine(run),
            provenance.method(run),
        ),
    )


def build(run_folder: Path, out: Path | None = None) -> tuple[Path, Page]:
    """Reads a run folder and writes its report.

    Args:
        run_folder: Holds some of our files.
        out: Where to write; ``report.html`` in the run folder by default.

    Returns:
        Where it was written, and what it says.

    Raises:
        BadInput: If nothing of ours is there, a file is not readable, or ``out`` not writable.
    """
    run = load_run(run_folder)
    out = out or run_folder / "report.html"
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder, not a file")
    output_folder(out.parent)
    page = compose(run)
    _write(out, render(page))
    return out, page


def _write(out: Path, html: str) -> None:
    # Renamed into place: whoever has the page open never sees half of it.
    part = out.with_name(f"{out.name}.part")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from error


@app.command()
def main(
    run: Annotated[Path, typer.Option(help="Folder with the files of the other commands.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in that folder.")
    ] = None,
) -> None:
    """Writes one self-contained page: does it pay on this device, where, by how much, how sure.

    Reads what there is of measurements.sqlite, latency_table.json, fit.json and results.json, and
    says which command makes what is missing.
    """
    console = Console()
    with Console(stderr=True).status("drawing the report"):
        written, page = build(run, out)
    console.print(page.verdict.headline, markup=False, highlight=False)
    for line in page.missing:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(str(written), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(app)
