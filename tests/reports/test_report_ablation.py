from synthetic_run import DEVICE, interval, measurements, write_store

from reparam.ablation_results import AblationResults, AblationRow, AblationSummary
from reports.ablation_section import ablation
from reports.build import build, compose
from reports.run_folder import load_run
from reports.verdict import decide


def _row(variant, seed, top1, latency_ms):
    return AblationRow(
        variant=variant,
        title=variant,
        seed=seed,
        fold=None,
        validation_top1=None,
        top1=top1,
        deployed_top1=None,
        latency_ms=interval(latency_ms, 0.1) if latency_ms else None,
        latency_ratio=None,
        latency_reason=None if latency_ms else "contended",
        weight_bytes=1000,
        energy_mj=None,
        energy_source=None,
        energy_reason="no meter",
        shares={},
        shift_share=None,
        latency_budget_ms=None,
        expected_latency_ms=None,
        seconds=1.0,
    )


def _summary(variant, top1, latency_ms, seeds=3):
    return AblationSummary(
        variant=variant,
        title=f"<b>{variant}</b>",
        seeds=seeds,
        top1_mean=top1,
        top1=interval(top1, 0.5) if seeds > 1 else None,
        difference_mean=None if variant == "original" else top1 - 97,
        difference=None,
        latency_ms=latency_ms,
        latency_ratio=None,
        latency_ratio_interval=None,
        weight_bytes=1000,
        energy_mj=None,
        energy_source=None,
        energy_reason="no meter",
        shift_share=None,
        over_budget=None,
    )


def _results():
    return AblationResults(
        preset="quick",
        recipe="digits-quick",
        model="net",
        data="digits",
        device=DEVICE,
        deploy_batch=32,
        latency_table_sha256="0" * 64,
        created_at="2026-01-01T00:00:00+00:00",
        command="python -m reparam.ablate --preset quick",
        rows=[_row("original", 0, 97.0, 3.0), _row("shift", 0, 96.0, None)],
        summaries=[
            _summary("original", 97.0, 3.0),
            _summary("shift", 96.0, 2.0, seeds=1),
            _summary("worse", 95.0, 4.0),
            _summary("unmeasured", 99.0, None),
        ],
        missing=["moe, seed 2"],
    )


def test_means_front_and_what_is_not_finished(tmp_path):
    write_store(tmp_path, measurements())
    _results().save(tmp_path / "ablation.json")
    section = ablation(load_run(tmp_path))
    assert "moe, seed 2" in section.lead[1]
    frame = section.pictures[0].data
    assert list(frame.name) == ["original", "shift", "worse"]
    assert list(frame.on_front) == [True, True, False]
    means, rows = (table.rows for table in section.tables)
    assert (
        means[0][2].interval == "[96.5, 97.5]" and means[1][2].interval == "one seed, no interval"
    )
    assert means[0][3].reason == "the original itself" and means[1][3].text == "−1.00"
    assert means[3][4].reason == "not measured" and means[3][7].reason == "no meter"
    assert rows[1][5].reason == "contended"


def test_an_ablation_alone_is_a_run(tmp_path):
    _results().save(tmp_path / "ablation.json")
    out, page = build(tmp_path)
    assert page.verdict.status == "undecided"
    text = out.read_text()
    assert "&lt;b&gt;shift&lt;/b&gt;" in text and "<b>shift" not in text


def test_without_one_its_command_is_named(tmp_path):
    write_store(tmp_path, measurements())
    page = compose(load_run(tmp_path))
    sections = {section.anchor: section for part in page.parts for section in part.sections}
    assert "python -m reparam.ablate" in sections["ablation"].missing
    assert "python -m cost_models.advise" in sections["advice"].missing


def test_an_ablation_alone_is_weighed_and_never_said_to_pay(tmp_path):
    def verdict_of(ratio, seeds=3):
        summaries = [
            _summary("original", 97.0, 3.0),
            _summary("shift", 96.0, 3.0 * ratio).model_copy(
                update={
                    "difference": interval(-1.0, 0.5) if seeds > 1 else None,
                    "latency_ratio": ratio,
                    "latency_ratio_interval": interval(ratio, 0.01) if seeds > 1 else None,
                }
            ),
        ]
        _results().model_copy(update={"summaries": summaries}).save(tmp_path / "ablation.json")
        return decide(load_run(tmp_path))

    faster = verdict_of(0.5)
    assert faster.status == "undecided" and "PyTorch's fastest" in faster.headline
    assert "0.500 of the latency" in faster.headline and "3 seeds" in faster.headline
    assert verdict_of(1.5).status == "does not pay"
    assert "no intervals" in verdict_of(0.5, seeds=1).headline
