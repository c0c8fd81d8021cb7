"""Fine-tuning end to end on a tiny model: files, resume, refusals."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from brief_timing import BRIEF
from click.testing import Result
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from cost_models.entry import Entry
from cost_models.latency_table import LatencyTable, TableError
from kernels.workload import Workload
from profiler.command_line import BadInput
from profiler.device import cpu_info
from profiler.export import timm_rows
from profiler.store import open_store
from reparam import finetune as command
from reparam import outcome, training
from reparam.agreement import ROUNDING, first_flip, layer_error
from reparam.convert import ConversionError, reparameterize_
from reparam.deploy import deploy
from reparam.expert_latency import layer_workloads
from reparam.finetune import app, check_conversions
from reparam.model_cost import compiled, measure_latencies, predict_latency
from reparam.moe import moe_layers
from reparam.recipe import RECIPES, Recipe, create_model, load_recipe
from reparam.results import FinetuneResults
from reparam.stages import open_task
from reparam.training import seed_everything

TINY = """
data = "digits"
deploy_batch = 4
threads = 1

[model]
name = "vit_tiny_patch16_224"

[model.kwargs]
img_size = 16
patch_size = 4
in_chans = 1
embed_dim = 16
depth = 1
num_heads = 2
class_token = false
global_pool = "avg"
weight_init = "jax"

[pretrain]
epochs = 2
batch_size = 128
lr = 3e-3

[stage1]
epochs = 1
batch_size = 128
lr = 3e-3

[stage2]
epochs = 1
batch_size = 128
lr = 3e-3

[[variants]]
name = "shift"
title = "all shift"
attention_linears = "shift_int8"
mlp = "shift_int8"

[[variants]]
name = "moe"
title = "MoE"
attention_linears = "shift_int8"
mlp = "moe"
latency_loss_weight = 0.01
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    import tomllib

    return Recipe.model_validate(tomllib.loads(TINY))


def converted(recipe: Recipe, name: str) -> torch.nn.Module:
    seed_everything("test")
    model = create_model(recipe.model, 10).eval()
    reparameterize_(model, recipe.attention_config)
    variant = next(variant for variant in recipe.variants if variant.name == name)
    reparameterize_(model, recipe.linears_config(variant))
    return model


def table_of(workloads: list[Workload]) -> LatencyTable:
    """A table that has measured exactly these workloads, shifts twice as fast as the rest."""
    entries = {
        workload.key: Entry(
            workload=workload,
            lowering=f"{workload.primitive}.test",
            is_baseline=False,
            latency_ms=0.1 if workload.primitive == "shift" else 0.2,
            low_ms=0.05,
            high_ms=0.3,
            weight_bytes=workload.weight_bytes,
            energy_mj=None,
            energy_source=None,
            energy_reason="no meter",
        )
        for workload in workloads
    }
    return LatencyTable(
        device=cpu_info(1),
        created_at="2025-01-01T00:00:00+00:00",
        store="test",
        entries=tuple(entries.values()),
        models=(),
    )


@pytest.fixture(scope="module")
def table(tiny) -> LatencyTable:
    """Answers for the experts at all tokens, and for every other layer."""
    model, example = converted(tiny, "moe"), torch.randn(4, 1, 16, 16)
    workloads: list[Workload] = []
    for share in ({"mult": 64, "shift": 64}, {"mult": 32, "shift": 32}):
        tokens = {fqn: share for fqn, _ in moe_layers(model)}
        for found in layer_workloads(model, example, tokens).values():
            workloads += found
    return table_of(workloads)


@pytest.fixture
def table_file(tmp_path, table):
    path = tmp_path / "latency_table.json"
    table.save(path)
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(outcome, "compiled", lambda model, example: (None, "not in this test"))
    monkeypatch.setattr(
        outcome,
        "measure_latencies",
        lambda models, example: measure_latencies(models, example, BRIEF),
    )


