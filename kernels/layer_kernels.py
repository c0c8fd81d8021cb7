"""Kernels of what lies around the products of a deployed layer, each loaded once a process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

from tvm import tirx

from kernels.compilation import runnable
from kernels.lowerings.angular import angular_attention
from kernels.lowerings.code_attention import code_attention, code_scores
from kernels.lowerings.depthwise import depthwise_gelu, depthwise_mixture
from kernels.lowerings.layer_norm import layer_norm
from kernels.lowerings.mixture import mixture
from kernels.lowerings.patches import patches
from kernels.lowerings.routing import top1_routing
from kernels.targets import cpu_target

LAYER_KERNELS: dict[str, Callable[..., tirx.PrimFunc]] = {
    "angular_attention": angular_attention,
    "code_attention": code_attention,
    "code_scores": code_scores,
    "depthwise_gelu": depthwise_gelu,
    "depthwise_mixture": depthwise_mixture,
    "layer_norm": layer_norm,
    "mixture": mixture,
    "patches": patches,
    "top1_routing": top1_routing,
}


@functools.cache
def layer_kernel(name: str, *fixed: Hashable) -> Callable[..., None]:
    """A kernel for this machine's CPU, launched on tensors into the last of them.

    Args:
        name: In LAYER_KERNELS.
        fixed: Arguments of its definition but the target; all other sizes are those of the
            tensors.
    """
    target = cpu_target()
    return runnable(LAYER_KERNELS[name](*fixed, target), target)
