"""A CUDA stream and its probe that are none: what a launch costs on host and GPU is given."""

from dataclasses import dataclass, field

from profiler.nvml import Unavailable
from profiler.timing_cuda import EVENT_RESOLUTION_MS, measure_cuda

FULL_MHZ = 1980.0


@dataclass
class SimulatedStream:
    """A GPU that works off what the host enqueues; its events resolve 0.5 µs.

    At a lower clock all takes longer. ``mhz_at`` gives the clock at a time in s.
    """

    enqueue_s: float = 5e-6
    graph_launch_s: float = 20e-6
    mhz_at: object = lambda now_s: FULL_MHZ
    reasons: tuple[str, ...] = ()
    probe_fails_at_s: float = float("inf")
    host_s: float = 0.0
    gpu_s: float = 0.0
    busy_s: float = 0.0
    slept_s: float = 0.0
    l2_is_warm: bool = False
    capturing: list | None = None
    singly_timed: list = field(default_factory=list)

    # What is launched

    def kernel(self, cost_s, cold_cost_s=None):
        """A launch that takes ``cost_s`` at full clock, ``cold_cost_s`` after an erasure."""

        def run_on_gpu():
            cost = cost_s if self.l2_is_warm or cold_cost_s is None else cold_cost_s
            self.l2_is_warm = True
            self._work(cost)

        def launch():
            if self.capturing is not None:
                self.capturing.append(run_on_gpu)
            else:
                self.host_s += self.enqueue_s
                run_on_gpu()

        return launch

    def _work(self, cost_s):
        self.gpu_s = max(self.gpu_s, self.host_s)
        taken_s = cost_s * FULL_MHZ / self.mhz_at(self.gpu_s)
        self.gpu_s += taken_s
        self.busy_s += taken_s

    # Stream

    def capture(self, launch, number):
        self.capturing = []
        launch()
        (run_on_gpu,) = self.capturing
        self.capturing = None

        def replay():
            self.host_s += self.graph_launch_s
            for _ in range(number):
                run_on_gpu()

        replay.number = number
        return replay

    def elapsed_ms(self, lead, run, meanwhile):
        lead()
        start_s = max(self.gpu_s, self.host_s)
        run()
        meanwhile()
        self.host_s = max(self.host_s, self.gpu_s)
        if run.number == 1:
            self.singly_timed.append(self.gpu_s - start_s)
        steps = round((self.gpu_s - start_s) * 1e3 / EVENT_RESOLUTION_MS)
        return steps * EVENT_RESOLUTION_MS

    def synchronise(self):
        self.host_s = max(self.host_s, self.gpu_s)

    def eraser(self, size_bytes):
        def erase():
            self.l2_is_warm = False
            self._work(size_bytes / 2e12)

        return erase

    # Probe

    def full_sm_clock_mhz(self):
        return FULL_MHZ

    def sm_clock_mhz(self):
        if self.host_s >= self.probe_fails_at_s:
            raise Unavailable("SM clock: the GPU was lost")
        return self.mhz_at(self.host_s)

    def throttle_reasons(self):
        return self.reasons if self.mhz_at(self.host_s) < FULL_MHZ else ()

    # Host

    def clock(self):
        return self.host_s

    def sleep(self, seconds):
        self.slept_s += seconds
        self.host_s += seconds

    def measure(self, launches, settings, cold_bytes=None):
        return measure_cuda(launches, settings, cold_bytes, self, self, self.clock, self.sleep)
