"""Colours, marks and type of all figures; no matplotlib here.

The colours are Okabe and Ito's colour-blind-safe palette. They are drawn as these hex values and
written into the SVG as CSS variables, so that one drawing serves the light, the dark and the
printed page. A marker's shape or a hatch always says the same as its colour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

INK, MUTED, LINE, SURFACE = "#1d2430", "#5b6472", "#d8dde5", "#fefefe"
BLUE, VERMILLION, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
# Speed ratios from far slower to far faster; the ratio is always written on the colour.
HEAT = ("#f6b48f", "#fbdcc8", "#eceef2", "#d3e6f5", "#a9d0ec", "#7bbae5", "#4ba2da")
CSS_VARIABLE = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    SURFACE: "surface",
    BLUE: "blue",
    VERMILLION: "vermillion",
    GREEN: "green",
    PURPLE: "purple",
    SKY: "sky",
    **{colour: f"heat-{step}" for step, colour in enumerate(HEAT)},
}

FORM_MARKS = {
    "mult_fp32": (BLUE, "o"),
    "mult_bf16": (BLUE, "s"),
    "mult_int8": (BLUE, "D"),
    "mult_int7": (BLUE, "d"),
    "shift_fp32": (VERMILLION, "o"),
    "shift_bf16": (VERMILLION, "s"),
    "shift_int8": (VERMILLION, "D"),
    "shift_int8_wide": (VERMILLION, "p"),
    "shift_int4": (VERMILLION, "*"),
    "add_int8": (GREEN, "*"),
    "add_kv_pm1": (GREEN, "o"),
    "add_kv_01": (GREEN, "s"),
    "add_qkv_pm1": (GREEN, "^"),
    "add_qkv_01": (GREEN, "v"),
    "add_attention_pm1": (GREEN, "D"),
    "add_attention_01": (GREEN, "d"),
}
OUTCOME_MARKS = {
    "pays": (BLUE, "^", "ours is faster"),
    "undecided": (MUTED, "s", "undecided"),
    "does not pay": (VERMILLION, "v", "ours is slower"),
}
VARIANT_MARKS = {
    "original": (MUTED, "s"),
    "stage1": (GREEN, "^"),
    "shift": (VERMILLION, "D"),
    "moe_no_loss": (SKY, "v"),
    "moe": (PURPLE, "o"),
}
OTHER_MARK = (INK, "P")


def in_legend_order(forms: Iterable[str]) -> list[str]:
    """Each form once: those with a mark of their own first, in its order."""
    found = set(forms)
    known = [form for form in FORM_MARKS if form in found]
    return known + sorted(found.difference(known))


STYLE: dict[Any, Any] = {
    # "$" in a name is a dollar sign, never the start of a formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11.5,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.4,
    "hatch.linewidth": 1.2,
    "figure.facecolor": "none",
}
