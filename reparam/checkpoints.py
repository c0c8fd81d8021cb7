"""Weights and training state in safetensors, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from profiler.command_line import BadInput
from profiler.whole_file import whole_file

_HEADER = "shiftadd"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON header into one file, replacing what is there in one step.

    Args:
        path: A ``.safetensors`` file.
        tensors: Tensors by name.
        header: Plain JSON types.
    """
    # Tensors that share memory are refused by safetensors; copies are not.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as part:
        save_file(copies, part, metadata={_HEADER: json.dumps(header)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of ``save_tensors``.

    Raises:
        BadInput: If the file is broken or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BadInput(f"{path}: is no file of weights of this suite ({error})") from error


def save_weights(path: Path, model: nn.Module, header: Mapping[str, Any]) -> None:
    """Writes a model's state dict."""
    save_tensors(path, model.state_dict(), header)


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Loads a state dict into a model of the same architecture.

    Returns:
        The header.

    Raises:
        BadInput: If the file is not one of ours or a name or shape differs.
    """
    tensors, header = load_tensors(path)
    load_state(path, model, tensors)
    return header


def load_state(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads tensors strictly; ``path`` is only named in the message.

    Raises:
        BadInput: Naming the first tensor that is missing, unknown or of another shape.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise BadInput(f"{path}: {name}: is missing, these are weights of another model")
        if name not in expected:
            raise BadInput(f"{path}: {name}: is unknown, these are weights of another model")
        if tensors[name].shape != expected[name].shape:
            raise BadInput(
                f"{path}: {name}: has shape {tuple(tensors[name].shape)},"
                f" the model has {tuple(expected[name].shape)}"
            )
    model.load_state_dict(dict(tensors))
