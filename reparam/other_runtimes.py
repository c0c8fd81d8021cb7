"""Other projects' runtimes for an original model: printed beside PyTorch's ways where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from profiler.command_line import one_line

Launch = Callable[[Tensor], Any]


def _openvino(precision: str, model: nn.Module, example: Tensor) -> Launch:
    """Source: OpenVINO documentation, CPU device: ``INFERENCE_PRECISION_HINT``."""
    import openvino

    compiled = openvino.compile_model(
        openvino.convert_model(model, example_input=example, input=[tuple(example.shape)]),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    return lambda x: compiled(x.numpy())[0]


def _onnx_runtime(model: nn.Module, example: Tensor) -> Launch:
    """Source: ONNX Runtime documentation, thread management."""
    import onnxruntime

    exported = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its idle threads would spin on the cores of whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    return lambda x: session.run(None, {given.name: x.numpy()})[0]


# By name: what must be installed, and what makes something to launch.
_RUNTIMES: dict[str, tuple[tuple[str, ...], Callable[[nn.Module, Tensor], Launch]]] = {
    "ONNX Runtime fp32": (("onnxruntime", "onnx", "onnxscript"), _onnx_runtime),
    "OpenVINO fp32": (("openvino",), partial(_openvino, "f32")),
    "OpenVINO bf16": (("openvino",), partial(_openvino, "bf16")),
}


def runtime_contestants(
    model: nn.Module, example: Tensor
) -> Iterator[tuple[str, Launch | None, str]]:
    """Of what is installed: (name, what runs the model and has run it once, or None with a reason).

    Args:
        model: In fp32, left as it is.
        example: ``(b, c, h, w)``; the shape is fixed.
    """
    for name, (needed, prepare) in _RUNTIMES.items():
        if not all(importlib.util.find_spec(package) for package in needed):
            continue
        try:
            launch = prepare(model.eval(), example)
            launch(example)
        except Exception as error:  # whatever it raises, the others are measured
            yield name, None, f"failed: {one_line(error)[:200]}"
        else:
            yield name, launch, ""
