import timm
import torch

from cost_models.conversion_plan import plan, softmax_products
from kernels.workload import attention, linear
from profiler.model_workloads import layers_of, model_layers


def test_a_vit_keeps_its_linears_and_swaps_the_products():
    layers = {layer.fqn: layer for layer in plan(model_layers("deit_tiny_patch16_224", 2))}
    one = layers["blocks.3.attn"]
    assert one.rule == "attention" and one.original == softmax_products(6, 197, 197, 64)
    assert one.forms == {"add_attention_pm1": (attention(6, 197, 64, 64).both,)}
    assert layers["blocks.3.attn.qkv"].rule == "attention_linears"
    assert layers["blocks.3.mlp.fc1"].rule == "mlp"
    assert layers["blocks.3.mlp.fc1"].forms["shift_int4"] == (linear("shift_int4", 394, 192, 768),)
    assert "head" not in layers


def test_reduced_keys_are_counted_and_their_linears_merge():
    layers = {}
    for layer in plan(model_layers("pvt_v2_b0", 1)):
        layers.setdefault(layer.fqn, layer)
    one = layers["stages.0.blocks.0.attn"]
    assert one.original[2:] == softmax_products(1, 3136, 49, 32)
    assert one.original[:2] == (linear("mult_fp32", 3136, 32, 32), linear("mult_fp32", 49, 32, 64))
    assert one.forms["add_attention_pm1"][0] == linear("mult_fp32", 3136, 32, 96)
    assert layers["stages.0.blocks.0.attn.qkv"].after == one.fqn
    assert layers["stages.0.blocks.0.attn.kv"].before == one.fqn
    # The last stage attends to all of its tokens and keeps its linears apart.
    last = layers["stages.3.blocks.0.attn"]
    assert last.original == softmax_products(8, 49, 49, 32)
    assert layers["stages.3.blocks.0.attn.q"].before is None


def test_a_model_at_hand_is_seen_as_by_its_name_and_left_in_its_mode():
    model = timm.create_model("deit_tiny_patch16_224").train()
    assert layers_of(model, torch.zeros(1, 3, 224, 224)) == model_layers("deit_tiny_patch16_224", 1)
    assert model.training and not model.blocks[0].attn._forward_pre_hooks
