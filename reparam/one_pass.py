"""One pass through a model to look at what goes through its modules; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# hook(module, args, kwargs), before the module runs.
Hook = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each part goes back to the mode that it was in."""
    modes = {part: part.training for part in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def watched(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Hooks before modules, taken off again at the end."""
    with ExitStack() as stack:
        for part, hook in hooks.items():
            stack.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def watch_pass(model: nn.Module, example: Tensor, hooks: Mapping[nn.Module, Hook]) -> None:
    """Runs a model once in evaluation mode with hooks before some of its modules.

    Args:
        model: Any.
        example: Its input.
        hooks: By module; without any the model is not run.
    """
    if hooks:
        with evaluating(model), watched(hooks):
            model(example)
