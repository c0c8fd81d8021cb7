import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.operation_energy import UnknownOperation, operation_energy
from kernels.forms import FORMS
from kernels.workload import Workload, linear

sizes = st.fixed_dictionaries({name: st.integers(1, 4096) for name in ("b", "m", "k", "n")})


@given(st.sampled_from(sorted(FORMS)), sizes, st.sampled_from("bmkn"), st.integers(8, 4096))
def test_energy_grows_with_each_size(form, small, name, more):
    workload = Workload(**small, **FORMS[form])
    larger = workload.with_sizes(**{name: small[name] + more})
    before, after = operation_energy(workload), operation_energy(larger)
    assert 0 < before.compute_mj < after.compute_mj
    assert 0 < before.memory_mj <= after.memory_mj
    assert before.with_memory_mj < after.with_memory_mj


@given(st.integers(1, 4096), st.integers(1, 2048), st.integers(1, 2048))
def test_a_shift_saves_arithmetic_and_weight_traffic(m, k, n):
    shift, dense = (operation_energy(linear(f, m, k, n)) for f in ("shift_fp32", "mult_fp32"))
    assert shift.compute_mj < dense.compute_mj + m * n * 3.7e-9
    int8 = operation_energy(linear("mult_int8", m, k, n))
    shift_int8 = operation_energy(linear("shift_int8", m, k, n))
    assert shift_int8.compute_mj < int8.compute_mj
    # One code of 8 bits, whether shifted or multiplied: no memory is saved against int8.
    assert shift_int8.memory_mj == int8.memory_mj


@given(st.integers(1, 4096), st.integers(4, 2048), st.integers(1, 2048))
def test_codes_of_8_bits_move_fewer_bytes_than_fp32(m, k, n):
    shift, dense = linear("shift_fp32", m, k, n), linear("mult_fp32", m, k, n)
    assert operation_energy(shift).memory_mj <= operation_energy(dense).memory_mj
    assert shift.weight_bytes <= dense.weight_bytes


def test_by_hand():
    energy = operation_energy(linear("shift_int8", 10, 20, 30))
    outputs, inputs, macs = 300, 200, 6000
    compute_pj = macs * (0.024 + 0.1) + outputs * (0.9 + 3.7) + inputs * 3.7
    traffic = inputs * 4 + (600 + 30 * 8) + outputs * 4
    assert energy.compute_mj == pytest.approx(compute_pj * 1e-9)
    assert energy.memory_mj == pytest.approx(traffic * (160 + 1.25) * 1e-9)


def test_add_products_pay_for_their_accumulations_and_their_memory():
    energy = operation_energy(Workload(m=196, k=16, n=32, **FORMS["add_qkv_pm1"]))
    assert energy.compute_mj == pytest.approx(196 * 16 * 32 * 0.9e-9)
    assert energy.memory_mj > energy.compute_mj


def test_with_one_memory_rule_the_saving_is_nowhere_near_the_released_models():
    dense, shift = (
        operation_energy(linear(form, 3136, 32, 256)).with_memory_mj
        for form in ("mult_fp32", "shift_fp32")
    )
    assert 0 < 1 - shift / dense < 0.25  # the released model says 71 %


def test_an_operation_without_a_published_energy_is_refused():
    workload = Workload(primitive="mult", m=2, k=2, n=2, x_dtype="uint8")
    with pytest.raises(UnknownOperation, match="mult_uint8"):
        operation_energy(workload)
