"""What layers and models take beside their kernels, as a latency table keeps it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from cost_models.fitted_model import STRICT

# A number, or a torch tensor that a gradient flows through.
Tokens = Any


class LayerOverhead(BaseModel):
    """What measured layers or models take beside their kernels.

    ``latency = kernels + launch + per_kernel · kernels' number + per_token · tokens``; for whole
    models a layer stands in the place of a token.

    Attributes:
        kind: ``layer`` or ``model``.
        lowering: Whose: ``deployed``, ``torch``, …; these are never mixed.
        launch_ms, per_kernel_ms, per_token_ms: The overhead; per_layer_ms likewise for models.
        rows: Rows that it was fitted on.
        models: Models among them.
        mape: Error in percent on each model from the rows of the others; None with one model only.
    """

    model_config = STRICT

    kind: str
    lowering: str
    launch_ms: float = Field(ge=0)
    per_kernel_ms: float = Field(ge=0)
    per_token_ms: float = Field(ge=0)
    rows: int = Field(ge=1)
    models: int = Field(ge=1)
    mape: float | None = Field(ge=0)

    def latency_ms(self, kernel_ms: Tokens, kernels: int, tokens: Tokens) -> Tokens:
        """Latency of a layer (or, with layers for tokens, of a model) in ms."""
        overhead = self.launch_ms + self.per_kernel_ms * kernels
        return kernel_ms + overhead + self.per_token_ms * tokens