def invoke(*arguments) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def test_whole_run_leaves_its_files_and_resumes(tmp_path, recipe_file, table_file, quick):
    out = tmp_path / "out"
    arguments = ("--recipe", recipe_file, "--latency-table", table_file, "--out", out)
    done = invoke(*arguments)
    assert done.exit_code == 0, done.exception
    results = FinetuneResults.load(out / "results.json")
    by_name = {variant.name: variant for variant in results.variants}
    assert list(by_name) == ["original", "original_compiled", "stage1", "shift", "moe"]
    assert results.recipe == "tiny"
    assert results.top1 == by_name["moe"].deployed_top1.value
    assert results.latency_table_sha256 == LatencyTable.load(table_file).sha256

    assert by_name["original_compiled"].latency_ms is None
    assert by_name["original_compiled"].latency_reason == "not in this test"
    assert by_name["original"].deployed_top1 is None
    assert [entry.epoch for entry in by_name["original"].history] == [0, 1]
    assert by_name["shift"].history[0].latency_loss is None
    assert by_name["moe"].history[0].latency_loss > 0
    assert by_name["moe"].converted["blocks.0.attn"].startswith("add attention")
    assert by_name["shift"].converted["blocks.0.mlp.fc1"] == "shift_int8 (Q)"
    assert by_name["shift"].weight_bytes < by_name["original"].weight_bytes
    for variant in results.variants:
        assert variant.energy_mj > 0
        assert (variant.energy_source == "modelled") == (variant.energy_reason is not None)
        assert (variant.latency_ms is None) == (variant.latency_reason is not None)
    for name in ("stage1", "shift", "moe"):
        found = by_name[name].agreement
        assert found.images == results.split["test"]
        assert found.traced == found.differing
        assert found.max_layer_error < 0.01
    (dispatch,) = by_name["moe"].dispatch
    assert sum(dispatch.share.values()) == pytest.approx(1)
    assert dispatch.optimal_share["shift"] == pytest.approx(2 / 3)
    assert dispatch.expert_source == {"mult": "measured", "shift": "measured"}

    store = open_store(out / "measurements.sqlite")
    rows = {row.subject: row for row in store.rows()}
    store.close()
    assert rows.keys() == by_name.keys()
    assert rows["moe"].lowering == "deployed"
    assert rows["original"].is_baseline
    assert rows["original_compiled"].status == "skipped"
    assert rows["moe"].details["top1"] == results.top1
    assert not timm_rows(list(rows.values())).isna().any(axis=None)
    if by_name["moe"].latency_ms:
        assert rows["moe"].latency_ms == by_name["moe"].latency_ms.value

    # With the epochs of the last stage lost, the same command trains only those.
    weights = load_file(out / "moe.safetensors")
    (out / "checkpoints" / "moe.safetensors").unlink()
    trained = []
    original_save = training.save_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "save_tensors", lambda *a: (trained.append(a[0].stem), original_save(*a))
        )
        patch.setattr(command, "evaluate_candidates", Mock(side_effect=BadInput("trained")))
        assert refused(*arguments) == "trained"
    assert trained == ["moe"]
    for name, tensor in load_file(out / "moe.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def refused(*arguments) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, BadInput | TableError | ConversionError), result.exception
    return str(result.exception)


def test_missing_expert_row_is_refused_before_anything_is_written(tmp_path, recipe_file, table):
    entries = tuple(entry for entry in table.entries if entry.workload.primitive != "shift")
    path = tmp_path / "table.json"
    table.model_copy(update={"entries": entries}).save(path)
    out = tmp_path / "out"
    message = refused("--recipe", recipe_file, "--latency-table", path, "--out", out)
    assert "shift_int8" in message
    assert not out.exists()


def test_a_table_that_ships_is_no_place_for_results(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    arguments = ("--recipe", recipe_file, "--latency-table", "amd-zen4-avx512-2c-1t")
    assert "--out" in refused(*arguments)
    assert set(tmp_path.iterdir()) == before


def test_bad_input_names_file_and_key(tmp_path, recipe_file, table_file):
    common = ("--latency-table", table_file, "--out", tmp_path / "out")
    assert "no such file" in refused("--recipe", "absent", *common)
    for change, key in (
        (("lr = 3e-3", 'lr = "fast"'), "pretrain.lr"),
        (("epochs = 2", "epochs = 0"), "pretrain.epochs"),
        (("batch_size = 128", "batch_size = 128\nbatches = 1"), "pretrain.batches"),
        (('mlp = "moe"', 'mlp = "more"'), "variants.1.mlp"),
        (('name = "moe"', 'name = "shift"'), "names must differ"),
        (("[pretrain]", "[pre]"), "pre"),
        (('mlp = "moe"', 'mlp = "keep"'), "latency_loss_weight: moe has no router"),
        (("latency_loss_weight = 0.01", 'latency_loss = "expected"'), "no latency_loss_weight"),
        (("latency_loss_weight", 'schedule = "parallel"\nlatency_loss_weight'), "schedule: moe"),
        (('mlp = "shift_int8"', 'mlp = "shift_int8"\nmoe_granularity = "linear"'), "granularity"),
        (("lr = 3e-3", "lr = 3e-3\nrefit_hashing_epochs = 1"), "pretrain.refit_hashing_epochs"),
        (("in_chans = 1\n", ""), "model.kwargs.in_chans: is 3, images of digits have 1"),
        (('data = "digits"', 'data = "folder"'), "model.kwargs.in_chans: is 1, images of folder"),
        (
            ("threads = 1", 'threads = 1\nexperts = { mult = "mult_int8", cheap = "shift_int8" }'),
            "'cheap' is shift_int8: its name must begin with 'shift'",
        ),
    ):
        recipe_file.write_text(TINY.replace(*change, 1))
        message = refused("--recipe", recipe_file, *common)
        assert "tiny.toml" in message
        assert key in message
    recipe_file.write_text(TINY.replace('data = "digits"', 'data = "digits"\nkeep = ["nope.*"]'))
    assert "keep: 'nope.*' matches no module" in refused("--recipe", recipe_file, *common)
    stage1 = TINY.replace("[stage1]", "[stage1]\nrefit_hashing_epochs = 1")
    recipe_file.write_text(stage1)
    assert "stage1.refit_hashing_epochs" in refused("--recipe", recipe_file, *common)
    for change, reason in (
        (("vit_tiny_patch16_224", "vit_of_no_kind"), "vit_of_no_kind: RuntimeError: Unknown model"),
        (("in_chans = 1", 'in_chans = 1\nact_layer = "nonesuch"'), "KeyError: 'nonesuch'"),
        (("num_heads = 2", "num_heads = 3"), "vit_tiny_patch16_224: AssertionError"),
    ):
        recipe_file.write_text(TINY.replace(*change))
        assert reason in refused("--recipe", recipe_file, *common)
    recipe_file.write_text(TINY)
    assert "--data" in refused("--recipe", recipe_file, "--data", tmp_path, *common)
    assert "--device" in refused("--recipe", recipe_file, "--device", "cuda:77", *common)
    table_file.write_text("{}")
    assert "latency_table.json" in refused("--recipe", recipe_file, *common)
    assert not (tmp_path / "out").exists()


def test_shipped_recipes_load():
    for path in RECIPES.glob("*.toml"):
        name, recipe = load_recipe(path.stem)
        assert name == path.stem
        assert [variant.name for variant in recipe.variants] == ["shift", "moe_no_loss", "moe"]
        assert recipe.variants[-1].latency_loss_weight == 0.01
    assert load_recipe("digits-quick")[1].sha256 != load_recipe("imagenet-pvt_v2_b0")[1].sha256


def test_recipe_is_frozen(tiny):
    with pytest.raises(ValidationError):
        tiny.threads = 2


def test_papers_recipe_converts_all_but_the_last_stages_attention():
    _, recipe = load_recipe("imagenet-pvt_v2_b0")
    settings = recipe.model.model_copy(update={"pretrained": False})
    model = create_model(settings)
    done = reparameterize_(model, recipe.attention_config, recipe.allows(model))
    assert "stages.2.blocks.1.attn" in done.converted
    assert {fqn for fqn in done.skipped if fqn.endswith("attn")} == {
        "stages.3.blocks.0.attn",
        "stages.3.blocks.1.attn",
    }


def test_seed_decides_model_and_split(tiny):
    (first, data), (again, _), (other, others) = (open_task(tiny, None, s) for s in (1, 1, 2))
    ours, same, theirs = (m.patch_embed.proj.weight for m in (first, again, other))
    assert torch.equal(ours, same)
    assert not torch.equal(ours, theirs)
    labels = [next(iter(task.batches("test", 64, False)))[1] for task in (data, others)]
    assert not torch.equal(*labels)


def test_checking_the_conversions_leaves_the_original_alone(tiny, table):
    original, _ = open_task(tiny, None, 0)
    before = copy.deepcopy(original.state_dict())
    check_conversions(tiny, original, table, torch.randn(4, 1, 16, 16))
    assert original.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_prediction_sums_the_table_over_what_the_routers_send(tiny, table):
    model, example = converted(tiny, "moe"), torch.randn(4, 1, 16, 16)
    even = {fqn: {"mult": 0.5, "shift": 0.5} for fqn, _ in moe_layers(model)}
    # A router, qkv and proj as shifts, one add for both products, two linears an expert.
    predicted = predict_latency(model, example, table, even).latency_ms
    assert predicted.value == pytest.approx(0.2 + 2 * 0.1 + 0.2 + 2 * 0.2 + 2 * 0.1)
    assert predicted.low == pytest.approx(8 * 0.05)
    shift_only = {fqn: {"mult": 0.0, "shift": 1.0} for fqn in even}
    predicted = predict_latency(model, example, table, shift_only).latency_ms
    assert predicted.value == pytest.approx(0.2 + 2 * 0.1 + 0.2 + 2 * 0.1)
    nothing = create_model(tiny.model, 10)
    assert predict_latency(nothing, example, table, {}).latency_ms is None


def test_a_differing_layer_is_seen_and_not_excused(tiny):
    model, image = converted(tiny, "moe"), torch.randn(1, 1, 16, 16)
    deployed, layers = deploy(model), deploy(model, fuse=False)
    assert layer_error(model, layers, image) < 1e-4
    flip = first_flip(model, deployed, image)
    assert flip is None or flip.gap <= ROUNDING

    wrong = copy.deepcopy(deployed)
    norm = wrong.blocks[0].attn.qkv.norm
    norm[: len(norm) // 2].mul_(-1)
    flip = first_flip(model, wrong, image)
    assert flip.layer == "blocks.0.attn.qkv"
    assert flip.gap > 100 * ROUNDING
    layers.blocks[0].attn.proj.packed_1.mul_(1.02)  # the scale of each channel
    assert layer_error(model, layers, image) > 0.01


def test_a_code_within_rounding_of_its_threshold_is_excused(tiny):
    model = converted(tiny, "moe")
    deployed = deploy(model)
    generator = torch.Generator().manual_seed(0)
    norm = deployed.blocks[0].attn.qkv.norm
    weight = norm[: len(norm) // 2]
    weight.mul_(1 + 1e-5 * torch.randn(weight.shape, generator=generator))
    images = torch.randn(40, 1, 1, 16, 16, generator=generator)
    flips = [flip for image in images if (flip := first_flip(model, deployed, image))]
    assert flips
    assert all(0 < flip.gap <= ROUNDING for flip in flips)


def test_compiled_baseline_is_a_copy_or_a_reason(tiny, monkeypatch):
    model, example = create_model(tiny.model, 10), torch.randn(4, 1, 16, 16)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert compiled(model, example) == (None, "torch.compile needs g++, which is not installed")
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(torch.nn.Module, "compile", Mock(side_effect=RuntimeError("no\nback end")))
    assert compiled(model, example) == (None, "torch.compile failed: no back end")
