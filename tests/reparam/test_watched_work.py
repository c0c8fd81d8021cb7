"""What is seen of a forward pass is what the model does."""

from contextlib import suppress

import timm
import torch
from torch import nn

from cost_models.work import far_counts
from kernels.build import get_threads
from kernels.workload import attention, linear
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed import DeployedLinear
from reparam.forced_dispatch import force_share_
from reparam.watched_work import work_beside_experts, work_of


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7).eval()


def converted():
    model = vit()
    reparameterize_(model, ReparamConfig(attention="add"))
    reparameterize_(model, ReparamConfig(attention_linears="shift_int8", mlp="moe"))
    return deploy(model)


def packed_bytes(model):
    layers = [part for part in model.modules() if isinstance(part, DeployedLinear)]
    return sum(tensor.nbytes for layer in layers for tensor in layer.packed)


def test_a_torch_model_has_its_matrix_products_attentions_and_convolutions():
    work = work_of(vit(), torch.randn(3, 3, 64, 64))
    tokens, heads = 17, 3
    assert work.products == {
        linear("mult_fp32", 3 * tokens, 192, 576): 2,
        linear("mult_fp32", 3 * tokens, 192, 192): 2,
        linear("mult_fp32", 3 * tokens, 192, 768): 2,
        linear("mult_fp32", 3 * tokens, 768, 192): 2,
        linear("mult_fp32", 3, 192, 7): 1,
    }
    assert work.counts["conv_macs"] == 3 * 16 * 192 * 3 * 16 * 16
    assert work.counts["attention_macs"] == 2 * 2 * 3 * heads * tokens * tokens * 64
    assert work.counts["calls"] == 1 and work.counts["operators"] > 20


def test_a_deployed_model_has_the_products_of_its_kernels():
    model, x = converted(), torch.randn(1, 3, 64, 64)
    force_share_(model, 0.5, x)
    work = work_of(model, x)
    assert work.products[attention(3, 17, 64, 64).both] == 2
    assert work.products[linear("mult_fp32", 16, 3 * 16 * 16, 192)] == 1
    assert work.products[linear("shift_int8", 17, 192, 576)] == 2
    to_shift = {w.m: n for w, n in work.experts.items() if w.form == "shift_int8" and w.n == 768}
    to_mult = {w.m: n for w, n in work.experts.items() if w.form == "mult_int8" and w.n == 768}
    assert sum(m * n for m, n in to_shift.items()) + sum(m * n for m, n in to_mult.items()) == 34
    assert sum(to_shift.values()) == sum(to_mult.values()) == 2
    assert work.counts["routed"] == 2 * 17 * 192
    assert work.counts["patch_elements"] == 16 * 3 * 16 * 16
    assert work.counts["activated"] == 2 * 17 * 768
    # The head is torch's, and without its bias; so are the experts.
    biases = 2 * 2 * (768 + 192) * 4
    assert work.counts["weight_bytes"] == packed_bytes(model) + 7 * 192 * 4 - biases
    each = [
        linear(form, 1, *size).weight_bytes
        for form in ("mult_int8", "shift_int8")
        for size in ((192, 768), (768, 192))
    ]
    # In and out, in fp32.
    far = far_counts(sum(each), 2 * 17 * 192 * 4)
    assert work.counts["far_weight_bytes"] == 2 * far["far_weight_bytes"] > 0
    assert work.counts["far_bytes"] == 2 * far["far_bytes"] > 0
    beside = work_beside_experts(model, x)
    assert beside.counts == work.counts
    assert beside.products == work.products and not beside.experts
    assert "conv_macs" not in work.counts and "attention_macs" not in work.counts


def test_an_expert_without_tokens_has_no_product():
    model, x = converted(), torch.randn(1, 3, 64, 64)
    force_share_(model, 1.0, x)
    work = work_of(model, x)
    forms = {w.form for w in work.experts}
    assert "mult_int8" not in forms and "shift_int8" in forms
    unused = 2 * sum(
        linear("mult_int8", 1, *size).weight_bytes for size in ((192, 768), (768, 192))
    )
    beside = work_beside_experts(model, x)
    assert work.counts["weight_bytes"] == beside.counts["weight_bytes"] - unused


def test_a_depthwise_convolution_is_no_product():
    model = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    work = work_of(model, torch.randn(2, 8, 5, 5))
    assert not work.products and work.counts["depthwise_macs"] == 2 * 8 * 25 * 9


def test_torch_has_one_thread_inside_a_deployed_model_and_its_own_after_it():
    seen = []
    model = converted()
    model.norm.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before, ours = torch.get_num_threads(), get_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
            assert seen == [1] and torch.get_num_threads() == 2 and get_threads() == ours
            with suppress(AssertionError, RuntimeError):
                model(torch.randn(1, 3, 65, 64))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
