"""Graphs made by others against the model: right ones pass, and of wrong ones the node is named."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from typer.testing import CliRunner

import blockwright as bw
from blockwright.driver.cli import app
from blockwright.driver.fingerprint import Index, fingerprint
from blockwright.ir.errors import ArtefactError, OptionError
from blockwright.ir.program import Program

DIM, HEADS, WINDOW, SCALE, CAP = 16, 2, 4, 0.2, 5.0


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Causal window, capped scores, a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(DIM, DIM, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (
            layer(x).view(batch, seq, HEADS, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) * SCALE
        scores = torch.tanh(scores / CAP) * CAP
        query, key = torch.arange(seq)[:, None], torch.arange(seq)[None]
        seen = (key <= query) & (key > query - WINDOW)
        heads = torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ v
        return self.o(heads.transpose(1, 2).reshape(batch, seq, DIM))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 24, bias=False)
        self.up = nn.Linear(DIM, 24, bias=False)
        self.down = nn.Linear(24, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ffn = (
            RMSNorm(), Attention(), RMSNorm(), FeedForward(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, DIM)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(DIM, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1)),)


def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.4)
    return model


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder()


@pytest.fixture(scope="module")
def exported(model: Decoder) -> onnx.ModelProto:
    program = torch.onnx.export(
        model, model.example_inputs(), dynamo=True, verbose=False, opset_version=20,
        dynamic_shapes=({0: "batch", 1: "seq"},),
    )  # fmt: skip
    assert program is not None
    return program.model_proto


@pytest.fixture(scope="module")
def captured(model: Decoder) -> Program:
    sizes = {0: Dim("batch", min=1), 1: Dim("seq", min=1)}
    return bw.capture(model, model.example_inputs(), dynamic_shapes=(sizes,))


def nodes(proto: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == op]


def reader(proto: onnx.ModelProto, value: str) -> onnx.NodeProto:
    (found,) = [node for node in proto.graph.node if value in node.input]
    return found


def constant(proto: onnx.ModelProto, node: onnx.NodeProto, place: int, number: float) -> None:
    """Give one node another number than the constant it shares with others."""
    name = f"{node.name}_number"
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(number), name))
    node.input[place] = name


def drop_window(proto: onnx.ModelProto) -> str:
    node = nodes(proto, "And")[0]
    node.input[1] = node.input[0]  # what is left, causality alone, is a value of the model too
    return next(n for n in nodes(proto, "Where") if n.input[0] == _not(proto, node)).name


def _not(proto: onnx.ModelProto, node: onnx.NodeProto) -> str:
    return str(reader(proto, node.output[0]).output[0])


def widen_window(proto: onnx.ModelProto) -> str:
    node = nodes(proto, "Sub")[0]
    name = f"{node.name}_number"
    proto.graph.initializer.append(numpy_helper.from_array(np.int64(WINDOW + 2), name))
    node.input[1] = name
    return nodes(proto, "Greater")[0].name


def scores_of(proto: onnx.ModelProto) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]:
    """Return the nodes that scale, divide and multiply the scores of the second block."""
    tanh = nodes(proto, "Tanh")[1]
    (divide,) = [n for n in proto.graph.node if tanh.input[0] in n.output]
    (scale,) = [n for n in proto.graph.node if divide.input[0] in n.output]
    return scale, divide, reader(proto, tanh.output[0])


def change_scale(proto: onnx.ModelProto) -> str:
    scale, *_ = scores_of(proto)
    constant(proto, scale, 1, 0.3)
    return scale.name


def drop_softcap(proto: onnx.ModelProto) -> str:
    _, divide, multiply = scores_of(proto)
    node = reader(proto, multiply.output[0])
    place = list(node.input).index(multiply.output[0])
    node.input[place] = divide.input[0]
    return node.name


def swap_gate_and_up(proto: onnx.ModelProto) -> str:
    node = nodes(proto, "Sigmoid")[1]
    (gate,) = [n for n in proto.graph.node if node.input[0] in n.output]
    (up,) = [
        n for n in nodes(proto, "MatMul") if n.input[0] == gate.input[0] and n.name != gate.name
    ]
    gate.input[1], up.input[1] = up.input[1], gate.input[1]
    return node.name


def change_eps(proto: onnx.ModelProto) -> str:
    node = next(n for n in nodes(proto, "Add") if "1e-06" in str(_number(proto, n.input[1])))
    constant(proto, node, 1, 1e-3)
    return node.name


def transpose_weight(proto: onnx.ModelProto) -> str:
    squares = {w.name: w for w in proto.graph.initializer if list(w.dims) == [DIM, DIM]}
    node = [n for n in nodes(proto, "MatMul") if n.input[1] in squares][-1]
    weight = squares[node.input[1]]
    turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
    weight.CopyFrom(numpy_helper.from_array(turned, weight.name))
    return node.name


def _number(proto: onnx.ModelProto, name: str) -> Any:
    weights = {w.name: w for w in proto.graph.initializer}
    return numpy_helper.to_array(weights[name]) if name in weights else ""


FAULTS = [
    (drop_window, "attention blocks.0.attn", {"window": WINDOW}),
    (widen_window, "attention blocks.0.attn", {"window": WINDOW}),
    (change_scale, "attention blocks.1.attn", {"scale": pytest.approx(SCALE)}),
    (drop_softcap, "attention blocks.1.attn", {"softcap": CAP}),
    (swap_gate_and_up, "feed-forward blocks.1.ffn", {"activation": "silu"}),
    (change_eps, "norm blocks.0.norm1", {"eps": pytest.approx(1e-6)}),
    (transpose_weight, "attention blocks.1.attn", {"heads": HEADS}),
]  # fmt: skip


def test_a_right_graph_passes_at_every_size(
    model: Decoder, captured: Program, exported: onnx.ModelProto
) -> None:
    found = bw.verify(captured, exported, model.example_inputs())
    assert found.ok, found.shapes
    assert found.suspects == ()
    tried = [dict(shape.sizes) for shape in found.shapes]
    assert {sizes["batch"] for sizes in tried} == {1, 2, 3}
    assert {sizes["seq"] for sizes in tried} == {1, 9, 18}
    assert json.loads(json.dumps(found.to_json()))["ok"] is True


def test_a_module_is_captured_again_at_other_sizes(
    model: Decoder, exported: onnx.ModelProto
) -> None:
    found = bw.verify(model, exported, model.example_inputs(), sizes=[{"batch": 1, "seq": 6}])
    assert found.ok
    assert [shape.sizes for shape in found.shapes] == [{"batch": 1, "seq": 6}]


@pytest.mark.parametrize(
    ("plant", "region", "constants"), FAULTS, ids=[plant.__name__ for plant, *_ in FAULTS]
)
def test_the_node_of_a_planted_fault_is_named(
    model: Decoder,
    captured: Program,
    exported: onnx.ModelProto,
    plant: Callable[[onnx.ModelProto], str],
    region: str,
    constants: dict[str, Any],
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    name = plant(proto)
    found = bw.verify(captured, proto, model.example_inputs(), sizes=[{"batch": 1}])
    assert not found.ok
    (suspect,) = found.suspects
    assert suspect.node == name
    assert suspect.region == region
    assert {key: suspect.constants[key] for key in constants} == constants


def test_a_graph_that_does_not_run_is_a_finding(
    model: Decoder, captured: Program, exported: onnx.ModelProto
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    node = nodes(proto, "MatMul")[-1]
    node.input[1] = "embed.weight"  # [32, 16] in the place of [16, 32]
    found = bw.verify(captured, proto, model.example_inputs(), sizes=[{"batch": 2}])
    assert not found.ok
    assert found.shapes[0].failure is not None
    (suspect,) = found.suspects
    assert (suspect.node, suspect.op) == (node.name, "MatMul")
    assert suspect.hints == (found.shapes[0].failure,)


def test_the_graph_before_the_rewrite_names_values(
    model: Decoder, captured: Program, exported: onnx.ModelProto, tmp_path: Path
) -> None:
    onnx.save(exported, tmp_path / "before.onnx")
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    gate = nodes(proto, "MatMul")
    swap_gate_and_up(proto)
    found = bw.verify(
        captured, proto, model.example_inputs(), sizes=[{"batch": 1}],
        against=tmp_path / "before.onnx",
    )  # fmt: skip
    # By numbers alone the swapped products are right: the model has both.
    assert found.suspects[0].op == "MatMul"
    assert found.suspects[0].node in [node.name for node in gate]
    assert found.suspects[0].region == "feed-forward blocks.1.ffn"


def test_an_exported_program_is_checked_and_located(model: Decoder, captured: Program) -> None:
    other = decoder()
    right = torch.export.export(other, model.example_inputs())
    assert bw.verify(captured, right, model.example_inputs()).ok
    with torch.no_grad():
        other.blocks[1].ffn.down.weight.mul_(1.01)
    wrong = torch.export.export(other, model.example_inputs())
    (suspect,) = bw.verify(captured, wrong, model.example_inputs()).suspects
    assert suspect.region == "feed-forward blocks.1.ffn"
    assert "blocks.1.ffn.down" in suspect.node


def test_a_callable_and_an_engine_are_compared(model: Decoder, captured: Program) -> None:
    assert bw.verify(captured, model, model.example_inputs()).ok
    engine = bw.compile(captured, "fuse-projections", model.example_inputs(), backend="eager")
    assert bw.verify(captured, engine, model.example_inputs()).ok
    found = bw.verify(captured, lambda ids: model(ids) + 1e-3, model.example_inputs())
    assert not found.ok
    assert "shows no values" in found.notes[0]


def test_what_cannot_be_compared_is_refused(
    model: Decoder, captured: Program, exported: onnx.ModelProto, tmp_path: Path
) -> None:
    example = model.example_inputs()
    with pytest.raises(OptionError, match="cannot verify a int"):
        bw.verify(captured, 3, example)
    with pytest.raises(OptionError, match="there is no file"):
        bw.verify(captured, tmp_path / "none.onnx", example)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ArtefactError, match="no ONNX model"):
        bw.verify(captured, tmp_path / "bad.onnx", example)
    (tmp_path / "a.pt2").write_bytes(b"")
    with pytest.raises(OptionError, match="can run code"):
        bw.verify(captured, tmp_path / "a.pt2", example)
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(OptionError, match=r"'ids' is float32\[batch, seq\] in the graph"):
        bw.verify(captured, proto, example)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("x", 1, [1]))
    with pytest.raises(OptionError, match=r"the model \['ids'\]"):
        bw.verify(captured, proto, example)


def test_numbers_are_recognised_in_any_layout_and_masks_in_any_type() -> None:
    value = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    index: Index[str] = Index()
    index.add("value", value, 1e-6)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    index.add("mask", mask, 1e-6)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~mask, -math.inf)

    def found(tensor: Tensor) -> list[str]:
        print_ = fingerprint(tensor)
        assert print_ is not None
        return index.find(print_)

    assert found(value.T.reshape(3, 8) * (1 + 1e-8)) == ["value"]
    assert found(value * 1.01) == []
    assert found(added) == ["mask"]
    assert found(mask.triu()) == []
    assert fingerprint(torch.arange(20)) is None


@pytest.mark.parametrize("order", [("model", "file"), ("file", "model")])
def test_the_command_names_the_node_and_fails(
    exported: onnx.ModelProto, tmp_path: Path, order: tuple[str, str]
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    name = change_scale(proto)
    onnx.save(proto, tmp_path / "wrong.onnx")
    words = {"model": f"{__file__}:decoder", "file": str(tmp_path / "wrong.onnx")}
    result = CliRunner().invoke(app, ["verify", *(words[word] for word in order)])
    assert result.exit_code == 1, result.output
    assert name in result.output
    assert "attention blocks.1.attn" in result.output


@pytest.fixture(scope="module")
def fusions() -> Any:
    """The example, as a module."""
    pytest.importorskip("transformers")
    path = Path(__file__).parents[2] / "examples" / "check_ort_fusions.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "op", "hint"),
    [
        ("mistral", "GroupQueryAttention",
         f"local_window_size is left out; the model has window {WINDOW}"),
        ("granite", "GroupQueryAttention", "scale is left out; the model has scale 0.2"),
        ("phi", "RotaryEmbedding", ""),
    ],
)  # fmt: skip
def test_a_fusion_that_drops_a_constant_is_found(
    fusions: Any, tmp_path: Path, family: str, op: str, hint: str
) -> None:
    checked = fusions.check(family, tmp_path)
    assert checked.before.ok
    first, _ = checked.after.shapes
    assert first.wrong[0] == "0"
    suspect = checked.after.suspects[0]
    assert suspect.op == op
    assert suspect.region.startswith("attention model.model.layers.1")
    assert hint in (*suspect.hints, "")


@pytest.mark.slow
def test_a_fused_decoder_that_runs_at_batch_1_only_is_found(fusions: Any, tmp_path: Path) -> None:
    checked = fusions.check("llama", tmp_path)
    assert checked.before.ok
    first, second = checked.after.shapes
    assert first.ok
    assert "batch_size must be 1" in second.failure
    assert [suspect.op for suspect in checked.after.suspects] == ["GroupQueryAttention"]


@pytest.mark.slow
def test_a_fused_decoder_that_does_not_load_is_found(fusions: Any, tmp_path: Path) -> None:
    checked = fusions.check("gpt2", tmp_path)
    assert checked.before.ok
    assert [suspect.op for suspect in checked.after.suspects] == ["Gemm"]


@pytest.mark.slow
def test_a_decoder_as_transformers_spells_it_now_is_right(fusions: Any, tmp_path: Path) -> None:
    checked = fusions.check("llama", tmp_path, native=True)
    assert checked.before.ok
    assert checked.after.ok
    assert "gqa" not in checked.fusions
