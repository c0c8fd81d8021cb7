"""A deployed model as two files: NAME.safetensors with all tensors, NAME.json with what they are.

    save_deployed(deployed, "model.json", create={"model_name": "deit_tiny_patch16_224"})
    deployed = load_deployed("model.json")

The JSON says which timm model it began as and what stands where in it; loading executes nothing
but timm's own constructor of that name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from profiler.whole_file import whole_file, write_whole
from reparam.add_attention import LinearCore
from reparam.attention_structure import open_
from reparam.coded_attention import CodedAttention, with_core
from reparam.deploy import fuse_and_prepare_
from reparam.deployed import (
    DeployedAddAttention,
    DeployedAddProducts,
    DeployedAngular,
    DeployedConv,
    DeployedLayerNorm,
    DeployedLinear,
    DeployedQuadraticCore,
)
from reparam.deployed_mlps import (
    DeployedDepthwiseMlp,
    DeployedMlp,
    DeployedMoE,
)
from reparam.hashing import SignHash
from reparam.kept_memory import keep_freed_memory
from reparam.model_structure import replace_
from reparam.pointwise import Pointwise
from reparam.quadratic_attention import QuadraticCore

# What only fusing makes.
_FUSED = (torch.fx.GraphModule, DeployedLayerNorm)
_FORMAT, _VERSION = "shiftadd-deployed", 2


class DeployedFileError(ValueError):
    """A deployed model that cannot be saved or read; the message names the file and the key."""


def save_deployed(model: nn.Module, path: str | Path, create: dict[str, Any]) -> None:
    """Writes a deployed model, as ``deploy`` returned it.

    Args:
        model: Deployed, fused or not.
        path: Of the JSON; the tensors go beside it.
        create: Arguments of ``timm.create_model`` that made the original, as plain JSON.

    Raises:
        DeployedFileError: If a module cannot be described.
    """
    path = Path(path)
    modules = {fqn: _spec(fqn, module) for fqn, module in _outermost(model)}
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "create": create,
        "fused": any(isinstance(module, _FUSED) for module in model.modules()),
        "modules": modules,
    }
    named = {**model.state_dict(), **_remembered(model)}
    tensors = {name: tensor.contiguous().clone() for name, tensor in named.items()}
    with whole_file(path.with_suffix(".safetensors")) as part:
        save_file(tensors, part)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def load_deployed(path: str | Path) -> nn.Module:
    """Reads what ``save_deployed`` wrote, ready for inference.

    Raises:
        DeployedFileError: If a file is missing, of another format, or its parts do not fit.
    """
    path = Path(path)
    keep_freed_memory()
    try:
        content = json.loads(path.read_text())
        # Out of the file's small pages.
        tensors = {n: t.clone() for n, t in load_file(path.with_suffix(".safetensors")).items()}
    except (OSError, ValueError) as error:
        raise DeployedFileError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # safetensors has an error class of its own
        raise DeployedFileError(f"{path.with_suffix('.safetensors')}: {error}") from error
    for key, expected in (("format", _FORMAT), ("version", _VERSION)):
        if not isinstance(content, dict) or content.get(key) != expected:
            raise DeployedFileError(f"{path}: {key}: must be {expected!r}")
    try:
        model = timm.create_model(**{**content["create"], "pretrained": False}).eval()
        for fqn, spec in content["modules"].items():
            is_coded = spec["is"] == "coded"
            made = _coded(model.get_submodule(fqn), spec) if is_coded else _made(spec)
            replace_(model, fqn, made)
            open_(model.get_submodule(fqn.rpartition(".")[0]))
        # Before fusing: what it traces may ask how large they are.
        remembered = _remembered(model).keys() & tensors.keys()
        for name in remembered:
            owner, _, buffer = name.rpartition(".")
            setattr(model.get_submodule(owner), buffer, tensors[name])
        if content["fused"]:
            fuse_and_prepare_(model)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DeployedFileError(f"{path}: modules do not fit the model ({error!r})") from error
    for name in remembered - model.state_dict().keys():
        del tensors[name]
    try:
        # In place of the constructor's tensors: those of layer norms have other shapes.
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise DeployedFileError(f"{path.with_suffix('.safetensors')}: {error}") from error
    return model.requires_grad_(False)


def _remembered(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are in no state dict, which a first pass may have made anew (convit's)."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def _outermost(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules of this package that lie in no other: what timm's constructor does not make."""
    for name, child in model.named_children():
        fqn = f"{prefix}{name}"
        if isinstance(child, DeployedLayerNorm):
            continue  # fusing makes it again
        if type(child).__module__.startswith(f"{__package__}."):
            yield fqn, child
        else:
            yield from _outermost(child, f"{fqn}.")


