"""Rows of layers and models, and what a latency table predicts of them."""

from collections import Counter

import pytest
import timm
import torch
from brief_timing import BRIEF

from cost_models.latency_table import LatencyTable
from cost_models.layer_models import predict_left_out
from cost_models.work import Work
from profiler.passes import PASSES
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.dispatch_cost import _experts_alone, dispatch_costs, dispatch_table
from reparam.predicted_measured import (
    SHARES,
    Case,
    measured_rows,
    moe_sizes,
    table_of,
)


def case(name, depth):
    torch.manual_seed(0)
    original = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=depth).eval()
    converted = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=depth).eval()
    reparameterize_(converted, ReparamConfig(attention="add"))
    reparameterize_(converted, ReparamConfig(attention_linears="shift_int8", mlp="moe"))
    return Case(name, original, deploy(converted), torch.randn(2, 3, 48, 48))


@pytest.fixture(scope="module")
def table():
    return LatencyTable.load("amd-zen4-avx512-2c-1t")


@pytest.fixture(scope="module")
def rows(table):
    made = []

    def cases():
        for name, depth in (("small", 1), ("large", 2)):
            made.append(name)
            yield case(name, depth)

    found = list(measured_rows(cases, table, BRIEF, set()))
    # All of one pass before the next: that is what lets the host change in between.
    assert made == ["small", "large"] * 3
    assert set(Counter(row.key for row in found).values()) == {3}
    return list({row.key: row for row in found}.values())


def test_each_model_and_each_share_of_each_size_has_a_row(rows):
    layers = [row for row in rows if row.kind == "layer"]
    assert len(layers) == 2 * len(SHARES) and len(rows) - len(layers) == 2 * 2
    by_share = {row.details["share"]: row.details for row in layers[: len(SHARES)]}
    assert by_share[0]["tokens.shift"] == 0 and by_share[100]["tokens.mult"] == 0
    assert by_share[50]["tokens.mult"] + by_share[50]["tokens.shift"] == 2 * 10
    assert abs(by_share[50]["tokens.mult"] - 10) <= 1
    for row in rows:
        work = Work.of_details(row.details)
        assert row.details["kernel_ms"] > 0 and (work.experts or work.products)
        assert 1 <= row.details[PASSES] <= 3 and row.clock[1] > 0


def test_a_finished_row_is_not_measured_again(rows, table):
    known, made = {row.key for row in rows}, []
    assert not list(
        measured_rows(lambda: made.append(1) or [case("small", 1)], table, BRIEF, known)
    )
    assert len(made) == 1


def test_each_model_is_predicted_from_the_other_and_printed(rows, table):
    predicted, skipped = predict_left_out(rows, table)
    assert not skipped and len(predicted) == sum(row.status == "ok" for row in rows)
    # Where the machine was too busy for a figure, any will do to be printed.
    figure = {"status": "ok", "latency_ms": 1.0, "latency_low_ms": 0.9, "latency_high_ms": 1.1}
    whole = [row if row.latency_ms else row.model_copy(update=figure) for row in rows]
    models, layers = table_of(*predict_left_out(whole, table))
    assert models.row_count == 2 * 2 and layers.row_count == 2


def test_experts_alone_compute_what_they_are():
    _, layer, args, kwargs = next(moe_sizes(case("small", 1)))
    counts, launches = _experts_alone(layer, *args, **kwargs)
    assert sum(counts) == 2 * 10 and len(launches) == sum(count > 0 for count in counts)
    for launch in launches:
        launch()
    x, residual = args[0].flatten(0, 1), kwargs["residual"].flatten(0, 1)
    ends = [torch.from_dlpack(launch.args[-1]) for launch in launches]
    for expert, part, added, out in zip(
        [e for e, count in zip(layer.experts.values(), counts) if count],
        x.split([count for count in counts if count]),
        residual.split([count for count in counts if count]),
        ends,
    ):
        torch.testing.assert_close(out[0], expert(part) + added, rtol=1e-5, atol=1e-5)


def test_what_dispatching_costs_is_measured_for_each_size():
    (cost,) = dispatch_costs(case("small", 1), 0.5, BRIEF)
    assert sum(cost.tokens.values()) == 2 * 10 and abs(cost.tokens["shift"] - 10) <= 1
    assert cost.ratio is None or cost.ratio.value > 0.5
    assert dispatch_table("small", 2, [cost]).row_count == 1


def test_a_layer_that_is_called_for_some_images_at_a_time_is_taken_for_all(monkeypatch):
    sizes = {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2)}
    model = timm.create_model("pvt_v2_b0", **sizes).eval()
    reparameterize_(model, ReparamConfig(mlp="moe"))
    one = Case("pvt", model, deploy(model), torch.randn(3, 3, 64, 64))
    whole = [args[0].shape for _, _, args, _ in moe_sizes(one)]
    monkeypatch.setattr("reparam.by_images._CACHED_BYTES", 1)
    assert [args[0].shape for _, _, args, _ in moe_sizes(one)] == whole
    assert all(shape[0] == 3 for shape in whole)
