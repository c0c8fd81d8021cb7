"""Every CUDA lowering on a GPU, where there is one. Not yet run: none was at hand."""

import pytest
import torch
import tvm
import tvm.script.ir_builder.tirx as T

from kernels.build import LOWERINGS, build
from kernels.cuda_compiler import cuda_compiler
from kernels.lowerings.emit import argument, program
from kernels.reference import max_abs_error, random_operands
from kernels.targets import cuda_target
from kernels.workload import attention, linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

ATTENTION = {
    workload.form: workload
    for alphabet in ("pm1", "01")
    for dtype in ("float32", "bfloat16")
    for workload in attention(3, 1000, 16, 32, alphabet, dtype)
}


@pytest.fixture(scope="module")
def target():
    major, minor = torch.cuda.get_device_capability()
    return cuda_target(f"sm_{major}{minor}")


def _captured(launch):
    """Runs it once on a stream of its own, then captures it there."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch()
    return graph


def test_a_kernel_goes_to_torchs_stream_and_into_its_graph(target):
    def body():
        x, out = argument("x", (64,), "float32"), argument("out", (64,), "float32")
        with T.launch_thread("threadIdx.x", 64) as t:
            T.buffer_store(out, x[t] + 1, [t])

    with cuda_compiler():
        built = tvm.compile(tvm.IRModule({"main": program(body)}), target=target.tvm)
    x, out = torch.zeros(64, device="cuda"), torch.empty(64, device="cuda")
    graph = _captured(lambda: built["main"](x, out))
    for value in (5.0, 7.0):
        x.fill_(value)
        graph.replay()
        assert out.tolist() == [value + 1] * 64


CASES = [
    (name, form)
    for name, lowering in LOWERINGS.items()
    if lowering.target == "cuda"
    for form in lowering.forms
]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_lowering_matches_the_oracle_now_and_in_a_graph(name, form, target):
    if not LOWERINGS[name].runs_on(target):
        pytest.skip(f"{target.chip} cannot run {name}")
    workload = ATTENTION.get(form) or linear(form, 1000, 130, 96)
    kernel = build(workload, name, target)
    operands = [random_operands(workload, seed) for seed in (1, 2)]
    first, second = (each.to("cuda") for each in operands)
    assert max_abs_error(workload, first, kernel(first))[1]
    arguments, out = kernel.pack(first), kernel.allocate(first)
    graph = _captured(lambda: kernel.launch(*arguments, out))
    # Another kernel's memory in between, then new activations in the place of the old ones.
    kernel(second)
    for old, new in zip(arguments, kernel.pack(second)):
        old.copy_(new)
    out.fill_(float("nan"))
    graph.replay()
    error, within = max_abs_error(workload, second, out)
    assert within, f"{name} of {workload.label} is off by {error} in a graph"
