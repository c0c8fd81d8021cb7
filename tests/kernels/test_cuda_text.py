"""The CUDA text of every lowering, compiled to cubin. It has not been run on a GPU."""

import shutil

import pytest
from tvm.support import nvcc

from kernels.build import LOWERINGS, compiled
from kernels.targets import CUDA_ARCHITECTURES, cuda_target
from kernels.workload import attention, linear

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is absent: CUDA text cannot be compiled"
)
CASES = [
    (name, form)
    for name, lowering in LOWERINGS.items()
    if lowering.target == "cuda"
    for form in lowering.forms
]


def _workload(form):
    if form.startswith("add"):
        return next(w for w in attention(2, 49, 16, 32, form.split("_")[-1]) if w.form == form)
    return linear(form, 49, 64, 100)


def _cubin(name, form, architecture):
    target = cuda_target(architecture)
    source = compiled(name, _workload(form).family, target).mod.imports[0].inspect_source()
    with target.tvm:
        return nvcc.compile_cuda(source, target_format="cubin", arch=architecture, compiler="nvcc")


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_lowering_compiles_for_hopper(name, form):
    assert len(_cubin(name, form, "sm_90")) > 1000


@pytest.mark.parametrize("architecture", [a for a in CUDA_ARCHITECTURES if a != "sm_90"])
def test_shift_compiles_for_every_architecture(architecture):
    assert len(_cubin("shift.cuda_dot", "shift_int8", architecture)) > 1000
