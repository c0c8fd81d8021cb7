"""int8 products where a CPU adds neighbours in 16 bits, which saturate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.build import build, compiled
from kernels.lowerings.byte_dot import LARGEST_SMALL_WEIGHT, byte_dot
from kernels.packing import INT8_MAX, WHOLE_WEIGHTS, LinearParameters, pack_linear
from kernels.reference import random_operands
from kernels.targets import cpu_target
from kernels.workload import linear

# This machine's own, and older ones that it may run.
CHIPS = (None, "haswell", "nehalem", "generic")


# Form, lowering, and the largest weight as a whole number.
EXTREMES = [
    ("mult_int8", "mult.dot", 127),
    ("mult_int7", "mult.small_dot", 63),
    ("shift_int8", "shift.dot", 64),
    ("shift_int8_wide", "shift.planes", 1 << 13),
    ("shift_int4", "shift.nibbles", 64),
    ("add_int8", "add.bits", 1),
]


def extreme(form, largest):
    """A linear whose inputs are the largest codes of their rows, and weights its form's largest."""
    workload = linear(form, 3, 64, 33)
    unit = 1.0 if form.startswith("mult") else 1.0 / largest
    signs = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]).repeat(1, 32)
    weight = torch.full((33, 64), largest * unit)
    weight[1::2] *= -1
    given = LinearParameters(form, weight, torch.ones(33), torch.zeros(33))
    operands = replace(random_operands(workload), x=signs * 5, parameters=given)
    return workload, operands, signs * 5 @ weight.T


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("form", "lowering", "largest"), EXTREMES)
def test_the_largest_products_do_not_saturate(form, lowering, largest, chip):
    workload, operands, expected = extreme(form, largest)
    out = build(workload, lowering, cpu_target(chip))(operands)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-4)


def test_a_weight_beyond_its_form_is_refused():
    zeros = torch.zeros(2)
    for form, largest in WHOLE_WEIGHTS.items():
        pack_linear(LinearParameters(form, torch.full((2, 4), -float(largest)), zeros, zeros))
        beyond = LinearParameters(form, torch.full((2, 4), largest + 1.0), zeros, zeros)
        with pytest.raises(ValueError, match=f"{form}.*{largest}"):
            pack_linear(beyond)


def test_each_generation_gets_its_instruction():
    workload = {form: linear(form, 4, 64, 64) for form in ("mult_int8", "mult_int7", "shift_int8")}
    lowering = {"mult_int8": "mult.dot", "mult_int7": "mult.small_dot", "shift_int8": "shift.dot"}
    for chip, form, found, absent in (
        ("nehalem", "mult_int8", "psignb", "ymm"),
        ("haswell", "mult_int8", "vpsignb", "vpmulld"),
        ("haswell", "mult_int7", "vpmaddubsw", "vpsignb"),
        ("haswell", "shift_int8", "vpmaddubsw", "vpsignb"),
        ("skylake-avx512", "shift_int8", "zmm", "vpdpbusd"),
        ("alderlake", "mult_int8", "vpdpbusd", "vpmaddubsw"),
        ("znver4", "mult_int8", "vpdpbusd", "vpmaddubsw"),
    ):
        program = compiled(lowering[form], workload[form].family, cpu_target(chip))
        text = program.mod.inspect_source("asm")
        assert found in text and absent not in text, (chip, form)


def test_two_of_the_largest_products_fit_16_bits():
    assert 2 * 255 * LARGEST_SMALL_WEIGHT <= 2**15 - 1 < 2 * 255 * (LARGEST_SMALL_WEIGHT + 1)
    assert 2 * INT8_MAX * INT8_MAX <= 2**15 - 1
    haswell = cpu_target("haswell")
    assert byte_dot(haswell, LARGEST_SMALL_WEIGHT).inputs == "uint8"
    assert byte_dot(haswell, LARGEST_SMALL_WEIGHT + 1).inputs == "int8"
    assert byte_dot(cpu_target("generic"), 1) is None
