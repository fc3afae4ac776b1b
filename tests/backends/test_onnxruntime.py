"""ONNX Runtime gives the numbers of the reference, for every shape, and keeps weights once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from blockwright.backends.base import Lowered, WeightsFile
from blockwright.backends.onnxruntime import (
    MODEL_FILE,
    VARIANTS,
    OnnxRuntimeBackend,
    OnnxRuntimeLowered,
)
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError, LoweringError, OptionError
from blockwright.ir.ops.packing import pack_nibbles
from blockwright.ir.program import Program
from blockwright.ir.run import run

BACKEND = OnnxRuntimeBackend()
OPS = torch.ops.blockwright
THREADS = {"threads": 1}
BATCH, SEQ = Dim("batch", min=1, max=64), Dim("seq", min=1, max=64)


def lower(program: Program, **options: Any) -> OnnxRuntimeLowered:
    lowered = BACKEND.lower(program, THREADS | options)
    assert isinstance(lowered, OnnxRuntimeLowered)
    return lowered


def assert_parity(
    program: Program, lowered: Lowered, *inputs: Tensor, dtype: torch.dtype = torch.float64
) -> None:
    """Compare with the reference, computed in double precision."""
    expected, rtol = run(program, inputs, dtype=dtype), 1e-5
    for got, want in zip(lowered.run(list(inputs)), expected, strict=True):
        assert got.shape == want.shape
        want = want.double()
        scale = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * scale)


class Mixer(nn.Module):
    """What a small language model has: tied embeddings, masked, causal and grouped attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.tokens.weight
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor, *, keep: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.tokens(ids))
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).split([8, 8], dim=-1)
        k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (k, v))
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        masked = F.scaled_dot_product_attention(
            q, k, v, keep[:, None, None, :], scale=0.3, enable_gqa=True
        )
        y = (causal + masked).transpose(1, 2).flatten(2)
        return self.head(F.gelu(y)), keep


@pytest.fixture(scope="module")
def mixer() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (2, 5))
    shape = {0: BATCH, 1: SEQ}
    return capture(
        Mixer(),
        {"ids": ids, "keep": torch.ones(2, 5, dtype=torch.bool)},
        dynamic_shapes={"ids": shape, "keep": shape},
    )


@pytest.fixture(scope="module")
def lowered_mixer(mixer: Program) -> OnnxRuntimeLowered:
    return lower(mixer)


@pytest.mark.parametrize(("batch", "seq"), [(2, 5), (1, 1), (1, 7), (3, 1), (4, 64)])
def test_attention_at_any_size(
    mixer: Program, lowered_mixer: OnnxRuntimeLowered, batch: int, seq: int
) -> None:
    ids = torch.randint(0, 40, (batch, seq))
    keep = torch.rand(batch, seq) > 0.4
    keep[:, 0] = True
    assert_parity(mixer, lowered_mixer, ids, keep)


def test_the_model_is_clean(lowered_mixer: OnnxRuntimeLowered) -> None:
    model = lowered_mixer.model
    assert not [
        text for text in (b"/home", b".py", b"stack_trace") if text in model.SerializeToString()
    ]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    dims = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "seq"]
    assert "Attention" in {node.op_type for node in model.graph.node}


def test_tied_weights_are_stored_once(mixer: Program, lowered_mixer: OnnxRuntimeLowered) -> None:
    names = [tensor.name for tensor in lowered_mixer.model.graph.initializer]
    assert names.count("tokens.weight") == 1
    assert "head.weight" not in names
    tied = next(t for t in lowered_mixer.model.graph.initializer if t.name == "tokens.weight")
    assert tied.data_location == onnx.TensorProto.EXTERNAL
    assert not tied.raw_data


