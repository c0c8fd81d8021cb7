import pytest

from kernels.workload import attention
from profiler.candidates import candidates
from profiler.command_line import BadInput
from profiler.device import DeviceError, cpu_info
from profiler.settings import settings_for
from profiler.sweep_config import SweepConfig


def config(**values):
    shape = {"kind": "attention", "b": 2, "tokens": 64, "bits": 16, "n": 16}
    shapes = [{"m": 8, "k": 16, "n": 16}, shape | values.pop("attention", {})]
    return SweepConfig.model_validate({"forms": ["mult_fp32"], "shapes": shapes, **values})


def test_a_lesser_instruction_set_is_a_device_of_its_own():
    (own,) = settings_for(config(), "x", "cpu", "1")
    try:
        (lesser,) = settings_for(config(), "x", "cpu", "1", "avx2")
    except DeviceError:
        pytest.skip("this CPU has no AVX2")
    if own.device.isa.endswith("avx2"):
        pytest.skip("this CPU has no more than AVX2")
    assert lesser.device.fingerprint != own.device.fingerprint
    assert lesser.device.isa.endswith(" avx2") and "avx512" not in lesser.device.isa
    assert lesser.target.vector_bits == 256


def test_an_instruction_set_must_be_known_and_there():
    with pytest.raises(BadInput, match="--isa mmx: must be one of avx2"):
        settings_for(config(), "x", "cpu", None, "mmx")
    with pytest.raises(BadInput, match="--isa avx2: applies to CPUs"):
        settings_for(config(), "x", "cuda:0", None, "avx2")
    with pytest.raises(DeviceError, match="does not have it"):
        cpu_info(1, "sve9")


def test_ours_alone():
    (both,) = settings_for(config(), "x", "cpu", "1")
    (ours,) = settings_for(config(baselines=False), "x", "cpu", "1")
    assert {c.is_baseline for c in candidates(both)} == {True, False}
    assert {c.is_baseline for c in candidates(ours)} == {False}


def test_one_of_the_products_of_linear_attention():
    found = config(attention={"products": ["both"]}).workloads
    assert attention(2, 64, 16, 16).both in found and len(found) == 2
    assert len(config().workloads) == 4
