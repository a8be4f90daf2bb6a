"""What an engine computes in: read from the builder's log, since loading an engine needs its GPU. Never imports torch.

With detailed profiling verbosity the log ends with a line a kernel, which names the types of its inputs and, as
metadata, the ONNX nodes that it computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clip_rd_edge.errors import ClipRdEdgeError

_KERNEL = re.compile(
    r"^Name: (?P<name>[^,]*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: "
    r".*?Metadata: (?P<nodes>.*)$",
    re.MULTILINE,
)
_PRODUCTS = ("correlation", "gemm")


@dataclass(frozen=True)
class Kernel:
    """One step of an engine: the ONNX nodes that it computes, and the types of what it reads, such as `Int8`."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]


def kernels(log: str) -> list[Kernel]:
    """The kernels that a builder's verbose log tells of, in their order.

    Raises:
        ClipRdEdgeError: the log tells of none.
    """
    found = [
        Kernel(
            match["name"],
            match["kind"],
            tuple(re.findall(r"Datatype: (\w+)", match["inputs"])),
            tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", match["nodes"])),
        )
        for match in _KERNEL.finditer(log)
    ]
    if not found:
        raise ClipRdEdgeError("The builder's log names no layers; expected its verbose log with detailed profiling.")
    return found


def layers_not_in(log: str, types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The layers of a model that an engine does not compute in the type that they should have.

    Args:
        log: of the build.
        types: by the layer's name its type as TensorRT calls it: `Int8`, `Half`.

    Returns:
        By the layer's name the types that its kernel reads instead; none where no kernel names the layer.
    """
    computing: dict[str, list[Kernel]] = {}
    for kernel in kernels(log):
        for name in kernel.nodes:
            computing.setdefault(name, []).append(kernel)
    found = {name: _reads(computing.get(name, ())) for name in types}
    return {name: read for name, read in found.items() if types[name] not in read}


def _reads(steps: Sequence[Kernel]) -> tuple[str, ...]:
    """The types that the product among a node's kernels reads first, else all that its fused kernels read.

    A node of INT8 also appears in the kernels that quantise its input, or add its bias; a product that was fused with
    its neighbours has no kernel of its own, and its types are among those of the fused one.
    """
    products = [kernel.inputs[0] for kernel in steps if kernel.kind in _PRODUCTS and kernel.inputs]
    return tuple(products or (read for kernel in steps for read in kernel.inputs))