def _spec(fqn: str, module: nn.Module) -> dict[str, Any]:
    """What a module is, without its tensors' values."""

    def tensors(*names: str) -> dict[str, list[Any]]:
        return {name: _shape(getattr(module, name)) for name in names}

    def inner(name: str) -> dict[str, Any]:
        return _spec(f"{fqn}.{name}", module.get_submodule(name))

    if isinstance(module, DeployedLinear):
        return {
            "is": "linear",
            "form": module.form,
            "k": module.in_features,
            "n": module.out_features,
            "activated": module.activated,
            "packed": [_shape(tensor) for tensor in module.packed],
        }
    if isinstance(module, DeployedConv):
        window = {"side": module.side, "stride": module.stride, "padding": module.padding}
        return {"is": "conv", "linear": inner("linear"), **window}
    if isinstance(module, Pointwise):
        return {"is": "pointwise", "linear": inner("linear")}
    if isinstance(module, DeployedAngular):
        return {"is": "angular", "alphabet": module.alphabet, **tensors("conv")}
    if isinstance(module, DeployedAddAttention):
        return {"is": "add_attention"} | {n: inner(n) for n in ("qkv", "add_products", "proj")}
    if isinstance(module, DeployedAddProducts):
        return {"is": "add_products", "alphabet": module.alphabet}
    if isinstance(module, DeployedMlp):
        return {"is": "mlp", "fc1": inner("fc1"), "fc2": inner("fc2")}
    if isinstance(module, DeployedDepthwiseMlp):
        return {
            "is": "depthwise_mlp",
            "fc1": inner("fc1"),
            "fc2": inner("fc2"),
            **tensors("weight", "bias"),
        }
    if isinstance(module, DeployedMoE):
        experts = {name: inner(f"experts.{name}") for name in module.experts}
        return {"is": "moe", "experts": experts, **tensors("gate", "gate_bias")}
    if isinstance(module, CodedAttention):
        inside = {
            name: _spec(f"{fqn}.{name}", part)
            for name, part in _outermost(module)
            if name != "core"
        }
        products = list(module.score_products)
        return {"is": "coded", "core": inner("core"), "score_products": products, "inside": inside}
    if isinstance(module, LinearCore | QuadraticCore) and isinstance(module.hashing, SignHash):
        about = {"alphabet": module.hashing.alphabet}
        if isinstance(module, QuadraticCore):
            return {"is": "quadratic_core", "similarity": module.similarity, **about}
        own = {"heads": module.heads, "drop_bias": module.drop_bias}
        return {"is": "linear_core", "add_products": inner("add_products"), **own, **about}
    raise DeployedFileError(f"{fqn}: a {type(module).__name__} cannot be saved yet")


def _shape(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def _empty(shape: list[Any]) -> Tensor:
    dtype, *sizes = shape
    return torch.zeros(sizes, dtype=getattr(torch, dtype))


def _made(spec: dict[str, Any]) -> Any:
    """The module of a ``_spec``, its tensors zero."""
    kind = spec["is"]
    if kind == "linear":
        packed = tuple(_empty(shape) for shape in spec["packed"])
        return DeployedLinear(spec["form"], spec["k"], spec["n"], packed, spec["activated"])
    if kind == "conv":
        window = (spec["side"], spec["stride"], spec["padding"])
        return DeployedConv(_made(spec["linear"]), *window)
    if kind == "pointwise":
        return Pointwise(_made(spec["linear"]))
    if kind == "angular":
        return DeployedAngular(_empty(spec["conv"]), spec["alphabet"])
    if kind == "add_products":
        return DeployedAddProducts(spec["alphabet"])
    if kind == "add_attention":
        return DeployedAddAttention(*(_made(spec[n]) for n in ("qkv", "add_products", "proj")))
    if kind == "mlp":
        return DeployedMlp(_made(spec["fc1"]), _made(spec["fc2"]))
    if kind == "depthwise_mlp":
        return DeployedDepthwiseMlp(
            _made(spec["fc1"]), _made(spec["fc2"]), _empty(spec["weight"]), _empty(spec["bias"])
        )
    if kind == "moe":
        experts = {name: _made(expert) for name, expert in spec["experts"].items()}
        return DeployedMoE(_empty(spec["gate"]), _empty(spec["gate_bias"]), experts)
    if kind == "quadratic_core":
        quadratic = QuadraticCore(spec["alphabet"], spec["similarity"])
        return DeployedQuadraticCore(quadratic.alphabet) if quadratic.is_plain else quadratic
    if kind == "linear_core":
        core = LinearCore(spec["heads"], spec["alphabet"], drop_bias=spec["drop_bias"])
        core.add_products = _made(spec["add_products"])
        return core
    raise ValueError(f"is: {kind!r} is no deployed module")


def _coded(attention: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """An attention of timm's with the core and the deployed parts of a ``_spec``."""
    made = with_core(attention, _made(spec["core"]).eval(), spec["score_products"])
    for name, part in spec["inside"].items():
        replace_(made, name, _made(part))
    return made
