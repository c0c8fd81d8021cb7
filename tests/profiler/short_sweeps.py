"""How long sweeps of tests measure: their figures do not matter."""

from profiler.samples import TimingSettings

SHORT = TimingSettings(
    sample_ms=0.05,
    rest_ms=0,
    warmup_ms=0,
    warmup_max_ms=0.1,
    burst_ms=0.1,
    rounds_min=6,
    max_time_s=0.01,
)
