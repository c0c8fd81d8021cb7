"""Timing for tests that need a figure and not its precision."""

from profiler.samples import TimingSettings

BRIEF = TimingSettings(
    sample_ms=0.1,
    rest_ms=0,
    warmup_ms=0.5,
    burst_ms=0.5,
    rounds_min=6,
    precision=0.5,
    max_time_s=0.1,
)
