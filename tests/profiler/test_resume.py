"""Sweeps that are run again, or in which something fails: what is measured, kept and given up."""

from contextlib import closing

import pytest
from simulated_site import SimulatedSite, timing

from profiler import sweep
from profiler.samples import Timing
from profiler.settings import Setting
from profiler.store import create_store
from profiler.sweep_config import SweepConfig

TORCHS = {"mult_int8": ("torch.int8", "torch.int8_dynamic")}
OURS = ["mult_int8 ours.mult_int8", "shift_int8 ours.shift_int8"]
ALL = [*OURS, "mult_int8 torch.int8", "mult_int8 torch.int8_dynamic"]


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    """Sweeps one product on a simulated site into one store: rows by (lowering, cache)."""
    monkeypatch.setattr(sweep, "measure_noise_floor", lambda *_: None)

    def swept(site, **changed):
        config = SweepConfig(
            timing="quick",
            forms=("mult_int8", "shift_int8"),
            shapes=({"m": 20, "k": 16, "n": 32},),
            **{"passes": 1, **changed},
        )
        with closing(create_store(tmp_path / "a.sqlite")) as store:
            rows = sweep.sweep(Setting(site, config, "simulated"), store)
        return {(row.lowering, row.cache): row for row in rows}

    return swept


def fails(*lowerings, message="not on CUDA"):
    def fail(lowering):
        if lowering in lowerings:
            raise RuntimeError(message)

    return fail


def spoils(contended, *, cache, name):
    """Times everything but one candidate in one state of the caches."""

    def times(candidate, state):
        return contended if (candidate, state) == (name, cache) else timing(1.0)

    return times


def test_what_fails_for_good_is_tried_again_alone_and_nothing_is_measured_for_it(sweeps):
    site = SimulatedSite(TORCHS, builds=fails("torch.int8_dynamic"))
    first = sweeps(site)
    assert site.timed == [([*sorted(set(ALL) - {ALL[3]})], "hot")]
    second = sweeps(site)
    assert site.built == ["torch.int8_dynamic"] and site.timed == []
    failed = second["torch.int8_dynamic", "hot"]
    assert failed.status == "failed" and failed.reason == "build: RuntimeError: not on CUDA"
    others = [key for key in first if key[0] != "torch.int8_dynamic"]
    assert [second[key] for key in others] == [first[key] for key in others]
    third = sweeps(SimulatedSite(TORCHS))
    assert all(row.status == "ok" for row in third.values())
    assert third["ours.shift_int8", "hot"].details["speedup"] == 1.0


def test_a_product_of_which_nothing_can_be_measured_has_its_reasons(sweeps):
    rows = sweeps(SimulatedSite(TORCHS, memory_bytes=1000), cache=("hot", "cold"))
    assert len(rows) == 8
    assert all(row.reason.startswith("size: ") for row in rows.values())


def test_one_without_a_figure_is_measured_again_beside_its_rivals(sweeps, contended):
    site = SimulatedSite(TORCHS, times=spoils(contended, cache="hot", name=OURS[1]))
    assert sweeps(site)["ours.shift_int8", "hot"].status == "contended"
    again = SimulatedSite(TORCHS)
    details = sweeps(again)["ours.shift_int8", "hot"].details
    assert again.timed == [(sorted(ALL), "hot")]
    assert details["speedup"] == details["shift_over_int8_mult"] == 1.0


def test_only_the_state_of_the_caches_that_lacks_a_figure_is_measured_again(sweeps, contended):
    site = SimulatedSite(TORCHS, times=spoils(contended, cache="cold", name=OURS[1]))
    first = sweeps(site, cache=("hot", "cold"))
    again = SimulatedSite(TORCHS)
    second = sweeps(again, cache=("hot", "cold"))
    assert again.timed == [(sorted(ALL), "cold")]
    assert all(row.status == "ok" for row in second.values())
    assert {k: r for k, r in second.items() if k[1] == "hot"} == {
        k: r for k, r in first.items() if k[1] == "hot"
    }


def test_what_is_too_short_to_be_timed_cold_is_not_tried_again(sweeps):
    too_short = Timing(
        latency_ms=None,
        samples_kept=0,
        samples_discarded=0,
        stop_reason="too short",
        reason="too short to be timed singly",
    )
    site = SimulatedSite(times=spoils(too_short, cache="cold", name=OURS[1]))
    first = sweeps(site, cache=("hot", "cold"))
    assert first["ours.shift_int8", "cold"].status == "skipped"
    assert sweeps(site, cache=("hot", "cold")) == first
    assert site.built == site.timed == []


def test_a_figure_is_not_given_up_for_none_when_measured_again(sweeps, contended):
    first = sweeps(SimulatedSite(times=spoils(contended, cache="hot", name=OURS[1])))
    second = sweeps(SimulatedSite(times=lambda name, cache: contended))
    assert second["ours.mult_int8", "hot"] == first["ours.mult_int8", "hot"]


def test_what_finds_no_memory_in_a_later_pass_keeps_its_figure_and_its_rivals_their_ratios(sweeps):
    bound = []

    def once(lowering):
        bound.append(lowering)
        if bound.count("torch.int8") > 1 and lowering == "torch.int8":
            raise RuntimeError("CUDA out of memory")

    rows = sweeps(SimulatedSite({"mult_int8": ("torch.int8",)}, binds=once), passes=2)
    assert bound.count("torch.int8") == 2
    assert all(row.status == "ok" for row in rows.values())
    assert rows["ours.shift_int8", "hot"].details["speedup"] == 1.0


def test_cold_rows_have_no_energy_of_hot_launches(sweeps, capsys):
    rows = sweeps(SimulatedSite(), cache=("hot", "cold"), energy=True)
    for (_, cache), row in rows.items():
        assert row.energy_mj == (2.0 if cache == "hot" else None)
        assert row.energy_reason == (
            None if cache == "hot" else "energy is measured with hot caches"
        )
    assert "energy of 2 rows: some 10 s each" in capsys.readouterr().out


def test_what_has_its_figures_is_measured_again_for_its_energy(sweeps):
    first = sweeps(SimulatedSite(TORCHS), cache=("hot", "cold"))
    again = SimulatedSite(TORCHS)
    second = sweeps(again, cache=("hot", "cold"), energy=True)
    assert again.timed == [(sorted(ALL), "hot")]
    for key, row in second.items():
        assert row == first[key] if row.cache == "cold" else row.energy_mj == 2.0
    assert sweeps(again, cache=("hot", "cold"), energy=True) == second and not again.timed


def test_energy_that_cannot_be_measured_is_a_reason(sweeps, monkeypatch):
    monkeypatch.setattr(SimulatedSite, "energy", lambda *_: 1 / 0)
    for row in sweeps(SimulatedSite(), energy=True).values():
        assert row.status == "ok"
        assert row.energy_reason == "energy: ZeroDivisionError: division by zero"
