import pytest
import timm
import torch

from cost_models.operation_energy import operation_energy
from kernels.workload import linear
from reparam.convert import ReparamConfig, reparameterize_
from reparam.model_energy import modelled_energy_mj, softmax_attention

SIZES = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 1, "num_classes": 3}
IMAGE = torch.randn(2, 3, 32, 32)
TOKENS = 5


def _vit(*configs):
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    for config in configs:
        reparameterize_(model, ReparamConfig(**config))
    return model


def test_the_original_is_charged_for_every_product():
    rows = 2 * TOKENS
    shapes = [(rows, 16, 48), (rows, 16, 16), (rows, 16, 64), (rows, 64, 16), (2, 16, 3)]
    workloads = [linear("mult_fp32", *shape) for shape in shapes]
    workloads += softmax_attention(4, TOKENS, TOKENS, 8)
    expected = sum(operation_energy(workload).with_memory_mj for workload in workloads)
    assert modelled_energy_mj(_vit(), IMAGE) == pytest.approx(expected)


def test_conversion_saves_modelled_energy_and_loses_no_product():
    add = {"attention": "add"}
    shift = {"attention_linears": "shift_int8", "mlp": "shift_int8"}
    original, stage1, stage2 = (
        modelled_energy_mj(_vit(*configs), IMAGE) for configs in ((), (add,), (add, shift))
    )
    assert 0 < stage2 < stage1 < 1.5 * original
    assert stage2 > original / 10
