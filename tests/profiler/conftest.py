"""What tests of sweeps share."""

import pytest
from short_sweeps import SHORT

from kernels.peaks import peaks
from profiler.command_line import run
from profiler.contamination import NO_CONTAMINATION
from profiler.samples import PRESETS
from profiler.timing import cache_flush


@pytest.fixture
def quick_and_undisturbed(monkeypatch):
    """Other processes on this machine must not decide what a test finds."""
    monkeypatch.setitem(PRESETS, "quick", SHORT)
    monkeypatch.setattr("profiler.timing.host_contamination", lambda: NO_CONTAMINATION)
    # What goes past all caches of a server's socket takes half a second each time.
    monkeypatch.setattr("profiler.roofline.peaks", lambda threads, _: peaks(threads, 2**20))
    monkeypatch.setattr("profiler.sites.cache_flush", lambda _: cache_flush(2**20))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process: its exit code and its standard error."""

    def call(app, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run(app)
        return exit_.value.code, capsys.readouterr().err

    return call
