"""Run a program with ONNX Runtime on the CPU.

    lower:    program -> ONNX model -> one session per variant -> the fastest stays
    restore:  ONNX model of the artefact -> session

The session reads weights from the program's own tensors; nothing is written to disk. A program
with weight-only codes has two variants: codes multiplied as they are, or turned into floats while
loading, which takes more memory and is faster for large batches and for odd group sizes.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor

from ..ir.errors import ArtefactError, LoweringError, OptionError
from ..ir.program import Program
from .base import Backend, Files, Lowered, WeightsFile, refuse_unsupported

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

MODEL_FILE: Final = "model.onnx"
VARIANTS: Final[Mapping[str, Mapping[str, str]]] = {
    "codes": {},
    "floats": {"session.disable_quant_qdq": "1"},
}
_CHOSEN = "blockwright.variant"
_PACKED = (21, 22)  # UINT4 and INT4 among ONNX's element types
_WORTH = 0.95  # floats must take this much less time to be worth their memory
_MEASURE_S = 0.3  # wall-clock time given to each variant
_SLOW_FUSIONS = ["SkipLayerNormFusion"]  # its kernel runs six times longer than the two it replaces


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on the CPU.

    Options:
        threads: Threads of one call; all cores when absent.
        accuracy_level: 1 multiplies weight-only codes in floating point; 4 lets ONNX Runtime
            quantize activations to 8 bits, which is faster and less accurate than the program.
        gelu_approximation: Compute GELU by its tanh approximation.
        variant: `codes` or `floats`, see above; measured when absent.
    """

    name: ClassVar[str] = "onnxruntime"

    def missing(self) -> str | None:
        absent = [name for name in ("onnxruntime", "onnxscript") if not find_spec(name)]
        return f"pip install {' '.join(absent)}" if absent else None

    def lower(self, program: Program, options: Mapping[str, Any]) -> Lowered:
        from .onnx_model import example_inputs, to_onnx

        check_options(options)
        refuse_unsupported(program, self.name)
        model = to_onnx(program)
        names = [options["variant"]] if options.get("variant") else _variants(model, program)
        lowered = {name: OnnxRuntimeLowered(model, program, name, options) for name in names}
        if len(lowered) == 1:
            return lowered[names[0]]
        inputs = example_inputs(program)
        seconds = {name: _seconds(candidate, inputs) for name, candidate in lowered.items()}
        return lowered["floats" if seconds["floats"] < _WORTH * seconds["codes"] else "codes"]

    def restore(
        self,
        program: Program,
        portable: Mapping[str, Path],
        compiled: Mapping[str, Path],
        options: Mapping[str, Any],
    ) -> Lowered:
        import onnx

        if MODEL_FILE not in portable:
            return self.lower(program, options)
        check_options(options)
        try:
            model = onnx.load(portable[MODEL_FILE], load_external_data=False)
        except Exception as error:  # protobuf has no public base class
            raise ArtefactError(f"{MODEL_FILE} is no ONNX model.") from error
        notes = {entry.key: entry.value for entry in model.metadata_props}
        variant = str(options.get("variant") or notes.get(_CHOSEN))
        known = variant if variant in VARIANTS else "codes"
        return OnnxRuntimeLowered(model, program, known, options)


