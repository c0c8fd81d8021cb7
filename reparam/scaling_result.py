"""Schema of scaling.json: how attention grows with its tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from scipy.stats import linregress

from profiler.device import DeviceInfo
from profiler.whole_file import write_whole
from reparam.results import Interval

_FROZEN = ConfigDict(frozen=True, extra="forbid")

# Growth is fitted where the tokens outweigh what a launch costs.
FIT_FROM = 1024


class ScalingRow(BaseModel):
    """One way of attention at one number of tokens.

    Attributes:
        way: ``add``, ``softmax`` (PyTorch's fused kernel) or ``softmax, matrix`` (all pairs).
        tokens: Sequence length.
        latency_ms: With its 95 % interval; None with a reason.
        peak_bytes: Largest sum of tensors that PyTorch held during the call beside its input, the
            result included; None with a reason.
        reason: Why a figure is missing.
    """

    model_config = _FROZEN

    way: str
    tokens: int
    latency_ms: Interval | None
    peak_bytes: int | None
    reason: str | None = None


class Scaling(BaseModel):
    """Schema of scaling.json: batch 1, from queries, keys and values.

    Attributes:
        heads, head_dim: Those of the first attention of the model that was named.
    """

    model_config = _FROZEN

    format: Literal["shiftadd-scaling"] = "shiftadd-scaling"
    version: Literal[1] = 1
    device: DeviceInfo
    command: str
    created_at: str
    heads: int
    head_dim: int
    rows: list[ScalingRow]

    def save(self, path: Path) -> None:
        """Writes scaling.json."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Scaling:
        """Reads scaling.json.

        Raises:
            ValueError: If it is none of ours or of another version.
        """
        return cls.model_validate_json(path.read_text())

    def exponents(self) -> dict[str, float]:
        """By way: e of latency ~ tokens^e, least squares in the logarithms, from 1024 tokens on."""
        found = {}
        for way in dict.fromkeys(row.way for row in self.rows):
            points = [
                (math.log(row.tokens), math.log(row.latency_ms.value))
                for row in self.rows
                if row.way == way and row.latency_ms and row.tokens >= FIT_FROM
            ]
            if len(points) > 1:
                found[way] = float(linregress(*zip(*points)).slope)
        return found

    def table(self) -> Table:
        """For people: a line for each number of tokens."""
        ways = list(dict.fromkeys(row.way for row in self.rows))
        growth = ", ".join(f"{way} {e:.2f}" for way, e in self.exponents().items())
        table = Table(
            title=f"Attention, {self.heads} heads of {self.head_dim}: ms and MiB",
            caption=f"exponent of the growth from {FIT_FROM} tokens on: {growth}",
        )
        table.add_column("tokens", justify="right")
        for way in ways:
            table.add_column(way, justify="right")
        by_place = {(row.tokens, row.way): row for row in self.rows}
        for tokens in dict.fromkeys(row.tokens for row in self.rows):
            table.add_row(str(tokens), *(_cell(by_place.get((tokens, way))) for way in ways))
        return table


def _cell(row: ScalingRow | None) -> str:
    if row is None or row.latency_ms is None or row.peak_bytes is None:
        return "–"
    return f"{row.latency_ms.value:.3f}, {row.peak_bytes / 2**20:.2f}"
