"""Blocks: each skeleton that transformers are built in, as one or two small modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.recognize import Block
from blockwright.ir.run import run

DIM = 8
X = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(3))
CONTEXT = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(4))
CONDITION = torch.randn(2, DIM, generator=torch.Generator().manual_seed(5))
IMAGE = torch.randn(2, DIM, 4, 4, generator=torch.Generator().manual_seed(6))


class Parts(nn.Module):
    """Layers that the blocks below are made of."""

    def __init__(self, dim: int = DIM, heads: int = 2, ffn_dim: int = 12) -> None:
        super().__init__()
        self.width = dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.q2, self.k2, self.v2, self.o2 = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.up2, self.down2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.a, self.b, self.c, self.d = (nn.LayerNorm(dim) for _ in range(4))
        self.scale, self.scale2 = nn.Parameter(torch.rand(dim)), nn.Parameter(torch.rand(dim))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def attention(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = self.heads(self.q(x)), self.heads(self.k(source)), self.heads(self.v(source))
        y: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y

    def ffn(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Pre(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.a(x))
        return x + self.ffn(self.b(x))


class Post(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x + self.attention(x))
        y: Tensor = self.b(x + self.ffn(x))
        return y


class Sandwich(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(self.attention(self.a(x)))
        return x + self.d(self.ffn(self.c(x)))


class Branch(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.attention(x))
        return x + self.b(self.ffn(x))


class ParallelOneNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return x + self.attention(y) + self.ffn(y)


class ParallelTwoNorms(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.b(x)) + self.attention(self.a(x)) + x


class AttentionOnly(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.a(x))


class Mixer(Parts):
    """Tokens, then channels, as in MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_up, self.tokens_down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).transpose(1, 2)
        x = x + self.tokens_down(F.gelu(self.tokens_up(y))).transpose(1, 2)
        return x + self.ffn(self.b(x))


class Decoder(Parts):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attention(self.a(x))
        q, k, v = (
            self.heads(self.q2(self.b(x))),
            self.heads(self.k2(context)),
            self.heads(self.v2(context)),
        )
        x = x + self.o2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ffn(self.c(x))


