"""ONNX files of strangers: entries 31 to 50 of docs/bad-inputs.md."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from blockwright.backends.onnx_guard import LARGEST, load_onnx, read_onnx
from blockwright.ir.errors import ArtefactError

VALUES = np.arange(2, dtype=np.float32)
OPSET = [helper.make_opsetid("", 20)]


def value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(*nodes: onnx.NodeProto, **parts: Any) -> onnx.ModelProto:
    """Return `y = f(x)` on two floats."""
    opsets = [helper.make_opsetid(*o) for o in parts.pop("opsets", [("", 20)])]
    outputs = parts.pop("outputs", [value("y", 2)])
    graph = helper.make_graph(list(nodes), "g", [value("x", 2)], outputs, **parts)
    return helper.make_model(graph, opset_imports=opsets)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def stored(**fields: str) -> onnx.TensorProto:
    """Return a tensor of two floats that lies elsewhere."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in fields.items():
        tensor.external_data.add(key=key, value=text)
    return tensor


def adds(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model(node("Add", "x w", "y"), initializer=[tensor])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "secret", tmp_path / "in" / "w.bin"):
        path.write_bytes(VALUES.tobytes())
    return tmp_path / "in"


def refuse(folder: Path, proto: onnx.ModelProto | bytes, match: str) -> None:
    data = proto if isinstance(proto, bytes) else proto.SerializeToString()
    (folder / "m.onnx").write_bytes(data)
    with pytest.raises(ArtefactError, match=match) as caught:
        load_onnx(folder / "m.onnx")
    assert "m.onnx" in str(caught.value.where)


def test_data_beside_the_model_is_loaded(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "w.bin").write_bytes(bytes(4) + VALUES.tobytes())
    for fields in ({"location": "w.bin"}, {"location": "sub/w.bin", "offset": "4", "length": "8"}):
        (folder / "m.onnx").write_bytes(adds(stored(**fields)).SerializeToString())
        (tensor,) = load_onnx(folder / "m.onnx").graph.initializer
        assert onnx.numpy_helper.to_array(tensor).tolist() == [0, 1]


@pytest.mark.parametrize(
    "location",
    ["../secret", "sub/../../secret", "/etc/passwd", "C:\\secret", "..\\secret", "", ".", "a\0b"],
)
def test_data_elsewhere_is_refused(folder: Path, location: str) -> None:
    refuse(folder, adds(stored(location=location)), "not beside it|not an ordinary file")


def link_to(make: Callable[[Path, Path], Any]) -> Callable[[Path], None]:
    return lambda folder: make(folder / "odd", folder.parent / "secret")


@pytest.mark.parametrize(
    ("make", "location"),
    [
        (link_to(lambda new, old: new.symlink_to(old)), "odd"),
        (link_to(lambda new, old: new.symlink_to(old.parent)), "odd/secret"),
        (link_to(lambda new, old: new.hardlink_to(old)), "odd"),
        (lambda folder: os.mkfifo(folder / "odd"), "odd"),
        (lambda folder: (folder / "odd").mkdir(), "odd"),
        (lambda folder: None, "odd"),
    ],
    ids=["link", "link above", "hard link", "pipe", "folder", "missing"],
)
def test_data_that_is_no_file_of_its_own_is_refused(
    folder: Path, make: Callable[[Path], Any], location: str
) -> None:
    make(folder)
    refuse(folder, adds(stored(location=location)), "link|ordinary|not there")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "missing"])
@pytest.mark.timeout(10)
def test_the_model_itself_is_a_file(folder: Path, kind: str) -> None:
    path = folder / "m.onnx"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(folder / "w.bin")
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"offset": "4"}, "bytes 4 to 12 are not in w.bin of 8"),
        ({"offset": "9"}, "are not in w.bin"),
        ({"offset": "-1"}, "'-1', no number"),
        ({"offset": "0x8"}, "'0x8', no number"),
        ({"offset": "٣"}, "no number"),
        ({"offset": "1" * 30}, "no number"),
        ({"length": "4"}, "its length is 4 bytes, and its shape takes 8"),
        ({"length": str(2**60)}, "and its shape takes 8"),
        ({"__class__": "x"}, "has the key '__class__'"),
    ],
    ids=str,
)
def test_data_outside_of_the_file_is_refused(
    folder: Path, fields: dict[str, str], match: str
) -> None:
    refuse(folder, adds(stored(location="w.bin", **fields)), match)


def test_a_key_may_be_there_once(folder: Path) -> None:
    tensor = stored(location="w.bin")
    tensor.external_data.add(key="location", value="../secret")
    refuse(folder, adds(tensor), "has the key 'location'")


