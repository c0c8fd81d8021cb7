import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from cost_models.conversion_plan import softmax_products
from cost_models.operation_energy import operation_energy
from kernels.forms import FORMS
from kernels.workload import Workload, linear
from reparam.convert import ReparamConfig, reparameterize_
from reparam.linear_attention import linearise_
from reparam.model_energy import modelled_energy_mj

SIZES = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 1, "num_classes": 3}
IMAGE = torch.randn(2, 3, 32, 32)
TOKENS = 5


def _vit(*configs):
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    for config in configs:
        reparameterize_(model, ReparamConfig(**config))
    return model


def _sum_mj(workloads):
    return pytest.approx(sum(operation_energy(workload).with_memory_mj for workload in workloads))


ROWS = 2 * TOKENS
LINEARS = [
    linear("mult_fp32", *shape)
    for shape in [(ROWS, 16, 48), (ROWS, 16, 16), (ROWS, 16, 64), (ROWS, 64, 16), (2, 16, 3)]
]
SCORES, VALUES = softmax_products(4, TOKENS, TOKENS, 8)


def test_the_original_is_charged_for_every_product():
    assert modelled_energy_mj(_vit(), IMAGE) == _sum_mj([*LINEARS, SCORES, VALUES])


@pytest.mark.parametrize("similarity", ["softmax", "angular"])
def test_scores_of_codes_are_additions_and_their_values_are_multiplied(similarity):
    model = _vit({"attention": "quadratic", "similarity": similarity})
    codes = Workload(b=4, m=TOKENS, k=8, n=TOKENS, **FORMS["add_qkv_pm1"])
    assert modelled_energy_mj(model, IMAGE) == _sum_mj([*LINEARS, codes, VALUES])


def test_linear_attention_without_codes_is_charged_its_two_products():
    model = _vit()
    linearise_(model)
    sizes = {"primitive": "mult", "b": 4, "w_layout": "kn"}
    products = [Workload(m=8, k=TOKENS, n=8, **sizes), Workload(m=TOKENS, k=8, n=8, **sizes)]
    assert modelled_energy_mj(model, IMAGE) == _sum_mj([*LINEARS, *products])


class Windows(nn.Module):
    """Attention of no known class: windows of tokens, few keys, wide values, one linear twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.wide = nn.Linear(8, 8), nn.Linear(8, 24)

    def forward(self, x):
        q = F.linear(input=self.inner(self.inner(x)), weight=self.inner.weight)
        keys = x[:, :, :2]
        scores = q @ keys.transpose(-2, -1)
        return scores.softmax(-1) @ self.wide(keys)


def test_products_are_found_whatever_computes_them():
    linears = [linear("mult_fp32", 3 * 4 * 5, 8, 8)] * 3 + [linear("mult_fp32", 3 * 4 * 2, 8, 24)]
    sizes = {"primitive": "mult", "b": 3 * 4, "m": 5, "w_layout": "kn"}
    products = [Workload(k=8, n=2, **sizes), Workload(k=2, n=24, **sizes)]
    found = modelled_energy_mj(Windows(), torch.randn(3, 4, 5, 8))
    assert found == _sum_mj([*linears, *products])


def test_conversion_saves_modelled_energy_and_loses_no_product():
    add = {"attention": "add"}
    shift = {"attention_linears": "shift_int8", "mlp": "shift_int8"}
    original, stage1, stage2 = (
        modelled_energy_mj(_vit(*configs), IMAGE) for configs in ((), (add,), (add, shift))
    )
    assert 0 < stage2 < stage1 < 1.5 * original
    assert stage2 > original / 10
