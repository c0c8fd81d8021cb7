"""Which parts of a timm model can be converted, and which never are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.add_attention import AddAttention
from reparam.coded_attention import CodedAttention
from reparam.form_linear import FormLinear
from reparam.moe import MoEMlp
from reparam.pointwise import is_pointwise

CONVERTED_ATTENTION = (AddAttention, CodedAttention)
# An MLP has two linears; a gated one three, and one more where the gate is a linear of its own.
_MLP_LINEARS = range(2, 5)


def protected_parts(model: nn.Module, same: Collection[str] = ()) -> dict[int, str]:
    """Why a module is never converted, by id: classifier heads, patch embeddings, position biases.

    Args:
        model: A timm model.
        same: Qualified names of modules whose input does not depend on the images, such as the
            linears that make position biases of coordinates.
    """
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else (classifier,)
    protected = {id(head): "classifier head, never converted" for head in heads}
    if hasattr(model, "patch_embed"):
        protected[id(model.patch_embed)] = "patch embedding, never converted"
    for part in map(model.get_submodule, same):
        if isinstance(part, nn.Linear):
            protected[id(part)] = "computes the same for any images, never converted"
    return protected


def candidates(
    model: nn.Module,
    attentions: Collection[str],
    protected: Mapping[int, str],
    skipped: dict[str, str],
) -> Iterator[tuple[str, nn.Module]]:
    """Attentions and MLPs outside of protected modules; does not look inside of what it found.

    A module of several names is found under the first of them.

    Args:
        model: A timm model.
        attentions: Qualified names of its attentions.
        protected: As ``protected_parts`` found them.
        skipped: Gets the protected modules with the reason.
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if child in seen:
                continue
            seen.add(child)
            fqn = f"{prefix}{name}"
            holds_others = any(other.startswith(f"{fqn}.") for other in attentions) or any(
                id(part) in protected for part in child.modules()
            )
            if id(child) in protected:
                skipped[fqn] = protected[id(child)]
            elif is_attention(fqn, child, attentions) or (not holds_others and _is_mlp(child)):
                yield fqn, child
            else:
                yield from walk(child, f"{fqn}.")

    yield from walk(model, "")


def replace_(model: nn.Module, fqn: str, replacement: nn.Module) -> None:
    """Puts a module in the place of another, under each name that a model has for that."""
    replaced = model.get_submodule(fqn)
    names = [name for name, part in model.named_modules(remove_duplicate=False) if part is replaced]
    for name in names:
        model.set_submodule(name, replacement)


def is_attention(fqn: str, module: nn.Module, attentions: Collection[str]) -> bool:
    """Whether a candidate is an attention, converted or not; otherwise it is an MLP."""
    return fqn in attentions or isinstance(module, CONVERTED_ATTENTION)


def linear_parts(module: nn.Module) -> dict[str, nn.Module]:
    """What acts as a linear inside of an attention or MLP, by name: 1×1 convolutions, too."""
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if any(name.startswith(f"{other}.") for other in found):
            continue
        pointwise = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.groups == 1
        if isinstance(part, nn.Linear | FormLinear | MoEMlp) or pointwise:
            found[name] = part
    return found


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module is an MLP: a few linears, the last of which leads back to the first's input.

    Its linears are its children or within them, and no child alone is an MLP. A container that
    computes nothing itself is none.
    """
    if isinstance(module, MoEMlp) or (hasattr(module, "fc1") and hasattr(module, "fc2")):
        return True
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    if _is_mlp_of_pixels(module):
        return True
    linears = {
        name: part for name, part in linear_parts(module).items() if not isinstance(part, nn.Conv2d)
    }
    children = [name.split(".")[0] for name in linears]
    if len(linears) not in _MLP_LINEARS or len(set(children)) < len(children):
        return False
    first, *_, last = linears.values()
    leads_back = getattr(first, "in_features", None) == getattr(last, "out_features", None)
    return leads_back and all(name.count(".") <= 1 for name in linears)


def _is_mlp_of_pixels(module: nn.Module) -> bool:
    """Whether two 1×1 convolutions, there and back, are its only linears and convolutions."""
    convs = {name: part for name, part in module.named_modules() if isinstance(part, nn.Conv2d)}
    within = {name.split(".")[0] for name in convs}
    others = any(isinstance(part, nn.Linear) for part in module.modules())
    if len(convs) != 2 or len(within) != 2 or others or not all(map(is_pointwise, convs.values())):
        return False
    first, last = ((part.in_channels, part.out_channels) for part in convs.values())
    return first == last[::-1]


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation computes the exact GELU, whatever its class: timm has its own."""
    if next(iter([*act.parameters(), *act.buffers()]), None) is not None:
        return False
    probe = torch.linspace(-6, 6, 97)
    try:
        found = act(probe.clone())
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, Tensor) and torch.equal(found, F.gelu(probe))


def does_nothing(parts: Iterable[nn.Module]) -> bool:
    """Whether what else an MLP holds computes nothing at inference."""
    return all(isinstance(part, nn.Identity | nn.Dropout) for part in parts)