def test_sizes_are_checked_before_memory_is_taken(folder: Path) -> None:
    tensor = stored(location="w.bin", length=str(2**62))
    tensor.dims[:] = [2**30, 2**30]
    refuse(folder, adds(tensor), "are not in w.bin|its shape takes")
    tensor.dims[:] = [-2]
    refuse(folder, adds(tensor), "negative size")


def test_data_elsewhere_is_found_wherever_a_tensor_can_be(folder: Path) -> None:
    out = stored(location="../secret")
    sparse = helper.make_sparse_tensor(
        out, helper.make_tensor("i", TensorProto.INT64, [2], [0, 1]), [2]
    )
    refuse(folder, model(node("Relu", "x", "y"), sparse_initializer=[sparse]), "not beside it")
    refuse(folder, model(node("Constant", "", "y", value=out)), "not beside it")
    inner = helper.make_graph([node("Constant", "", "z", value=out)], "i", [], [value("z", 2)])
    condition = node(
        "Constant", "", "c", value=helper.make_tensor("c", TensorProto.BOOL, [], [True])
    )
    branch = node("If", "c", "y", then_branch=inner, else_branch=inner)
    refuse(folder, model(condition, branch), "not beside it")
    inside = helper.make_function(
        "own", "F", ["a"], ["b"], [node("Constant", "", "b", value=out)], OPSET
    )
    proto = model(node("Relu", "x", "y"))
    proto.functions.append(inside)
    refuse(folder, proto, "not beside it")


def test_endless_nesting_is_refused(folder: Path) -> None:
    def field(number: int, data: bytes) -> bytes:
        size, varint = len(data), b""
        while size > 127:
            varint, size = varint + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + varint + bytes([size]) + data

    data = b""
    for _ in range(5000):
        data = field(1, field(5, field(6, data)))  # a graph's node's attribute, which is a graph
    refuse(folder, field(7, data), "it is no ONNX model")
    refuse(folder, b"", "m.onnx is refused")
    refuse(folder, b"\x80\x04cposix\nsystem\n.", "it is no ONNX model")


def test_a_model_larger_than_a_message_says_what_to_do(folder: Path) -> None:
    with (folder / "m.onnx").open("wb") as file:
        file.truncate(LARGEST + 1)  # takes no room on the disk
    with pytest.raises(ArtefactError, match="export it with external data"):
        read_onnx(folder / "m.onnx")


W = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
LYING = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
LYING.dims[0] = 3


@pytest.mark.parametrize(
    ("proto", "match"),
    [
        (model(node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "a", "y")), "sorted"),
        (model(node("Add", "x ghost", "y")), "'ghost'"),
        (model(node("Relu", "x", "y"), node("Relu", "x", "y")), "'y' has been used"),
        (model(node("Relu", "x", "a", name="n"), node("Relu", "a", "y", name="n")), "one name"),
        (model(node("Add", "x w", "y"), initializer=[W, W]), "not unique"),
        (model(node("Relu", "x", "y"), opsets=[("", 99)]), "opset 99"),
        (model(node("F", "x", "y", domain="evil.org"), opsets=[("", 20), ("evil.org", 1)]),
         "domain 'evil.org'"),
        (model(node("Ghost", "x", "y")), "No Op registered for Ghost"),
        (model(node("Relu", "x", "y"), outputs=[value("y", 3)]), "shape differ"),
        (model(node("Add", "x w", "y"), initializer=[LYING]), "too small for the declared shape"),
    ],
    ids=[
        "cycle", "undefined", "twice", "names", "weights", "opset", "domain", "op", "shape", "data",
    ],
)  # fmt: skip
def test_unsound_graphs_are_refused(folder: Path, proto: onnx.ModelProto, match: str) -> None:
    refuse(folder, proto, match)


def test_branches_and_own_functions_are_welcome(folder: Path) -> None:
    inner = helper.make_graph([node("Relu", "x", "z")], "i", [], [value("z", 2)])
    condition = node(
        "Constant", "", "c", value=helper.make_tensor("c", TensorProto.BOOL, [], [True])
    )
    branch = node("If", "c", "y", then_branch=inner, else_branch=inner)
    function = helper.make_function("own", "F", ["a"], ["b"], [node("Relu", "a", "b")], OPSET)
    call = model(node("F", "x", "y", domain="own")).graph
    own = [*OPSET, helper.make_opsetid("own", 1)]
    for proto in (
        model(condition, branch),
        helper.make_model(call, opset_imports=own, functions=[function]),
    ):
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        assert read_onnx(folder / "m.onnx") == proto
