"""Sweeps in several passes over their products: what is pooled, chosen and kept."""

from contextlib import closing, suppress
from dataclasses import replace

import pytest

from profiler import sites, sweep
from profiler.passes import PASS_SPREAD, PASSES
from profiler.samples import CLOCK_RATE
from profiler.settings import settings_for
from profiler.store import create_store
from profiler.sweep_config import SweepConfig

pytestmark = pytest.mark.usefixtures("quick_and_undisturbed")


@pytest.fixture
def three_products(monkeypatch, tmp_path):
    """Sweeps three products of 10, 20 and 30 tokens; ``spoil`` changes what a call has measured."""

    def swept(spoil=lambda number, timing: timing):
        time, calls = sites.LocalSite.time, []

        def noted(site, launches, settings, cache):
            calls.append(launches)
            found = time(site, launches, settings, cache)
            return {name: spoil(len(calls) - 1, timing) for name, timing in found.items()}

        with monkeypatch.context() as patched:
            patched.setattr(sites.LocalSite, "time", noted)
            patched.setattr(sweep, "calibrated", lambda setting, checked: setting)
            (setting,) = settings_for(THREE_PRODUCTS, "again", "cpu", "1")
            with closing(create_store(tmp_path / "a.sqlite")) as store:
                with suppress(KeyboardInterrupt):
                    sweep.sweep(setting, store)
                return {row.workload.m: row for row in store.rows()}, len(calls)

    return swept


THREE_PRODUCTS = SweepConfig(
    timing="quick",
    passes=2,
    baselines=False,
    forms=("mult_fp32",),
    shapes=({"m": [10, 20, 30], "k": 16, "n": 32},),
)


def marked(timing, **details):
    return replace(timing, details={**timing.details, **details})


@pytest.mark.parametrize(
    "block, order", [(30, (10, 20, 30, 10, 20, 30)), (2, (10, 20, 10, 20, 30, 30))]
)
def test_passes_over_a_product_lie_apart(block, order, three_products, monkeypatch):
    monkeypatch.setattr(sweep, "_BLOCK", block)
    rows, times = three_products(lambda number, timing: marked(timing, **{CLOCK_RATE: number}))
    assert times == 6
    for tokens, row in rows.items():
        both = [number for number, m in enumerate(order) if m == tokens]
        assert row.details[CLOCK_RATE] == sum(both) / 2
        assert row.details[PASSES] == 2 and row.details[PASS_SPREAD] >= 0


@pytest.mark.parametrize("shared, alone", [({1}, {10, 20, 30}), ({1, 4}, {10, 30})])
def test_a_figure_is_of_the_pass_with_a_core_of_its_own(shared, alone, three_products):
    rows, _ = three_products(lambda number, timing: marked(timing, own_core=number not in shared))
    assert {m for m, row in rows.items() if row.details["own_core"]} == alone
    assert {row.details[PASSES] for row in rows.values()} == ({1, 2} if len(alone) == 3 else {2})


def test_a_figure_is_never_given_up_for_none(three_products, contended):
    rows, times = three_products(lambda number, timing: contended if number > 2 else timing)
    assert times == 6 and all(row.status == "ok" for row in rows.values())


def test_an_interrupted_second_pass_leaves_the_first(three_products):
    def interrupt(number, timing):
        if number == 4:
            raise KeyboardInterrupt
        return timing

    rows, _ = three_products(interrupt)
    assert {m: row.details[PASSES] for m, row in rows.items()} == {10: 2, 20: 1, 30: 1}
    again, times = three_products()
    assert times == 0 and again == rows
