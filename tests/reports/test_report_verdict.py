from pathlib import Path

import pytest
from synthetic_run import fit_result, interval, measurements, primitive_row, results

from kernels.workload import linear
from reports.fit_errors import held_out_mape
from reports.key_figures import key_figures
from reports.run_folder import RunFolder
from reports.verdict import decide
from reports.whole_models import shift_share


def run_of(rows=None, fit=None, found=None) -> RunFolder:
    return RunFolder(path=Path("run"), rows=rows, fit=fit, results=found, table=None)


def with_difference(found, value, half):
    last = found.variants[-1].model_copy(update={"difference": interval(value, half)})
    return found.model_copy(update={"variants": [*found.variants[:-1], last]})


def test_slower_does_not_pay():
    verdict = decide(run_of(measurements(), fit_result(), results()))
    assert verdict.status == "does not pay"
    assert verdict.headline.startswith("It does not pay here: on Synthetic CPU, 2 threads")
    for figure in ("5.20 ms", "3.10 ms", "0.596×", "batch of 8", "96.32", "−0.79 points"):
        assert figure in verdict.headline
    assert any("612 kB against 1.20 MB (−49 %)" in text for text in verdict.details)


def test_faster_at_equal_accuracy_pays():
    verdict = decide(run_of(found=results({"moe": 1.5})))
    assert verdict.status == "pays" and verdict.headline.startswith("It pays here")
    assert "2.07×" in verdict.headline


def test_faster_but_less_accurate_is_mixed():
    found = with_difference(results({"moe": 1.5}), -2.0, 0.5)
    verdict = decide(run_of(found=found))
    assert verdict.status == "mixed" and "costs accuracy" in verdict.headline


def test_a_difference_within_the_noise_is_not_called_a_gain():
    verdict = decide(run_of(found=results({"moe": 3.08})))
    assert verdict.status == "undecided" and "uncertainty" in verdict.headline


def test_another_variant_that_pays_makes_it_mixed():
    found = results({"moe_no_loss": 1.0})
    verdict = decide(run_of(found=found))
    assert verdict.status == "mixed" and verdict.headline.startswith("Mixed: on Synthetic CPU")
    assert "MoE without the latency loss" in verdict.details[0]


@pytest.mark.parametrize("name", ["moe", "original"])
def test_an_unmeasured_latency_decides_nothing(name):
    verdict = decide(run_of(found=results({name: None})))
    assert verdict.status == "undecided" and "contended: 2 clean samples" in verdict.headline


def test_kernels_alone_give_a_verdict_on_kernels():
    rows = [
        row
        for row in measurements()
        if row.workload and row.workload.kind == "linear" and "int8" not in row.lowering
    ]
    shifts_lose = [row for row in rows if row.lowering != "shift.dot"]
    verdict = decide(run_of(shifts_lose))
    assert verdict.status == "does not pay"
    assert "shift in 0 of 5 linear products (loses in 5" in verdict.headline
    assert "attention" not in verdict.headline
    assert "No model was fine-tuned" in verdict.details[-1]


def test_nothing_measured_is_undecided():
    assert decide(run_of(fit=fit_result())).status == "undecided"


def test_key_figures_are_those_of_the_data():
    cards = key_figures(run_of(measurements(), fit_result(), results()))
    assert [card.figure for card in cards][:4] == ["96.32 %", "5.20 ms", "612 kB", "52.0 %"]
    assert cards[5].figure == "4.2 %" and "23.5 %" in cards[5].detail


def test_missing_key_figures_are_dashes_with_a_reason():
    for card in key_figures(run_of()):
        assert card.figure == "—" and card.detail


def test_share_and_error_weigh_what_they_say():
    moe = results().variants[-1]
    assert shift_share(moe) == pytest.approx(100 * (0.53 + 0.47 + 0.55 + 0.5 + 0.58 + 0.49) / 6)
    assert shift_share(results().variants[0]) is None
    fit = fit_result()
    second = fit.fits[1].model_copy(update={"mape": 10.25, "rows_test": 30})
    both = fit.model_copy(update={"fits": [fit.fits[0], second]})
    assert held_out_mape(run_of(fit=both)) == pytest.approx((4.25 * 10 + 10.25 * 30) / 40)


def test_kernels_pay_as_a_whole_only_where_every_product_does():
    attention = [
        row
        for row in measurements()
        if row.workload and row.workload.kind != "linear" and row.cache == "hot"
    ]
    assert decide(run_of(attention)).status == "pays"
    rows = [row for row in measurements() if row.workload]
    verdict = decide(run_of(rows))
    assert verdict.status == "mixed" and "add in 6 of 6 attention products" in verdict.headline


def test_one_loss_among_undecided_products_is_no_verdict_on_all():
    rows = []
    for index, m in enumerate((16, 32, 64, 128)):
        ours = 1.2 if index == 0 else 1.01
        rows.append(primitive_row(linear("mult_fp32", m, 64, 64), "torch.fp32", 1.0, True))
        rows.append(primitive_row(linear("shift_int8", m, 64, 64), "shift.dot", ours))
    verdict = decide(run_of(rows))
    assert verdict.status == "undecided"
    assert verdict.headline.startswith("It is not shown to pay here")
    assert "loses in 1, undecided in 3" in verdict.headline


def test_below_the_noise_floor_nothing_is_won_without_common_rounds_either():
    def decided(floor):
        rows = [
            primitive_row(linear(form, 64, 64, 64), lowering, ms, is_baseline, 0.001, **noise)
            for form, lowering, ms, is_baseline in (
                ("mult_fp32", "torch.fp32", 2.0, True),
                ("mult_bf16", "mult.pairs", 1.02, False),
                ("shift_int8", "shift.dot", 1.0, False),
            )
            for noise in [{"noise_floor": floor}]
        ]
        return decide(run_of(rows)).status

    assert decided(0.001) == "pays" and decided(0.09) == "undecided"


def test_a_win_over_one_form_of_the_original_is_none_while_another_has_no_figure():
    found = results({"moe": 1.5})
    reason = "torch.compile needs g++"
    compiled = found.variants[0].model_copy(
        update={
            "name": "original_compiled",
            "title": "original, torch.compile",
            "latency_ms": None,
            "latency_reason": reason,
        }
    )
    variants = [found.variants[0], compiled, *found.variants[1:]]
    run = run_of(found=found.model_copy(update={"variants": variants}))
    verdict = decide(run)
    assert verdict.status == "undecided" and verdict.headline.startswith("Not decided here")
    assert f"(original, torch.compile: {reason})" in verdict.headline
    assert "original, torch.compile was not measured" in key_figures(run)[1].detail
    slower = results({"moe": 5.0})
    variants = [slower.variants[0], compiled, *slower.variants[1:]]
    assert decide(run_of(found=slower.model_copy(update={"variants": variants}))).status == (
        "does not pay"
    )


def test_the_verdict_is_against_the_fastest_form_of_the_original():
    found = results({"moe": 2.0})
    original = found.variants[0]
    compiled = original.model_copy(
        update={
            "name": "original_compiled",
            "latency_ms": interval(1.0, 0.01),
        }
    )
    faster = found.model_copy(update={"variants": [original, compiled, *found.variants[1:]]})
    verdict = decide(run_of(found=faster))
    assert verdict.status == "does not pay"
    assert "original under torch.compile" in verdict.headline
