"""Calibration: curves come to lie on what was measured, and keep the table's word on the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from brief_timing import BRIEF
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_finetune import TINY, table_of

from kernels import expert_ops
from kernels.workload import linear
from profiler.command_line import BadInput
from profiler.device import cpu_info
from profiler.samples import Timing
from reparam import calibration as room
from reparam.calibration import SHARES, Calibration, calibrate, calibration_of, stretched
from reparam.convert import reparameterize_
from reparam.deployed_mlps import DeployedMoE
from reparam.latency_curves import LayerCurves, ModelCurves, token_grid
from reparam.one_pass import watched
from reparam.recipe import Variant, create_model, load_recipe
from reparam.stages import expected_latency_curves, latency_objective

TOKENS = torch.tensor([[0.0, 1, 10, 100]] * 2)
TRUE_SHARES = np.linspace(0.1, 0.9, 9)


def curves_of(mult_ms=3.0, shift_ms=1.0, rest_ms=4.0, schedule="sequential"):
    """Two layers whose experts take so long for all tokens."""
    ends = torch.tensor([[mult_ms], [shift_ms]])
    layer = LayerCurves(TOKENS, 0.2 + (ends - 0.2) * TOKENS / 100, schedule)
    layer.latency_ms[:, 0] = 0.0
    return ModelCurves({"0": layer, "1": layer}, rest_ms)


def at(curves, share):
    return curves.model_latency_ms(
        dict.fromkeys(curves.layers, torch.tensor([1 - share, share]).float())
    ).item()


FIGURE = Timing(latency_ms=1.0, samples_kept=9, samples_discarded=0, stop_reason="precision")


def took(measured):
    return Calibration(identity={}, shares=SHARES, latency_ms=tuple(map(float, measured)))


@settings(max_examples=40)
@given(
    rest=st.floats(1, 10),
    speed=st.floats(0.8, 1.3),
    both=st.floats(0, 0.3),
    seed=st.integers(0, 99),
)
def test_other_dispatches_are_right_once_five_were_measured(rest, speed, both, seed):
    curves = curves_of()

    def truth(share):
        mixed = 2 * both * (0 < share < 1)
        return rest + speed * (at(curves, share) - curves.rest_ms) + mixed

    noise = np.random.default_rng(seed).normal(1, 0.003, len(SHARES))
    found = stretched(curves, took(truth(share) * n for share, n in zip(SHARES, noise)))
    for share in TRUE_SHARES:
        assert at(found, share) == pytest.approx(truth(share), rel=0.03)


def test_experts_that_take_the_same_time_do_not_come_apart_by_noise():
    """The table sees a difference of 1 %, the clock one of 2 % the other way."""
    curves = curves_of(mult_ms=1.01, shift_ms=1.0)
    measured = np.linspace(1.0, 1.02, 5) * 9.0
    found = stretched(curves, took(measured))
    assert at(found, 0.0) > at(found, 1.0)
    low, high = found.bounds_ms
    assert (low, high) == (pytest.approx(9.09, rel=0.02), pytest.approx(9.09, rel=0.03))


def test_a_table_that_is_right_is_left_as_it_is():
    for schedule in ("sequential", "parallel"):
        curves = curves_of(schedule=schedule)
        found = stretched(curves, took(at(curves, share) for share in SHARES))
        for share in (0.0, *TRUE_SHARES, 1.0):
            assert at(found, share) == pytest.approx(at(curves, share), rel=0.01)


def test_the_slope_towards_an_expert_without_tokens_stays_gentle():
    """What both experts take more does not press on the first token alone."""
    curves = curves_of()
    plain = [at(curves, share) for share in SHARES]
    found = stretched(curves, took(plain + np.array([0, 0.5, 0.5, 0.5, 0])))
    share = torch.tensor([0.95, 0.05], requires_grad=True)
    found.model_latency_ms(dict.fromkeys(found.layers, share)).backward()
    assert share.grad.abs().max() < 20


VARIANT = Variant(
    name="kept",
    title="within a budget",
    mlp="moe",
    latency_loss="expected",
    latency_loss_weight=1.0,
    latency_budget_share=0.5,
)


@pytest.fixture
def tiny(tmp_path):
    """A recipe, a converted model, a table of this CPU, and an input."""
    (tmp_path / "tiny.toml").write_text(TINY)
    _, recipe = load_recipe(str(tmp_path / "tiny.toml"))
    model = create_model(recipe.model, 10).eval()
    reparameterize_(model, recipe.linears_config(VARIANT))
    forms = ("mult_int8", "shift_int8")
    workloads = [
        linear(form, m, k, n)
        for form in forms
        for m in token_grid(64)[1:]
        for k, n in ((16, 64), (64, 16))
    ]
    table = table_of([*workloads, linear("mult_fp32", 64, 16, 2)])
    example = torch.randn(recipe.deploy_batch, 1, 16, 16)
    return recipe, model, table, example


def calibrated(tiny, folder, variant=VARIANT, table=None):
    recipe, model, known, example = tiny
    table = table or known
    calibrate(variant, model, recipe, table, example, folder, Console(quiet=True), BRIEF)
    return calibration_of(variant, recipe, table, folder)


def test_what_was_measured_is_kept_and_not_measured_again(tiny, tmp_path, monkeypatch):
    found = calibrated(tiny, tmp_path)
    assert found.shares == SHARES
    assert found.reason or min(found.latency_ms) > 0
    monkeypatch.setattr(room, "measure_latencies", None)
    assert calibrated(tiny, tmp_path) == found


def test_each_figure_is_of_a_deployed_model_with_that_share_on_its_last_expert(
    tiny, tmp_path, monkeypatch
):
    """What stands for the clock counts the tokens that went to the last expert."""

    def counted(plans, example, settings):
        found = {}
        for name, plan in plans.items():
            plan(example)
            found[name] = replace(FIGURE, latency_ms=1.0 + shares.pop(0))
        return found

    def noted(model, share, *inputs):
        force(model, share, *inputs)
        layer = next(part for part in model.modules() if isinstance(part, DeployedMoE))
        tokens = []
        with watched({layer: lambda part, args, kwargs: tokens.append(args[0].flatten(0, -2))}):
            model(*inputs)
        _, _, counts = expert_ops.route(tokens[0], layer.norm, layer.gate, layer.gate_bias)
        shares.append(float(counts[-1] / counts.sum()))

    shares, force = [], room.force_share_
    monkeypatch.setattr(room, "force_share_", noted)
    monkeypatch.setattr(room, "measure_latencies", counted)
    found = calibrated(tiny, tmp_path)
    assert found.latency_ms == pytest.approx([1 + share for share in SHARES], abs=0.02)


def test_another_variant_is_measured_anew(tiny, tmp_path):
    calibrated(tiny, tmp_path)
    other = VARIANT.model_copy(update={"latency_budget_share": 0.7})
    recipe, _, table, _ = tiny
    assert calibration_of(other, recipe, table, tmp_path) is None
    assert calibrated(tiny, tmp_path, other).identity["variant"]


def test_what_could_not_be_measured_is_not_tried_again_and_leaves_the_table(
    tiny, tmp_path, monkeypatch, contended
):
    """Else a run that is taken up again would go on with other curves."""
    monkeypatch.setattr(
        room, "measure_latencies", lambda plans, *_: dict.fromkeys(plans, contended)
    )
    found = calibrated(tiny, tmp_path)
    assert found.latency_ms is None and found.reason == "contended: a neighbour"
    monkeypatch.setattr(room, "measure_latencies", None)
    assert calibrated(tiny, tmp_path) == found
    curves = curves_of()
    assert stretched(curves, found) is curves


def test_nothing_is_measured_without_a_budget_or_for_another_device(tiny, tmp_path):
    free = VARIANT.model_copy(update={"latency_budget_share": None})
    assert calibrated(tiny, tmp_path, free) is None
    table = tiny[2]
    device = table.device.model_copy(update={"name": "another"})
    assert device.fingerprint != cpu_info(1).fingerprint
    abroad = table.model_copy(update={"device": device})
    assert calibrated(tiny, tmp_path, table=abroad) is None
    assert list(tmp_path.glob("calibration_*")) == []


def test_a_file_that_cannot_be_read_is_named(tiny, tmp_path):
    recipe, _, table, _ = tiny
    path = tmp_path / "calibration_kept.json"
    path.write_text('{"identity": {}, "shares": [0.0, 1.0], "latency_ms": [1.0]}')
    with pytest.raises(BadInput, match=r"calibration_kept\.json: .*a figure for each"):
        calibration_of(VARIANT, recipe, table, tmp_path)
    path.write_text("{")
    with pytest.raises(BadInput, match=r"calibration_kept\.json"):
        calibration_of(VARIANT, recipe, table, tmp_path)


def test_a_budget_lies_between_the_latencies_that_were_measured(tiny, tmp_path):
    """The table of the test is far off: the budget is of the device, not of the table."""
    _, model, table, example = tiny
    measured = tuple(np.linspace(40.0, 20.0, 5).tolist())
    seen = Calibration(identity={}, shares=SHARES, latency_ms=measured)
    curves = expected_latency_curves(VARIANT, model, table, example)
    by_table = latency_objective(VARIANT, curves, None)
    objective = latency_objective(VARIANT, curves, seen)
    assert objective.budget_ms == pytest.approx(30.0, rel=0.35)
    assert abs(by_table.budget_ms - 30.0) > 15
