"""What TVM needs to compile CUDA text on a machine without CUDA's toolkit.

By default TVM compiles by NVRTC, which torch's wheels bring along with the headers. It is told here
where they are, and to compute as written: it would ask for approximate divisions and denormals as
zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_AS_WRITTEN = "--ftz=false --prec-div=true"


def _wheel_headers() -> dict[str, str]:
    """TVM's settings for the headers of NVIDIA's wheels, if there are any."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    for runtime in (file for folder in folders for file in folder.glob("*/include/cuda_runtime.h")):
        for standard in runtime.parents[2].glob("*/include/**/cuda/std/cstdint"):
            return {
                "CUDA_PATH": str(runtime.parents[1]),
                "TVM_CUDA_NVRTC_EXTRA_OPTS": f"{_AS_WRITTEN} -I{standard.parents[2]}",
            }
    return {"TVM_CUDA_NVRTC_EXTRA_OPTS": _AS_WRITTEN}


@contextmanager
def cuda_compiler() -> Iterator[None]:
    """Within it TVM finds what it needs. What the user has set in the environment stands."""
    ours = {key: value for key, value in _wheel_headers().items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            del os.environ[key]
