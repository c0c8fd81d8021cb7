"""Schema of versus_torch.json: a deployed model against PyTorch's ways to run the original."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from profiler.device import DeviceInfo
from profiler.whole_file import write_whole
from reparam.results import Interval

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Contestant(BaseModel):
    """One way to run a model.

    Attributes:
        name: Such as ``compile bf16`` or ``deployed, 50 % shift``.
        ours: Whether it is a deployed model.
        other_runtime: Whether it is of a runtime that is neither PyTorch's nor ours.
        latency_ms: With its 95 % interval; None with a reason.
        reason: Why there is no figure.
    """

    model_config = _FROZEN

    name: str
    ours: bool
    other_runtime: bool = False
    latency_ms: Interval | None
    reason: str | None = None


class Comparison(BaseModel):
    """All ways to run one model at one batch, measured in turns.

    Attributes:
        contestants: Every way that was tried, those of other runtimes among them.
        best_torch: The fastest of PyTorch's; None if none ran.
        speedup: By name of ours, latency of ``best_torch`` over its own, with 95 % interval.
        speedup_eager: The same against fp32 eager.
    """

    model_config = _FROZEN

    model: str
    batch: int
    image_size: int
    contestants: list[Contestant]
    best_torch: str | None
    speedup: dict[str, Interval]
    speedup_eager: dict[str, Interval]


class VersusTorch(BaseModel):
    """Schema of versus_torch.json."""

    model_config = _FROZEN

    format: Literal["shiftadd-versus-torch"] = "shiftadd-versus-torch"
    version: Literal[1] = 1
    device: DeviceInfo
    command: str
    created_at: str
    comparisons: list[Comparison]

    def save(self, path: Path) -> None:
        """Writes versus_torch.json."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> VersusTorch:
        """Reads versus_torch.json.

        Raises:
            ValueError: If it is none of ours or of another version.
        """
        return cls.model_validate_json(path.read_text())