def test_files_bring_it_back(
    mixer: Program, lowered_mixer: OnnxRuntimeLowered, tmp_path: Path
) -> None:
    weights = write_weights(mixer, tmp_path)
    model = save(lowered_mixer, weights, tmp_path)
    ids, keep = torch.randint(0, 40, (3, 4)), torch.ones(3, 4, dtype=torch.bool)
    first = lowered_mixer.run([ids, keep])
    restored = BACKEND.restore(mixer, {MODEL_FILE: tmp_path / MODEL_FILE}, {}, THREADS)
    assert all(torch.equal(a, b) for a, b in zip(first, restored.run([ids, keep]), strict=True))
    assert restored.files(weights).portable[MODEL_FILE] == model
    plain = ort.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
    (logits, *_) = plain.run(None, {"ids": ids.numpy(), "keep": keep.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), first[0])


def test_a_program_of_folded_blocks(program: Program) -> None:
    lowered = lower(program)
    for batch in (1, 2, 5):
        assert_parity(program, lowered, torch.randint(0, 32, (batch, 8)))


class Weighted(nn.Module):
    """Weight-only layers of every storage, one after the other on the same input."""

    LAYOUTS = (
        (8, 40, True), (8, 40, False), (8, 16, True), (8, 7, False),
        (4, 16, True), (4, 16, False), (4, 40, True), (4, 32, True), (4, 7, False),
    )  # fmt: skip

    def __init__(self, features: int) -> None:
        super().__init__()
        for index, (bits, group, symmetric) in enumerate(self.LAYOUTS):
            low, high = (-7, 8) if symmetric else (0, 16)
            codes = torch.randint(low, high, (40, features), dtype=torch.int16)
            zeros = torch.randint(low, high, (-(-40 // group), features), dtype=torch.int16)
            self.register_buffer(f"codes{index}", stored(codes, bits, symmetric))
            self.register_buffer(f"scale{index}", torch.rand(zeros.shape) + 0.1)
            if not symmetric:
                self.register_buffer(f"zero{index}", stored(zeros, bits, False))
        self.bias = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            OPS.quantized_linear(
                x,
                getattr(self, f"codes{index}"),
                getattr(self, f"scale{index}"),
                getattr(self, f"zero{index}", None),
                self.bias if index % 2 else None,
                bits,
                group,
            )
            for index, (bits, group, _) in enumerate(self.LAYOUTS)
        ]


def stored(codes: Tensor, bits: int, symmetric: bool) -> Tensor:
    return pack_nibbles(codes) if bits == 4 else codes.to(torch.int8 if symmetric else torch.uint8)


@pytest.mark.parametrize("features", [24, 15])
def test_weight_only_codes_of_every_layout(features: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(Weighted(features), (torch.randn(3, 40),), dynamic_shapes=({0: BATCH},))
    lowered = lower(program)
    (variant,) = VARIANTS.keys() - {lowered.variant}
    other = OnnxRuntimeLowered(lowered.model, program, variant, THREADS)
    save(lowered, write_weights(program, tmp_path), tmp_path)
    restored = BACKEND.restore(program, {MODEL_FILE: tmp_path / MODEL_FILE}, {}, THREADS)
    assert isinstance(restored, OnnxRuntimeLowered)
    assert restored.variant == lowered.variant
    for rows in (1, 3, 64):
        for engine in (lowered, other, restored):
            assert_parity(program, engine, torch.randn(rows, 40))


def test_a_model_file_of_other_weights_is_refused(
    mixer: Program, lowered_mixer: OnnxRuntimeLowered, tmp_path: Path
) -> None:
    path = tmp_path / MODEL_FILE
    path.write_bytes(b"no model")
    with pytest.raises(ArtefactError, match=r"model\.onnx is no ONNX model"):
        BACKEND.restore(mixer, {MODEL_FILE: path}, {}, THREADS)
    save(lowered_mixer, write_weights(mixer, tmp_path), tmp_path)
    wider = dict(mixer.tensors) | {"tokens.weight": torch.zeros(41, 16)}
    with pytest.raises(ArtefactError, match=r"differ in 'tokens\.weight'"):
        BACKEND.restore(mixer.with_(tensors=wider), {MODEL_FILE: path}, {}, THREADS)


class Integers(nn.Module):
    """A quantized table, and two integer layers that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(-127, 128, (30, 24), dtype=torch.int8))
        self.register_buffer("table_scale", torch.rand(30, 1))
        for name in ("a", "b"):
            self.register_buffer(name, torch.randint(-63, 64, (24, 10), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(10))
        self.bias = nn.Parameter(torch.randn(10))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = OPS.quantized_embedding(ids, self.table, self.table_scale)
        x = x * (ids > 0)[..., None]  # row 0 becomes all zeros
        a = OPS.int8_linear(x, self.a, self.scale, self.bias)
        return x, a, OPS.int8_linear(x, self.b, self.scale, None)


def test_integer_layers_and_tables() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (2, 3))
    program = capture(Integers(), (ids,), dynamic_shapes=({0: BATCH, 1: SEQ},))
    lowered = lower(program)
    ops = [node.op_type for node in lowered.model.graph.node]
    assert ops.count("QuantizeLinear") == 1  # both layers share the quantized rows
    for shape in ((2, 3), (1, 1), (5, 9), (1, 0)):
        ids = torch.randint(0, 30, shape)
        assert_parity(program, lowered, ids, dtype=torch.float32)  # where rounding ties break alike


class Odd(nn.Module):
    """Inputs and outputs of many kinds."""

    def forward(self, x: Tensor, flag: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        mask = torch.zeros(3, 5).masked_fill(flag, -1e4)
        q = x.reshape(1, 1, 3, 4)
        memory = torch.cat([x, x[:2]]).reshape(1, 1, 5, 4)
        y = F.scaled_dot_product_attention(q, memory, memory, mask)
        causal = F.scaled_dot_product_attention(q, memory, memory, is_causal=True)
        return x, y, y, causal, count + 1, flag.any(), x[:0], *x.split(3, dim=-1)


def test_kinds_of_inputs_and_outputs() -> None:
    inputs = (torch.randn(4, 3).t(), torch.rand(3, 5) > 0.6, torch.tensor(3))
    program = capture(Odd(), inputs)
    assert_parity(program, lower(program), *inputs)


def test_calls_share_a_session(lowered_mixer: OnnxRuntimeLowered) -> None:
    keep = torch.ones(1, 6, dtype=torch.bool)
    inputs = [torch.full((1, 6), token) for token in range(32)]
    alone = [lowered_mixer.run([ids, keep])[0] for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids: lowered_mixer.run([ids, keep])[0], inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_what_it_cannot_run_is_named() -> None:
    class Complex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x @ x.T)

    with pytest.raises(LoweringError, match=r"cannot lower aten\._linalg_eigh"):
        lower(capture(Complex(), (torch.randn(3, 3),)))
    linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    with pytest.raises(LoweringError, match="bfloat16"):
        lower(capture(linear, (torch.randn(2, 4, dtype=torch.bfloat16),)))


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"accuracy_level": 3}, {"variant": "fast"}], ids=str
)
def test_options_are_checked(program: Program, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        BACKEND.lower(program, options)


def save(lowered: Lowered, weights: WeightsFile, folder: Path) -> bytes:
    """Write and return the model file of a lowered program."""
    content = lowered.files(weights).portable[MODEL_FILE]
    assert isinstance(content, bytes)
    (folder / MODEL_FILE).write_bytes(content)
    return content


def write_weights(program: Program, folder: Path) -> WeightsFile:
    """Write the tensors one after the other, as an artefact does."""
    spans, content = {}, bytearray(64)
    for name, tensor in program.tensors.items():
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        spans[name] = (len(content), len(data))
        content += data + bytes(-len(data) % 64)
    (folder / "weights.safetensors").write_bytes(content)
    return WeightsFile("weights.safetensors", spans)
