"""The CUDA text of every lowering, compiled to cubin. It has not been run on a GPU."""

import shutil
from importlib.util import find_spec

import pytest
from tvm.support import nvcc

from kernels.build import LOWERINGS, compiled
from kernels.cuda_compiler import cuda_compiler
from kernels.targets import cuda_target
from kernels.workload import attention, linear

HAS_NVCC = shutil.which("nvcc") is not None
# TVM's own choice on a machine with a GPU. CUDA builds of torch bring it, and its headers.
HAS_NVRTC = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None

pytestmark = pytest.mark.skipif(
    not HAS_NVCC and not HAS_NVRTC, reason="nvcc and NVRTC are absent: CUDA text cannot be compiled"
)
CASES = [
    (architecture, name, form)
    for architecture in ("sm_75", "sm_80", "sm_86", "sm_90")
    for name, lowering in LOWERINGS.items()
    if lowering.target == "cuda" and lowering.runs_on(cuda_target(architecture))
    for form in lowering.forms
    # The two alphabets differ by a constant, and nothing falls back where it need not.
    if architecture == "sm_90" or "_01" not in form
    if architecture in ("sm_75", "sm_90") or name != "add.cuda"
    # What needs most of its smaller memory stands for all of a text that is that of sm_80.
    if architecture != "sm_86" or form == "add_attention_pm1"
]


ATTENTION = {
    workload.form: workload
    for alphabet in ("pm1", "01")
    for dtype in ("float32", "bfloat16")
    for workload in attention(2, 49, 16, 32, alphabet, dtype)
}


def _text(architecture, name, form):
    family = (ATTENTION.get(form) or linear(form, 49, 64, 100)).family
    program = compiled(name, family, cuda_target(architecture))
    return program.mod.imports[0].inspect_source()


def _cubin(architecture, name, form, compiler):
    source = _text(architecture, name, form)
    with cuda_target(architecture).tvm, cuda_compiler():
        return source, nvcc.compile_cuda(
            source, target_format="cubin", arch=architecture, compiler=compiler
        )


@pytest.mark.parametrize(("architecture", "name", "form"), CASES)
def test_every_lowering_compiles(architecture, name, form):
    source, cubin = _cubin(architecture, name, form, "nvcc" if HAS_NVCC else "nvrtc")
    assert len(cubin) > 1000
    uses_tensor_cores = name.startswith("add.cuda_split") or "int" in form or "bf16" in form
    assert ("mma.sync" in source) == uses_tensor_cores
    # TVM has nvcc compile with --use_fast_math: a plain / would quantise otherwise than declared.
    assert ("__fdiv_rn(" in source) == ("int" in form)


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for chip, name, form in CASES if chip == "sm_80"]
)
def test_the_text_for_sm_86_is_that_for_sm_80(name, form):
    assert _text("sm_86", name, form) == _text("sm_80", name, form)


@pytest.mark.skipif(not HAS_NVRTC, reason="NVRTC is absent: torch brings it in its CUDA builds")
@pytest.mark.parametrize(
    ("name", "form"),
    [("shift.cuda_nibbles", "shift_int4"), ("add.cuda_split", "add_attention_pm1_bf16")],
)
def test_tvm_finds_a_compiler_without_the_toolkit(name, form, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert len(_cubin("sm_90", name, form, "nvrtc")[1]) > 1000
