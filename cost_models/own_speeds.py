"""How our own forms compare on a device, by interleaved rounds, as a table keeps it."""

from __future__ import annotations

from pydantic import BaseModel, Field

from cost_models.fitted_model import STRICT, Positive


class OwnSpeed(BaseModel):
    """How many times as fast as our int8 mult a form is.

    Entries of a table are of different minutes, and on a shared host two identical programs may
    look 1.6 times apart there: which form is faster is to be asked here.

    Attributes:
        mean: Geometric mean over the products.
        least, most: Of a product.
        products: How many were measured in common rounds.
    """

    model_config = STRICT

    mean: Positive
    least: Positive
    most: Positive
    products: int = Field(ge=1)
