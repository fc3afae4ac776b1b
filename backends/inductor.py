"""Compile ahead of time to C++ with TorchInductor, into one `.pt2` file.

    program -> fast CPU modules -> flat module -> torch.export -> AOTInductor -> g++ -> model.pt2

The package holds native code and the weights; running it takes no Python, but for experts, which
call an op of ours. It belongs to the CPU and the torch build it was made with, so a restored one is
checked against both and rebuilt if they differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..ir.errors import LoweringError, OptionError
from ..ir.program import Program
from ..ir.shapes import concrete
from ..ir.shapes import dims as dims_of
from .base import Backend, Files, Lowered, WeightsFile, refuse_unsupported
from .block_ops import spell_blocks
from .cpu_ops import lower_structural
from .inductor_choices import exact_operands

PACKAGE, MADE_FOR = "model.pt2", "inductor.json"
OPTIONS = ("threads", "activations", "freezing", "max_autotune")
_compiling = threading.Lock()  # Inductor's settings are global to the process


class InductorBackend(Backend):
    """Compiles programs for this CPU; takes tens of seconds.

    Options beside `threads`: `activations`, see `cpu_ops`; `freezing`, pack weights while compiling
    (only for programs with integer layers when absent: they need it, and packed fp32 layers can be
    slower); `max_autotune` (false), measure C++ matrix kernels against the library's.
    """

    name: ClassVar[str] = "inductor"

    def missing(self) -> str | None:
        if compiler() is None:
            return "install g++ or clang++, or name a C++ compiler in the variable CXX."
        return None

    def lower(self, program: Program, options: Mapping[str, Any]) -> Lowered:
        settings = inductor_settings(options)
        missing = self.missing()
        if missing:
            raise LoweringError("inductor finds no C++ compiler.", remedy=missing)
        refuse_unsupported(program, self.name)
        folder = tempfile.TemporaryDirectory(prefix="blockwright-")
        path = Path(folder.name) / PACKAGE
        prepared = lower_structural(spell_blocks(program), options, compiled=True)
        settings.setdefault("freezing", has_integer_layers(prepared))
        exported = export(prepared)
        with _compiling, _threads(options.get("threads")), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.no_grad(), exact_operands():  # with gradients it ignores `freezing`
                    torch._inductor.aoti_compile_and_package(
                        exported, package_path=str(path), inductor_configs=settings
                    )
            except Exception as error:  # anything a compiler can raise
                raise LoweringError(
                    f"inductor cannot compile the program: {_first_line(error)}",
                    remedy="use backend=eager or onnxruntime; see the chained error.",
                ) from error
        return Package(path, options.get("threads"), folder)

    def restore(
        self,
        program: Program,
        portable: Mapping[str, Path],
        compiled: Mapping[str, Path],
        options: Mapping[str, Any],
    ) -> Lowered:
        stamp = portable.get(MADE_FOR)
        fits = stamp is not None and stamp.read_bytes() == made_for()
        if PACKAGE in compiled and fits:
            return Package(compiled[PACKAGE], options.get("threads"))
        return self.lower(program, options)


class Package(Lowered):
    """A loaded package.

    Args:
        path: The `.pt2` file.
        threads: Threads of a call; None for torch's setting at the time of the call.
        folder: Kept as long as this object, if given.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self.path, self.threads, self.folder = path, threads, folder
        try:
            self.loaded = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # a file may be damaged in any way
            raise LoweringError(
                f"the compiled package does not load: {_first_line(error)}",
                where=str(path),
                remedy="lower the program again.",
            ) from error

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        dense = [tensor.contiguous() for tensor in inputs]  # compiled code takes that for granted
        with torch.no_grad(), _threads(self.threads):
            return list(self.loaded(*dense))

    def files(self, weights: WeightsFile) -> Files:
        return Files(portable={MADE_FOR: made_for()}, compiled={PACKAGE: self.path})


def export(program: Program) -> ExportedProgram:
    """Export the flat program with the dynamic sizes it was captured with.

    Raises:
        LoweringError: `torch.export` refuses.
    """
    ranges = program.signature.ranges
    dims = {name: Dim(name, min=low, max=high) for name, (low, high) in ranges.items()}
    sizes = {name: max(size, 2) for name, size in program.sizes().items()}  # 1 would be a constant
    size = concrete(program, sizes)
    inputs: list[Tensor] = []
    dynamic: list[dict[int, Any]] = []
    for value in (node.meta["val"] for node in program.main.nodes if node.op == "placeholder"):
        inputs.append(
            torch.zeros([size(n) for n in value.shape], dtype=value.dtype, device=value.device)
        )
        names = enumerate(dims_of(value, program.signature.symbols))
        dynamic.append({i: dims.get(n, Dim.AUTO) for i, n in names if isinstance(n, str)})
    module = program.module()
    try:
        # The module's arguments have the names of the placeholders, one shape each.
        return torch.export.export(module, tuple(inputs), dynamic_shapes=tuple(dynamic))
    except Exception as error:  # it runs the whole program
        raise LoweringError(
            f"the program does not export again: {_first_line(error)}",
            remedy="use backend=eager or onnxruntime; see the chained error.",
        ) from error


def inductor_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return Inductor's own settings for our options.

    Raises:
        OptionError: An option is unknown or has a value of another type.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise OptionError(
                f"inductor has no option {name!r}.", remedy=f"use one of {', '.join(OPTIONS)}."
            )
        if name in ("freezing", "max_autotune") and not isinstance(value, bool):
            raise OptionError(f"inductor: {name}={value!r} is neither true nor false.")
    threads = options.get("threads")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise OptionError(f"inductor: threads={threads!r} is no number of threads; use 1 or more.")
    own = {name: options[name] for name in ("freezing", "max_autotune") if name in options}
    return own | {
        "cpp.cxx": compiler(),
        "cpp.threads": threads or -1,
        "cpp.dynamic_threads": threads is None,
    }


def has_integer_layers(program: Program) -> bool:
    """Whether Inductor will find int8 layers as `CompiledInt8Linear` spells them."""
    spelling = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    return any(node.target is spelling for graph in program.graphs.values() for node in graph.nodes)


def compiler() -> str | None:
    """Return the path of a C++ compiler, `CXX` first."""
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def made_for() -> bytes:
    """Say in JSON what compiled code depends on: torch, and every instruction the CPU has."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        cpu += " " + hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]
    facts = {"torch": torch.__version__, "cpu": cpu, "system": platform.system()}
    return json.dumps(facts).encode()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with that many torch threads; None leaves the setting alone."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
