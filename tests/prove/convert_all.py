"""Converts and deploys one small model of every family that timm has; prints what became of each.

    .venv/bin/python tests/prove/convert_all.py [NAME ...]

Random weights and noise, so that nothing is downloaded. A line says for each form how many
attentions and linears were converted and left alone, the relative error of the logits without any
training, and the first reason why something stayed. The last line of a model says how far its
deployed form, all at once, is from the converted one: codes within rounding of a threshold fall on
either side of it, and without training nothing keeps them from doing so; and why it has no plan,
if it has none. A model that fails otherwise ends in FAILED, and the command with 1.
"""

import sys
import time
from collections import Counter
from functools import partial

import timm
import torch

from reparam.attention_structure import example_input
from reparam.convert import (
    Conversion,
    ConversionError,
    ReparamConfig,
    reparameterize_,
    reparameterize_by_parts_,
)
from reparam.deploy import deploy
from reparam.evaluate import parts_to_convert
from reparam.plan import Plan
from reparam.plan_trace import PlanError

MODELS = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_relpos_small_patch16_224",
    "pvt_v2_b0",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "twins_svt_small",
    "twins_pcpvt_small",
    "mvitv2_tiny",
    "levit_128s",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "crossvit_tiny_240",
    "convit_tiny",
    "tnt_s_patch16_224",
    "coat_tiny",
    "coat_lite_tiny",
    "maxvit_nano_rw_256",
    "coatnet_nano_rw_224",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "volo_d1_224",
    "nest_tiny",
    "pit_ti_224",
    "visformer_tiny",
    "gcvit_xxtiny",
    "edgenext_xx_small",
    "fastvit_sa12",
    "hiera_tiny_224",
    "davit_tiny",
    "tiny_vit_5m_224",
    "efficientvit_b0",
    "efficientvit_m0",
    "nextvit_small",
    "caformer_s18",
    "samvit_base_patch16_224",
    "shvit_s1",
    "iformer_t",
    "lowformer_b0",
    "botnet26t_256",
    "halonet26t",
    "poolformer_s12",
    "convnext_atto",
    "mixer_s16_224",
    "resmlp_12_224",
    "gmlp_s16_224",
    "sequencer2d_s",
    "focalnet_tiny_srf",
    "repvit_m0_9",
    "inception_next_atto",
    "swiftformer_xs",
    "resnet10t",
    "cpubone_nano",
    "csatv2",
    "qwen3_vit_88m",
    "hieradet_small",
    "mobilenetv4_hybrid_medium",
    "mobilenetv5_base",
    "naflexvit_base_patch16_gap",
    "vitamin_small_224",
    "vit_tiny_r_s16_p8_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_base_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_so150m_patch16_reg4_map_256",
    "vit_small_patch16_18x2_224",
    "vit_srelpos_small_patch16_224",
    "flexivit_small",
    "beitv2_base_patch16_224",
    "mvitv2_small_cls",
    "levit_conv_128s",
    "maxxvit_rmlp_nano_rw_256",
    "maxxvitv2_nano_rw_256",
    "coatnet_rmlp_nano_rw_224",
    "coatnext_nano_rw_224",
    "fastvit_mci0",
    "efficientvit_l1",
    "efficientvim_m1",
    "sebotnet33ts_256",
    "lambda_resnet26t",
    "lamhalobotnet50ts_256",
    "resnet50_clip",
    "bat_resnext26ts",
    "convformer_s18",
    "mambaout_femto",
    "fasternet_t0",
]

# Off by more, something was computed wrongly.
FARTHEST = 0.25

FORMS = {
    "linear": ReparamConfig(attention="add", drop_bias=True),
    "quadratic": ReparamConfig(attention="quadratic"),
    "linears": ReparamConfig(attention_linears="shift_int8", mlp="shift_int8"),
}


@torch.no_grad()
def converted(name: str, config: ReparamConfig) -> tuple[str, bool]:
    """What became of a model, and whether it survived."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = example_input(model)
    expected = model(x)
    if config.attention_linears != "keep":
        config = _without_attention(model, config)
    try:
        done = reparameterize_(model, config, example=x)
    except ConversionError as error:
        return f"nothing: {error}", torch.equal(model(x), expected)
    y = model(x)
    error = float((y - expected).norm() / expected.norm()) if expected.any() else None
    off = "logits all 0, as the head starts" if error is None else f"logits off by {error:.0%}"
    survived = y.shape == expected.shape and bool(y.isfinite().all())
    return f"{_counts(done)}, {off}{_reason(done)}", survived


@torch.no_grad()
def deployed(name: str) -> tuple[str, bool]:
    """How far a deployed model is from the one it was made of, and whether it survived."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = example_input(model)
    try:
        done = len(reparameterize_by_parts_(model, *parts_to_convert())[0])
    except ConversionError as error:
        return f"nothing to deploy: {error}", True
    ours = deploy(model)
    expected, y = model(x), ours(x)
    survived = y.shape == expected.shape and bool(y.isfinite().all())
    what, same = _planned(ours, x)
    survived &= same
    if not expected.any():
        return f"{done} layers, logits all 0, as the head starts{what}", survived
    error = float((y - expected).norm() / expected.norm())
    return f"{done} layers, logits off by {error:.1%}{what}", survived and error < FARTHEST


def _planned(ours: torch.nn.Module, x: torch.Tensor) -> tuple[str, bool]:
    """Whether a deployed model has a plan, and whether that computes the same of another input."""
    try:
        plan = Plan(ours, x)
    except PlanError as error:
        return f", not planned: {error}", True
    other = torch.randn_like(x)
    return "", torch.allclose(plan(other), ours(other), rtol=1e-3, atol=1e-4)


def _without_attention(model: torch.nn.Module, config: ReparamConfig) -> ReparamConfig:
    """The part of a configuration that a model has something for."""
    for keep in ({}, {"attention_linears": "keep"}, {"mlp": "keep"}):
        try:
            part = config.model_copy(update=keep)
            reparameterize_(timm.create_model(model.default_cfg["architecture"]), part)
            return part
        except ConversionError:
            continue
    return config


def _counts(done: Conversion) -> str:
    return f"{len(done.converted)} converted, {len(_stayed(done))} left"


def _stayed(done: Conversion) -> dict[str, str]:
    return {fqn: reason for fqn, reason in done.skipped.items() if "never" not in reason}


def _reason(done: Conversion) -> str:
    reasons = Counter(_stayed(done).values())
    return f"; {reasons.most_common(1)[0][0]}" if reasons else ""


def main(names: list[str]) -> int:
    """Prints the table; 1 if a model failed."""
    failed = 0
    for name in names or MODELS:
        steps = {form: partial(converted, name, config) for form, config in FORMS.items()}
        for form, step in (steps | {"deployed": partial(deployed, name)}).items():
            start = time.perf_counter()
            try:
                what, survived = step()
            except Exception as error:  # whatever a model raises is what this is to find
                what, survived = f"{type(error).__name__}: {error}", False
            seconds = time.perf_counter() - start
            failed += not survived
            mark = "" if survived else "  FAILED"
            print(f"{name:32} {form:9} {seconds:5.1f} s  {what}{mark}", flush=True)
    print(f"{len(names or MODELS)} models, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
