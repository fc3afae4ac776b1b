"""What a backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..ir.errors import LoweringError
from ..ir.ops import OPS
from ..ir.program import Program


@dataclass(frozen=True)
class WeightsFile:
    """Where an artefact keeps the tensors, for files that refer to them instead of repeating them.

    Attributes:
        name: File name, a safetensors file in the same folder.
        spans: First byte and number of bytes of every tensor, by its name in the program.
    """

    name: str
    spans: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Files:
    """What a lowered program keeps in an artefact, beside graph and weights.

    Attributes:
        portable: Data only, by file name: bytes, or the path of a file to copy.
        compiled: Code; loaded only from a trusted artefact, otherwise rebuilt.
    """

    portable: Mapping[str, bytes | Path] = field(default_factory=dict)
    compiled: Mapping[str, bytes | Path] = field(default_factory=dict)


class Lowered(ABC):
    """A program ready to run on one backend. Calls are thread-safe."""

    @abstractmethod
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on flat inputs, in the order of main's placeholders; return its flat outputs."""

    def files(self, weights: WeightsFile) -> Files:
        """Return what an artefact needs to bring this back without lowering again.

        Args:
            weights: The program's tensors as already written. A file may refer to them by name and
                place, as ONNX external data does; other files get their final name afterwards.
        """
        return Files()


class Backend(ABC):
    """One way to run programs."""

    name: ClassVar[str]

    def missing(self) -> str | None:
        """Return what must be installed before the backend works here; None when it does."""
        return None

    @abstractmethod
    def lower(self, program: Program, options: Mapping[str, Any]) -> Lowered:
        """Lower a program.

        Args:
            program: What to lower; its tensors are shared, not copied, where possible.
            options: `threads` (int, all cores when absent) and the backend's own options.

        Raises:
            LoweringError: The backend cannot run the program; the message names op and pass.
        """

    def restore(
        self,
        program: Program,
        portable: Mapping[str, Path],
        compiled: Mapping[str, Path],
        options: Mapping[str, Any],
    ) -> Lowered:
        """Bring a lowered program back from an artefact's files; lower again by default.

        Args:
            program: The artefact's program, weights memory-mapped.
            portable: Verified data files by the names `Files.portable` gave them.
            compiled: Files that are code, by name; empty unless the caller trusts the artefact.
            options: As in `lower`.
        """
        return self.lower(program, options)


def refuse_unsupported(program: Program, backend: str) -> None:
    """Refuse a program with a structural op the backend has no lowering for.

    Raises:
        LoweringError: Names the op, its place, the pass that made it, and who can lower it.
    """
    for graph in program.graphs.values():
        for node in graph.nodes:
            op = OPS.get(str(node.target))
            if op is not None and backend not in op.backends:
                sources = node.meta.get("from_node") or []
                maker = f", made by {sources[-1].pass_name}" if sources else ""
                raise LoweringError(
                    f"{backend} cannot lower {node.target}{maker}.",
                    where=str(node.meta.get("local_path", node.name)),
                    remedy=f"use one of {', '.join(sorted(op.backends))}.",
                )
