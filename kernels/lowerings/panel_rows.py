"""Rows times a panel, in vector registers or in AMX's, as the product's unit has it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import tvm.script.ir_builder.tirx as T

from kernels.lowerings import amx, register_tiles
from kernels.lowerings.panel_product import VECTORS, PanelProduct, Rows


def workspace(products: Collection[PanelProduct]) -> amx.Workspace:
    """Emits a task's own memory for some products."""
    return amx.Workspace.of([product for product in products if product.unit.amx])


@contextmanager
def at_work(product: PanelProduct) -> Iterator[None]:
    """Around a task's calls of ``multiply`` for a product."""
    if product.unit.amx:
        amx.begin(product)
    yield
    if product.unit.amx:
        amx.end()


def multiply(
    product: PanelProduct,
    memory: amx.Workspace,
    rows: Rows,
    panel: Any,
    finish: Callable[[Any, list[Any]], None],
) -> None:
    """Calls ``finish(row, vectors)`` for each row, counted from the first.

    Args:
        product: A linear.
        memory: Of ``workspace``.
        rows: Prepared for its unit.
        panel: Of its weights.
        finish: Writes the results of a row.
    """
    if product.unit.amx:
        amx.multiply(product, memory, rows, panel, finish)
        return
    last = product.last_vectors
    if product.panels == 1 or last == VECTORS:
        register_tiles.multiply(product, rows, panel, last, finish)
        return
    with T.If(panel < product.panels - 1):
        with T.Then():
            register_tiles.multiply(product, rows, panel, VECTORS, finish)
        with T.Else():
            register_tiles.multiply(product, rows, panel, last, finish)
