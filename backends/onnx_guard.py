"""Read an ONNX file that a stranger wrote, and hand on only what its bytes can keep.

ONNX and ONNX Runtime open whatever file a model names, allocate what it declares, and load any
library of custom ops they know. Everything is checked here first, on the parsed message alone:

    file        one ordinary file below 2 GiB
    external    relative names beside it, no link, bytes within the file, as many as the shape takes
    graph       sorted, every name defined once, opsets and domains known, shapes as declared
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Final

from ..ir.errors import ArtefactError
from . import disk

if TYPE_CHECKING:
    import onnx

LARGEST: Final = 2**31 - 1  # protobuf reads no larger message
DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_KEYS = frozenset({"location", "offset", "length", "checksum"})
_NUMBERS = frozenset({"offset", "length"})


def load_onnx(path: Path, *, graph: bool = True) -> onnx.ModelProto:
    """Return a model with its weights, those in files beside it included.

    Args:
        path: An ONNX file.
        graph: As in `read_onnx`.

    Raises:
        ArtefactError: As `read_onnx`.
    """
    from onnx.external_data_helper import load_external_data_for_model

    model = read_onnx(path, graph=graph)
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # onnx checks once more, and has no common base
        raise _refused(path, _line(error)) from error
    return model


def read_onnx(path: Path, *, graph: bool = True) -> onnx.ModelProto:
    """Return a model whose external data, if any, may safely be loaded from beside it.

    Args:
        path: An ONNX file.
        graph: Check the graph as well. Who only wants to know what a runtime makes of it leaves
            that to the runtime, which may know more operators than the standard has.

    Raises:
        ArtefactError: It is no sound model, or asks for what a file of data may not ask for.
    """
    import onnx

    model, content = onnx.ModelProto(), _content(path)
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf has no public base class
        raise _refused(path, f"it is no ONNX model: {_line(error)}") from error
    inside = (_of_nodes(function.node) for function in model.functions)
    for tensor in itertools.chain(_tensors(model.graph), *inside):
        _check_tensor(path, tensor)
    _check_opsets(path, model)
    if graph:
        _check_graph(path, model)
    return model


def _content(path: Path) -> bytes:
    """Return a file's bytes."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise _refused(
                path,
                f"it has {size} bytes, and protobuf reads no more than {LARGEST}",
                remedy="export it with external data: weights in a file of their own.",
            )
        return b"".join(disk.read_chunks(path))
    except OSError as error:
        raise _refused(path, f"it cannot be read: {error.strerror or error}") from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a graph; protobuf has seen to it that graphs nest no deeper than 33."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    """Refuse a tensor whose data is elsewhere than it may be, or not as large as it says."""
    import onnx

    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if any(size < 0 for size in tensor.dims):
        raise _refused(path, "it has a negative size", tensor)
    if not external and not tensor.external_data:
        return
    keys = [entry.key for entry in tensor.external_data]
    for key in keys:
        if key not in _KEYS or keys.count(key) > 1:
            raise _refused(path, f"its external data has the key {key[:40]!r}", tensor)
    fields = {entry.key: entry.value for entry in tensor.external_data}
    place = _beside(path, fields.get("location", ""), tensor)
    _check_span(path, fields, place, tensor)


def _beside(path: Path, location: str, tensor: onnx.TensorProto) -> Path:
    """Return the file a location names: an ordinary one below the model's folder."""
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    parts = posix.parts
    plain = location.isprintable() and "\\" not in location and not windows.drive
    if not parts or posix.is_absolute() or ".." in parts or not plain:
        raise _refused(path, f"it names the file {location[:80]!r}, which is not beside it", tensor)
    place = path.parent
    for part in parts:
        place = place / part
        if place.is_symlink():
            raise _refused(path, f"it names {location[:80]!r}, which goes through a link", tensor)
    try:
        status = os.lstat(place)
    except OSError as error:
        raise _refused(path, f"the file {location[:80]!r} is not there", tensor) from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise _refused(path, f"{location[:80]!r} is not an ordinary file with one name", tensor)
    return place


def _check_span(
    path: Path, fields: Mapping[str, str], place: Path, tensor: onnx.TensorProto
) -> None:
    """Refuse bytes outside of the file, and a length that is not the tensor's."""
    size = place.stat().st_size
    numbers = {}
    for key in _NUMBERS & fields.keys():
        text = fields[key]
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _refused(path, f"its {key} is {text[:40]!r}, no number of bytes", tensor)
        numbers[key] = int(text)
    offset, needed = numbers.get("offset", 0), _bytes(path, tensor)
    length = numbers.get("length", needed)
    if length != needed:
        raise _refused(path, f"its length is {length} bytes, and its shape takes {needed}", tensor)
    if offset + length > size:
        raise _refused(
            path, f"bytes {offset} to {offset + length} are not in {place.name} of {size}", tensor
        )


def _bytes(path: Path, tensor: onnx.TensorProto) -> int:
    """Return how many bytes a tensor takes."""
    import onnx

    kinds = onnx.TensorProto
    bits = {getattr(kinds, name, None): width for name, width in _NARROW.items()}
    count = math.prod(tensor.dims)
    if tensor.data_type in bits:
        return -(-count * bits[tensor.data_type] // 8)
    try:
        return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError) as error:
        raise _refused(path, f"its type is {tensor.data_type}, which is none", tensor) from error


_NARROW = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}


def _check_opsets(path: Path, model: onnx.ModelProto) -> None:
    """Refuse versions and domains that are unknown here, by name."""
    import onnx

    for opset in model.opset_import:
        name = opset.domain or "ai.onnx"
        if opset.domain not in DOMAINS and not _defined(model, opset.domain):
            raise _refused(
                path,
                f"it uses operators of the domain {name[:80]!r}, which are code of their own",
                remedy="export it with standard operators only.",
            )
        newest = onnx.defs.onnx_opset_version()
        if opset.domain in ("", "ai.onnx") and not 1 <= opset.version <= newest:
            raise _refused(
                path,
                f"it is of opset {opset.version}, and this onnx knows 1 to {newest}",
                remedy="install a newer onnx, or export it for an older opset.",
            )


def _defined(model: onnx.ModelProto, domain: str) -> bool:
    """Whether every operator of a domain is a function the model brings along."""
    own = {function.name for function in model.functions if function.domain == domain}
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    return {node.op_type for node in nodes if node.domain == domain} <= own


def _check_graph(path: Path, model: onnx.ModelProto) -> None:
    """Refuse cycles, names that are undefined or defined twice, and shapes that are not true."""
    import onnx

    names = [node.name for node in model.graph.node if node.name]
    if len(set(names)) != len(names):
        raise _refused(path, "two of its nodes have one name")
    try:
        # By path, the checker would look for external data itself; it has been looked at.
        onnx.checker.check_model(_without_external(model), full_check=True)
    except Exception as error:  # ValidationError, InferenceError, and protobuf's own
        raise _refused(path, _line(error)) from error


def _without_external(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with external initializers as inputs, for checks of structure."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.initializer[:]
    known = {value.name for value in copy.graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in known:
            kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            copy.graph.input.append(kind)
            known.add(tensor.name)
    return copy


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _refused(
    path: Path, reason: str, tensor: onnx.TensorProto | None = None, remedy: str | None = None
) -> ArtefactError:
    where = f"{path}, tensor {tensor.name[:80]!r}" if tensor is not None else str(path)
    return ArtefactError(
        f"{path.name} is refused: {reason}.",
        where=where,
        remedy=remedy or "export the model again, or take it from where it was first published.",
    )