class OnnxRuntimeLowered(Lowered):
    """One session over a program's tensors.

    Attributes:
        model: ONNX model, weights by name only.
        variant: How the session treats weight-only codes, a key of `VARIANTS`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        program: Program,
        variant: str,
        options: Mapping[str, Any],
    ) -> None:
        self.variant, self.model = variant, model
        self._weights = weight_values(model, program.tensors)  # the session does not own them
        self._session = open_session(model, self._weights, variant, options)
        self._inputs = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = (tensor.detach().contiguous().numpy() for tensor in inputs)
        try:
            outputs = self._session.run(None, dict(zip(self._inputs, arrays, strict=True)))
        except Exception as error:
            raise LoweringError(f"ONNX Runtime failed: {_reason(error)}.") from error
        return [torch.from_numpy(output) for output in outputs]

    def files(self, weights: WeightsFile) -> Files:
        from .onnx_model import placed

        return Files(portable={MODEL_FILE: placed(self.model, weights, {_CHOSEN: self.variant})})


def open_session(
    model: onnx.ModelProto,
    weights: Mapping[str, ort.OrtValue],
    variant: str,
    options: Mapping[str, Any],
) -> ort.InferenceSession:
    """Load a model whose references are answered from memory.

    Raises:
        LoweringError: ONNX Runtime has no kernel for an op, or refuses the model.
    """
    import onnxruntime as ort

    setup = ort.SessionOptions()
    setup.intra_op_num_threads = min(options.get("threads") or 0, os.cpu_count() or 1)
    setup.inter_op_num_threads = 1
    setup.log_severity_level = 3
    entries = {
        "session.intra_op.allow_spinning": "0",
        "session.qdq_matmulnbits_accuracy_level": str(options.get("accuracy_level", 1)),
        "optimization.enable_gelu_approximation": str(
            int(options.get("gelu_approximation", False))
        ),
        **VARIANTS[variant],
    }
    for key, value in entries.items():
        setup.add_session_config_entry(key, value)
    try:
        if weights:
            setup.add_external_initializers(list(weights), list(weights.values()))
        return ort.InferenceSession(
            model.SerializeToString(),
            setup,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_SLOW_FUSIONS,
        )
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common base
        raise LoweringError(
            f"ONNX Runtime refuses the program: {_reason(error)}.",
            remedy="use the backend eager, or float32: ONNX Runtime lacks bfloat16 on a CPU.",
        ) from error


def weight_values(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> dict[str, ort.OrtValue]:
    """Return the tensors a model refers to, as ONNX Runtime sees them; nothing is copied.

    Raises:
        ArtefactError: The model refers to a tensor that is not there, or is of another size.
    """
    from .onnx_model import references
    from .onnx_rows import find

    values = {}
    for reference in references(model):
        tensor = find(tensors, reference.name)
        if tensor is None or not _fits(tensor, reference):
            raise ArtefactError(f"{MODEL_FILE} and the weights differ in {reference.name!r}.")
        values[reference.name] = _weight_value(tensor.detach().contiguous(), reference)
    return values


def _fits(tensor: Tensor, reference: onnx.TensorProto) -> bool:
    """Whether a reference has the shape of a tensor, or is of as many codes as its bytes hold."""
    packed = reference.data_type in _PACKED and tensor.dtype == torch.uint8
    dims = tuple(reference.dims)
    if packed:
        return len(dims) == 2 and min(dims) > 0 and -(-math.prod(dims) // 2) == tensor.numel()
    return dims == tuple(tensor.shape)


def _weight_value(tensor: Tensor, reference: onnx.TensorProto) -> ort.OrtValue:
    """Return one tensor, or the codes packed in it, as ONNX Runtime sees it."""
    import numpy as np
    import onnxruntime as ort

    if reference.data_type not in _PACKED:
        return ort.OrtValue.from_dlpack(tensor)
    # Two codes to a byte: numpy has no such type and only carries the address and the shape.
    shape = tuple(reference.dims)
    carrier = np.lib.stride_tricks.as_strided(tensor.numpy(), shape, (shape[1], 1))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(carrier, reference.data_type)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse option values this backend does not know.

    Raises:
        OptionError: Names the option and its values.
    """
    allowed = {
        "accuracy_level": (1, 4),
        "gelu_approximation": (False, True),
        "variant": (None, *VARIANTS),
    }
    for name, values in allowed.items():
        if name in options and options[name] not in values:
            listed = ", ".join(map(str, values))
            raise OptionError(f"onnxruntime: {name}={options[name]!r} is none of {listed}.")
    threads = options.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise OptionError(
            f"onnxruntime: threads={threads!r} is no number of threads; use 1 or more."
        )


def find_spec(name: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def _variants(model: onnx.ModelProto, program: Program) -> list[str]:
    """Return the variants worth measuring: one, unless there are weight-only codes."""
    codes = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    floats = sum(4 * math.prod(weights[name].dims) for name in codes if name in weights)
    if not floats:
        return ["codes"]
    return ["codes", "floats"] if floats < _free_memory() / 3 else ["codes"]


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _seconds(lowered: OnnxRuntimeLowered, inputs: Sequence[Tensor]) -> float:
    """Return the processor time of a call, the least of a few; infinite when it fails."""
    begin, least = time.perf_counter(), math.inf
    try:
        while time.perf_counter() < begin + _MEASURE_S:
            start = time.process_time()
            lowered.run(inputs)
            least = min(least, time.process_time() - start)
    except LoweringError:
        return math.inf
    return least


def _reason(error: Exception) -> str:
    """Return ONNX Runtime's message without its prefix and the paths of its sources."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.(cc|h|hpp):\d+ ?", "", str(error))
    return " ".join(text.split())[:300].rstrip(".")
