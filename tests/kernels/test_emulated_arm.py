"""Every kernel of the CPU against the float64 oracle on 64-bit Arm: see ``emulated_arm``."""

from contextlib import nullcontext

import pytest
import test_layer_kernels as layers
import torch
import tvm.script.ir_builder.tirx as T
from emulated_arm import EmulatedArm, emulation
from test_byte_dot import EXTREMES, extreme
from unicorn import UcError

from kernels.build import arguments, compiled, lowerings
from kernels.compilation import compile_program
from kernels.lowerings.emit import argument, program
from kernels.reference import max_abs_error, random_operands
from kernels.targets import cpu_target
from kernels.workload import attention, linear

# With SDOT and without.
CHIPS = ("neoverse-n1", "cortex-a72")
LINEAR = (
    "mult_fp32",
    "mult_bf16",
    "mult_int8",
    "mult_int7",
    "shift_fp32",
    "shift_bf16",
    "shift_int8",
    "shift_int8_wide",
    "shift_int4",
    "add_int8",
)


def _target(chip):
    return cpu_target(chip, "aarch64-linux-gnu")


def _kernel(workload, chip, lowering=None):
    target = _target(chip)
    lowering = lowering or lowerings(workload, target)[0]
    return EmulatedArm(compiled(lowering, workload.family, target))


def _run(kernel, workload, operands):
    rows = (workload.m, workload.n)
    out = torch.full(rows if workload.kind == "linear" else (workload.b, *rows), torch.nan)
    kernel(*arguments(operands), out)
    return out


def _matches(kernel, workload):
    operands = random_operands(workload, seed=torch.seed() % 2**31)
    error, within = max_abs_error(workload, operands, _run(kernel, workload, operands))
    assert within, f"{workload.label} is off by {error}"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("form", LINEAR)
def test_linear_matches_the_oracle_for_any_number_of_rows(form, chip):
    for features in ((1, 1), (37, 33), (130, 64)):
        kernel = _kernel(linear(form, 1, *features), chip)
        for rows in (1, 7, 21):
            _matches(kernel, linear(form, rows, *features))


@pytest.mark.parametrize("alphabet", ["pm1", "01"])
def test_attention_matches_the_oracle(alphabet):
    for shape in ((1, 1, 1, 1), (2, 33, 20, 24), (1, 300, 72, 40)):
        for workload in attention(*shape, alphabet):
            for lowering in lowerings(workload, _target(CHIPS[0])):
                _matches(_kernel(workload, CHIPS[0], lowering), workload)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("form", "lowering", "largest"), EXTREMES)
def test_the_largest_products_do_not_saturate(form, lowering, largest, chip):
    workload, operands, expected = extreme(form, largest)
    out = _run(_kernel(workload, chip, lowering), workload, operands)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("step", [0, 1])
def test_what_reads_beyond_a_tensor_is_stopped(step):
    def shifted():
        x, out = argument("x", (8,), "float32"), argument("out", (8,), "float32")
        with T.serial(0, 8) as i:
            T.buffer_store(out, x[i + step], [i])

    kernel = EmulatedArm(compile_program(program(shifted), _target(CHIPS[0])))
    x, out = torch.arange(8.0), torch.zeros(8)
    with pytest.raises(UcError) if step else nullcontext():
        kernel(x, out)
        assert out.equal(x)


def test_arm_of_32_bits_gets_no_instruction_of_64():
    target = cpu_target("cortex-a15", "armv7l-linux-gnueabihf")
    for form in ("mult_int8", "shift_int4"):
        workload = linear(form, 4, 64, 64)
        built = compiled(lowerings(workload, target)[0], workload.family, target)
        assert "vmul" in built.mod.inspect_source("asm")


def test_what_surrounds_a_linear_is_fused():
    around = ("layer_norm", "gelu", "residual")
    workload = linear("mult_int8", 9, 64, 64, around=around)
    _matches(_kernel(workload, CHIPS[0]), workload)


@pytest.mark.parametrize("chip", CHIPS)
def test_deployed_layers_are_their_steps(chip):
    forms = ("mult_int8", "shift_int4")
    with emulation(_target(chip)):
        layers.test_angular_attention(2, 33, 3, 32, True, "pm1")
        layers.test_code_attention(1, 2, 65, 17, 40, 20, "pm1", "heads")
        layers.test_code_attention(1, 1, 3, 40, 16, 33, "01", None)
        layers.test_code_scores(1, 2, 65, 17, 40, 20, "pm1")
        layers.test_top1_routing(77, 40, 5, True)
        layers.test_depthwise_gelu(2, 5, 7, 48, True)
        layers.test_depthwise_moe_is_its_steps(forms, True, 2, 5, 7)
        layers.test_experts_are_their_steps(forms, [70, 37], True, True, True)
        layers.test_layer_norm((2, 3, 5, 40))
        layers.test_patches_are_what_a_convolution_multiplies(7, 4, 3, 2, 5, 9, 14)


def test_bytes_are_multiplied_and_looked_up_by_the_chips_own_instructions():
    for chip, form, found in (
        ("neoverse-n1", "mult_int8", "sdot"),
        ("apple-m1", "shift_int8", "sdot"),
        ("cortex-a72", "mult_int8", "smull"),
        ("cortex-a72", "shift_int4", "tbl"),
    ):
        workload, target = linear(form, 4, 64, 64), _target(chip)
        built = compiled(lowerings(workload, target)[0], workload.family, target)
        assert f"\t{found}\t" in built.mod.inspect_source("asm"), (chip, form)