class LayerScale(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attention(self.a(x))
        return x + self.ffn(self.b(x)) * self.scale2


class Subtracts(Parts):
    """The decoder step of CRATE: what attention finds is taken away, a fraction of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - 0.1 * self.attention(self.a(x))
        return x + self.ffn(self.b(x))


class NoBypass(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.a(x))
        return self.ffn(self.b(x))


class Crate(Parts):
    """Attention with one projection for all, then one step of sparse coding past nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.rand(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        w = self.heads(self.q(self.a(x)))
        x = x + self.o(F.scaled_dot_product_attention(w, w, w).transpose(1, 2).flatten(2))
        v = self.b(x)
        d = F.linear(v, self.code)
        step = F.linear(v, self.code.t()) - F.linear(d, self.code.t())
        return F.relu(v + 0.1 * step - 0.01)


class Local(nn.Module):
    """A block of UniFormer's first stages: everything is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.a, self.b = nn.BatchNorm2d(DIM), nn.BatchNorm2d(DIM)
        self.v, self.o = nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.mix = nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM)
        self.up, self.down = nn.Conv2d(DIM, 12, 1), nn.Conv2d(12, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place(x)
        x = x + self.o(self.mix(self.v(self.a(x))))
        y: Tensor = x + self.down(F.gelu(self.up(self.b(x))))
        return y


class ConvolutionalFFN(Parts):
    """A depthwise convolution among the hidden neurons, as in SegFormer and PVT v2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.a(x))
        hidden = self.up(self.b(x)).transpose(1, 2).unflatten(2, (2, 3))
        y: Tensor = x + self.down(F.gelu(self.conv(hidden).flatten(2).transpose(1, 2)))
        return y


class Modulated(Parts):
    """adaLN, its chunks in an order of its own: scale, gate, shift."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, gate, shift = self.modulation(F.silu(condition))[:, None].chunk(3, dim=-1)
        return x + gate * self.attention(self.a(x) * (1 + scale) + shift)


class Shares(Parts):
    """Attention and network side by side into one matrix, as in FLUX's single blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(DIM + 12, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        both = torch.cat((attended, F.gelu(self.up(y))), dim=-1)
        out: Tensor = x + self.joint(both)
        return out


class Split(Shares):
    """The same with the matrix split in two."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return x + (self.attention(y) + self.ffn(y))


class Double(Parts):
    """Two streams that attend over each other, as in SD3; the text may end."""

    def __init__(self, ends: bool = False) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        y, z = self.a(x), self.b(text)
        q = torch.cat((self.heads(self.q(y)), self.heads(self.q2(z))), dim=2)
        k = torch.cat((self.heads(self.k(y)), self.heads(self.k2(z))), dim=2)
        v = torch.cat((self.heads(self.v(y)), self.heads(self.v2(z))), dim=2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(attended[:, :6])
        x = x + self.ffn(self.c(x))
        if self.ends:
            return (x,)
        text = text + self.o2(attended[:, 6:])
        return x, text + self.down2(F.gelu(self.up2(self.d(text))))


class Macaron(Parts):
    """A network before and one behind, as in a Conformer."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ffn(self.a(x))
        x = x + self.attention(self.b(x))
        x = x + self.depthwise(self.c(x).transpose(1, 2)).transpose(1, 2)
        return x + 0.5 * self.down2(F.gelu(self.up2(self.d(x))))


class Chain(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *more)
        return x


def captured(model: nn.Module, *inputs: Tensor, fold: bool = True) -> Program:
    torch.manual_seed(0)
    return capture(model.eval(), inputs or (X,), fold=fold)


def only(model: nn.Module, *inputs: Tensor) -> Block:
    (block,) = captured(model, *inputs).blocks()
    return block


@pytest.mark.parametrize(
    ("kind", "place", "parallel"),
    [
        (Pre, "pre", False),
        (Post, "post", False),
        (Sandwich, "sandwich", False),
        (Branch, "branch", False),
        (ParallelOneNorm, "pre", True),
        (ParallelTwoNorms, "pre", True),
        (Shares, "pre", True),
        (Split, "pre", True),
    ],
)
def test_places_of_norms(kind: type[nn.Module], place: str, parallel: bool) -> None:
    block = only(kind())
    assert (block.norm_place, block.is_parallel) == (place, parallel)
    assert sorted(s.region.kind for s in block.sublayers) == ["attention", "feed_forward"]
    assert (block.stream_in.name, block.signs) == ("x", (1, 1))


def test_sublayers_that_share_a_matrix() -> None:
    model = Shares()
    block = only(model)
    (attention,), (ffn,) = block.attentions, block.feed_forwards
    assert block.shares_output
    assert ffn.shares_down
    assert ffn.down_layer.columns == (8, 20)
    torch.testing.assert_close(ffn.down, model.joint.weight[:, 8:], rtol=0, atol=0)
    assert attention.output is not None
    assert attention.output.columns == (0, 8)
    assert ffn.y.target is not ffn.down_layer.node.target
    assert not only(Split()).shares_output


def test_blocks_of_one_kind_of_sublayer() -> None:
    for kind, sublayers in ((AttentionOnly, ["attention"]), (Mixer, ["feed_forward"] * 2)):
        for fold in (True, False):
            blocks = captured(Chain(*(kind() for _ in range(4))), fold=fold).blocks()
            assert [[s.region.kind for s in b.sublayers] for b in blocks] == [sublayers] * 4


def test_a_network_over_tokens() -> None:
    axes = [ffn.axis for ffn in only(Mixer()).feed_forwards]
    assert axes == ["tokens", "channels"]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_network_before_and_one_behind_are_one_block(depth: int) -> None:
    program = captured(Chain(*(Macaron() for _ in range(depth))), fold=False)
    kinds = [[s.region.kind for s in block.sublayers] for block in program.blocks()]
    assert kinds == [["feed_forward", "attention", "branch", "feed_forward"]] * depth
    (stack,) = program.stacks()
    assert stack.period == 1
    assert [block.sublayers[0].residual.factor for block in stack.blocks] == [0.5] * depth


def test_decoder_block() -> None:
    block = only(Decoder(), X, CONTEXT)
    kinds = [s.region.constants().get("source", s.region.kind) for s in block.sublayers]
    assert kinds == ["self", "cross", "feed_forward"]


def test_layer_scale() -> None:
    block = only(LayerScale())
    assert (block.is_gated, block.gate_kinds) == (True, ("parameter", "parameter"))
    assert block.modulation is None


def test_a_sublayer_that_is_subtracted() -> None:
    block = only(Subtracts())
    assert block.signs == (-1, 1)
    assert block.sublayers[0].residual.factor == pytest.approx(0.1)


def test_a_network_that_nothing_passes_by() -> None:
    for fold in (True, False):
        blocks = captured(Chain(*(NoBypass() for _ in range(3))), fold=fold).blocks()
        assert [block.signs for block in blocks] == [(1, 0)] * 3
        assert all(block.feed_forwards[0].ffn_dim == 12 for block in blocks)


def test_crate() -> None:
    blocks = captured(Chain(*(Crate() for _ in range(3)))).blocks()
    assert [block.signs for block in blocks] == [(1, 0)] * 3
    (branch,) = blocks[1].branches
    assert (branch.ops, branch.mixes) == (("linear",), "channels")


def test_convolutional_block() -> None:
    blocks = captured(Chain(Local(), Local()), IMAGE).blocks()
    kinds = [[s.region.kind for s in block.sublayers] for block in blocks]
    assert kinds == [["branch", "branch", "feed_forward"]] * 2
    place, mix = blocks[0].branches
    assert (place.ops, mix.ops) == (("conv2d",), ("pointwise", "conv2d"))
    assert place.mixes == mix.mixes == "tokens"
    (ffn,) = blocks[0].feed_forwards
    assert (ffn.dim, ffn.ffn_dim, ffn.up.shape) == (8, 12, (12, 8))


def test_convolution_among_hidden_neurons() -> None:
    (ffn,) = only(ConvolutionalFFN()).feed_forwards
    assert ffn.constants() == {
        "activation": "gelu", "is_gated": False, "dim": 8, "ffn_dim": 12, "kernels": [[3, 3]],
    }  # fmt: skip


def test_roles_of_a_modulation_are_found_by_use() -> None:
    model = Modulated()
    block = only(model, X, CONDITION)
    modulation = block.modulation
    assert modulation is not None
    assert modulation.form == "per-block"
    spans = {c.role: c.rows and c.rows.span for c in modulation.chunks}
    assert spans == {"scale": (0, 8), "gate": (8, 16), "shift": (16, 24)}
    assert [str(node) for node in modulation.conditions] == ["condition"]
    torch.testing.assert_close(modulation.layers[0].weight, model.modulation.weight)
    assert block.gate_kinds == ("modulation",)


def test_two_streams() -> None:
    block = only(Double(), X, CONTEXT)
    assert [s.stream_in.name for s in block.streams] == ["x", "text"]
    assert len(block.attentions) == 1
    assert len(block.feed_forwards) == 2
    assert len(block.attentions[0].streams) == 2


def test_a_stream_that_ends() -> None:
    block = only(Double(ends=True), X, CONTEXT)
    assert [(s.stream_in.name, s.stream_out is None) for s in block.streams] == [
        ("x", False), ("text", True)
    ]  # fmt: skip


class Gated(nn.Module):
    """Gated networks of several kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate, self.up, self.both = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 24)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "glu":
            hidden = F.glu(self.both(x))
        else:
            act = {"none": lambda y: y, "sigmoid": torch.sigmoid}[self.kind]
            hidden = act(self.gate(x)) * self.up(x)
        y: Tensor = x + self.down(hidden)
        return y


@pytest.mark.parametrize("kind", ["none", "sigmoid", "glu"])
def test_gated_networks(kind: str) -> None:
    model = Gated(kind)
    (ffn,) = captured(model).feed_forwards()
    assert (ffn.activation, ffn.is_gated) == ("sigmoid" if kind == "glu" else kind, True)
    gate = ffn.gate if ffn.gate is not None else torch.empty(0)
    act: Any = (lambda y: y) if kind == "none" else torch.sigmoid
    hidden = act(F.linear(X, gate, ffn.gate_layer and ffn.gate_layer.bias))
    hidden = hidden * F.linear(X, ffn.up, ffn.up_layer.bias)
    y = X + F.linear(hidden, ffn.down, ffn.down_layer.bias)
    torch.testing.assert_close(y, model(X))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Post(), (X,)),
        (ParallelTwoNorms(), (X,)),
        (Shares(), (X,)),
        (Crate(), (X,)),
        (Local(), (IMAGE,)),
        (Modulated(), (X, CONDITION)),
        (Double(), (X, CONTEXT)),
        (Double(ends=True), (X, CONTEXT)),
    ],
)
def test_blocks_are_complete(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A block computes its outputs from its inputs and weights alone, and so do its parts."""
    program = captured(model, *inputs)
    values: dict[Any, Any] = {}
    run(program, list(inputs), on_node=lambda i, n, v: values.update({(i, n): v}))
    parts = [s.region for block in program.blocks() for s in block.sublayers]
    for region in (*program.blocks(), *parts, *program.modulations()):
        given = [values[region.instance, node] for node in region.inputs]
        for node, value in zip(region.outputs, region.replay(given), strict=True):
            torch.testing.assert_close(value, values[region.instance, node], rtol=0, atol=0)
