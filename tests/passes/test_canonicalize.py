"""Canonicalize: each spelling is found, rewritten exactly, and near misses are left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.ir.verify import verify
from blockwright.passes import Canonicalize


class Spelled(nn.Module):
    """One block that spells everything out."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.gain = nn.Parameter(torch.rand(dim) + 0.5)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim * kv_heads // heads)
        self.value = nn.Linear(dim, dim * kv_heads // heads)
        self.weight, self.bias = nn.Parameter(torch.randn(dim, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        gate = self.query(x)
        q = gate.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        times = self.heads // self.kv_heads
        batch, _, seq, head_dim = k.shape
        wide = (batch, self.kv_heads, times, seq, head_dim)
        k, v = (t[:, :, None].expand(wide).reshape(batch, -1, seq, head_dim) for t in (k, v))
        probs = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(head_dim) + mask, dim=-1)
        x = (probs @ v).transpose(1, 2).flatten(2)
        x = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(batch, seq, 6)
        cube = x + 0.044715 * torch.pow(x, 3.0)
        x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * cube))
        return torch.cat([x, gate * torch.sigmoid(gate)], dim=-1)


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    return [torch.randn(2, 5, 8, generator=generator), mask]


@pytest.fixture(scope="module")
def spelled(inputs: list[Tensor]) -> Program:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)}, None)
    return capture(Spelled(), tuple(inputs), dynamic_shapes=shapes)


def ops(program: Program) -> list[str]:
    return [str(node.target) for node in program.main.nodes if node.op == "call_function"]


def test_golden(spelled: Program, inputs: list[Tensor], golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(spelled, [Canonicalize()], [inputs])
    golden("canonicalize", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_everything_is_found_and_exact(spelled: Program, inputs: list[Tensor]) -> None:
    new, (step,) = run_passes(spelled, [Canonicalize()], [inputs])
    assert sorted(step.plan.decisions.values()) == [
        "attention", "gelu_tanh", "linear", "rms_norm", "silu",
    ]  # fmt: skip
    for gone in ("rsqrt", "softmax", "matmul", "addmm", "tanh", "sigmoid", "pow"):
        assert not any(gone in op for op in ops(new)), gone
    x, mask = torch.randn(3, 5, 8), inputs[1]
    torch.testing.assert_close(run(new, [x, mask]), run(spelled, [x, mask]))


def test_one_run_finds_the_repeated_heads_too(spelled: Program, inputs: list[Tensor]) -> None:
    once, _ = run_passes(spelled, [Canonicalize()], [inputs])
    assert not any("expand" in op for op in ops(once))
    with pytest.raises(NoMatchError):
        run_passes(once, [Canonicalize()])


class Formula(nn.Module):
    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.formula(x, y, self.gain)


def squares(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def softmax(x: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    return torch.softmax(x @ y.transpose(2, 3), dim=dim) @ y


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def centred_twice(x: Tensor, by: Tensor) -> Tensor:
    return (x - by) * torch.rsqrt((x - by).pow(2).mean(-1, keepdim=True) + 1e-5)


def by_variance(x: Tensor, *, root: bool = True) -> Tensor:
    variance, centred = x.var(-1, unbiased=False, keepdim=True), x - x.mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() if root else centred * (variance + 1e-5).rsqrt()


def einsum(x: Tensor, y: Tensor) -> Tensor:
    probs = torch.softmax(torch.einsum("hbid,hbjd->bhij", x, y) * 0.5, dim=-1)
    return torch.einsum("bhij,hbjd->ibhd", probs, y)


def three_axes(x: Tensor, y: Tensor) -> Tensor:
    probs = torch.softmax(torch.bmm(x[0], y[0].transpose(1, 2)) / 2, dim=-1)
    return torch.bmm(probs, y[0])


def baddbmm(x: Tensor, y: Tensor) -> Tensor:
    bias = y[0].sum(-1, keepdim=True).expand(3, 5, 5)
    probs = torch.softmax(torch.baddbmm(bias, x[0], y[0].transpose(1, 2), alpha=0.5), dim=-1)
    return torch.bmm(probs, y[0])


def below() -> Tensor:
    return torch.ones(5, 5, dtype=torch.bool).tril()


def filled(x: Tensor, y: Tensor, value: float) -> Tensor:
    return torch.softmax((x @ y.mT).masked_fill(~below(), value), dim=-1) @ y


FOUND = {
    "layer_norm": (lambda x, y, g: layer_norm(x), "layer_norm"),
    "layer_norm with weight and shift": (lambda x, y, g: layer_norm(x) * g + g, "layer_norm"),
    "layer_norm that centres twice": (
        lambda x, y, g: centred_twice(x, x.mean(-1, keepdim=True)) * g + g,
        "layer_norm",
    ),
    "layer_norm by variance": (lambda x, y, g: by_variance(x), "layer_norm"),
    "layer_norm by variance with weight and shift": (
        lambda x, y, g: by_variance(x, root=False) * g + g,
        "layer_norm",
    ),
    "rms_norm with casts that change nothing": (
        lambda x, y, g: (x.float() * squares(x.to(torch.float32))).to(x.dtype) * g,
        "rms_norm",
    ),
    "attention by einsum": (lambda x, y, g: einsum(x, y), "attention"),
    "attention over three axes": (lambda x, y, g: three_axes(x, y), "attention"),
    "attention by baddbmm": (lambda x, y, g: baddbmm(x, y), "attention"),
    "attention filled with infinity": (lambda x, y, g: filled(x, y, -math.inf), "attention"),
    "attention filled with the lowest": (
        lambda x, y, g: filled(x, y, torch.finfo(torch.float32).min),
        "attention",
    ),
    "attention by where": (
        lambda x, y, g: torch.softmax(torch.where(below(), x @ y.mT, -math.inf), -1) @ y,
        "attention",
    ),
    "attention with two masks": (
        lambda x, y, g: (
            torch.softmax((x @ y.mT + torch.ones(5, 5)).masked_fill(~below(), -math.inf), -1) @ y
        ),
        "attention",
    ),
    "attention without its largest score": (
        lambda x, y, g: torch.softmax((s := x @ y.mT) - s.amax(-1, keepdim=True), -1) @ y,
        "attention",
    ),
    "heads that are repeated": (
        lambda x, y, g: F.scaled_dot_product_attention(
            x[:, :2], *(y[:, :1].repeat_interleave(2, dim=1),) * 2
        ),
        "attention",
    ),
    "rms_norm without weight": (lambda x, y, g: x * squares(x), "rms_norm"),
    "silu": (lambda x, y, g: torch.sigmoid(x) * x, "silu"),
    "exact gelu": (lambda x, y, g: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    "attention without scale": (lambda x, y, g: softmax(x, y), "attention"),
    "attention with a scaled product": (
        lambda x, y, g: torch.softmax((x @ y.transpose(-1, -2)) * 0.25, -1) @ y,
        "attention",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_spellings(name: str) -> None:
    formula, form = FOUND[name]
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    program = capture(Formula(formula), (x, y))
    new, (step,) = run_passes(program, [Canonicalize()], [program.signature.bind((x, y), {})])
    verify(new)
    assert list(step.plan.decisions.values()) == [form]
    spelled = ("softmax", "sqrt", "pow", "erf", "sigmoid", "repeat_interleave", "einsum")
    assert not any(word in op for op in ops(new) for word in spelled)


LEFT: dict[str, Callable[..., Any]] = {
    "norm of another value": lambda x, y, g: x * squares(y),
    "norm over another axis": lambda x, y, g: x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-6),
    "norm whose inside is read": lambda x, y, g: x * (r := squares(x)) + r,
    "norm without the axis it averaged": lambda x, y, g: (
        x[0, 0, :4] * torch.rsqrt(x[0, 0, :4].pow(2).mean(-1) + 1e-6)
    ),
    "norm with a scaled epsilon": lambda x, y, g: (
        x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=3))
    ),
    "norm of a difference taken twice": lambda x, y, g: centred_twice(x, y),
    "norm by the unbiased variance": lambda x, y, g: (
        (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-5).rsqrt()
    ),
    "norm by the variance of another value": lambda x, y, g: (
        (x - x.mean(-1, keepdim=True)) * (y.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    ),
    "norm by variance that is not centred": lambda x, y, g: (
        x * (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    ),
    "norm upside down": lambda x, y, g: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) / x,
    "mask that is taken away": lambda x, y, g: (
        torch.softmax(torch.sub(x @ y.mT, torch.ones(5, 5)), -1) @ y
    ),
    "heads that are tiled": lambda x, y, g: F.scaled_dot_product_attention(
        x[:, :2], *(y[:, :1, None].transpose(1, 2).expand(2, 2, 1, 5, 4).reshape(2, 2, 5, 4),) * 2
    ),
    "sigmoid gate": lambda x, y, g: x * torch.sigmoid(y),
    "quick gelu in its shortest spelling": lambda x, y, g: x * torch.sigmoid(1.702 * x),
    "gelu with a scaled sum": lambda x, y, g: (
        x * 0.5 * torch.add(torch.erf(x / math.sqrt(2)), 1, alpha=2)
    ),
    "gelu with a rounded quotient": lambda x, y, g: (
        x * 0.5 * (1 + torch.erf(torch.div(x, math.sqrt(2), rounding_mode="floor")))
    ),
    "nearly gelu": lambda x, y, g: x * 0.5 * (1 + torch.erf(x / 1.413)),
    "one head of queries": lambda x, y, g: torch.softmax(x[:, :1] @ y.mT, -1) @ y,
    "scores in half precision": lambda x, y, g: (
        (x @ y.mT).bfloat16().softmax(-1).to(torch.float32) @ y
    ),
    "a mask with more rows than scores": lambda x, y, g: (
        torch.softmax(x[:1] @ y[:1].mT + torch.ones(2, 1, 5, 5), -1) @ y[:1]
    ),
    "mean in another type": lambda x, y, g: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.bfloat16) + 1e-6)
    ),
    "a weight that is not turned": lambda x, y, g: x @ g.view(4, 1).expand(4, 4).transpose(0, 0),
    "silu of something scaled otherwise": lambda x, y, g: F.silu(x * 1.702) / 1.5,
    "gelu whose tanh is read": lambda x, y, g: (
        0.5 * x * (1 + (t := torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))) + t
    ),
    "attention that is capped": lambda x, y, g: (
        torch.softmax(torch.tanh(x @ y.mT / 30) * 30, -1) @ y
    ),
    "attention with a sink": lambda x, y, g: (
        torch.softmax(torch.cat([x @ y.mT, y[..., :1]], -1), -1)[..., :-1] @ y
    ),
    "attention filled with a middling number": lambda x, y, g: filled(x, y, -1e4),
    "attention whose mask is scaled": lambda x, y, g: (
        torch.softmax((x @ y.mT + torch.ones(5, 5)) * 0.5, -1) @ y
    ),
    "heads that take turns": lambda x, y, g: F.scaled_dot_product_attention(
        x[:, :2], *(y[:, :1].repeat_interleave(2, dim=0)[:2].expand(2, 2, 5, 4),) * 2
    ),
    "attention without the first key": lambda x, y, g: (
        torch.softmax(x @ y.mT, -1)[..., 1:] @ y[..., 1:, :]
    ),
    "attention with the probabilities of one head": lambda x, y, g: (
        torch.softmax(x @ y.mT, -1)[:, :1] @ y
    ),
    "scores less each key's largest": lambda x, y, g: (
        torch.softmax((s := x @ y.mT) - s.amax(-2, keepdim=True), -1) @ y
    ),
    "scores that are rounded": lambda x, y, g: (
        torch.softmax(torch.div(x @ y.mT, 2.0, rounding_mode="floor"), -1) @ y
    ),
    "centred by another mean": lambda x, y, g: x - y.mean(-1, keepdim=True),
    "softmax over queries": lambda x, y, g: softmax(x, y, dim=2),
    "probabilities are read": lambda x, y, g: (p := torch.softmax(x @ y.mT, -1)) @ y + p.sum(),
}


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_are_left_alone(name: str) -> None:
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    program = capture(Formula(LEFT[name]), (x, y))
    with pytest.raises(NoMatchError):
        run_passes(program, [Canonicalize()])


REASONS = {
    "attention that is capped": "caps its scores",
    "attention with a sink": "gives part of the probability to a sink",
    "attention filled with a middling number": (
        "hides scores behind a number that is not the lowest"
    ),
    "attention without the first key": "leaves probabilities out",
    "attention whose mask is scaled": "scales its mask with the scores",
    "probabilities are read": "has scores or probabilities that are read elsewhere",
}


@pytest.mark.parametrize("name", REASONS)
def test_says_why_an_attention_stays_spelled_out(name: str) -> None:
    program = capture(Formula(LEFT[name]), (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)))
    with pytest.raises(NoMatchError, match=REASONS[name]):
        run_passes(program, [Canonicalize()])


class Picked(nn.Module):
    """Multi-query heads, picked from a fused layer as Falcon does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 12), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).unflatten(-1, (6, 2))
        parts = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        q, k, v = (part.transpose(1, 2) for part in parts)
        k, v = (part.expand(-1, 4, -1, -1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        merged: Tensor = self.out(y.flatten(2))
        return x + merged


def test_positions_picked_by_an_index_become_slices() -> None:
    x = torch.randn(2, 3, 8)
    program = capture(Picked().eval(), (x,))
    new, (step,) = run_passes(program, [Canonicalize()], [[x]])
    assert sorted(step.plan.decisions.values()) == ["slice at -1", "slice at -2"]
    torch.testing.assert_close(run(new, [x]), run(program, [x]), rtol=0, atol=0)
    (attention,) = new.attentions()
    assert (attention.heads, attention.kv_heads, attention.source) == (4, 1, "self")
    assert [layer.features for layer in attention.layers] == [(0, 8), (8, 10), (10, 12), (0, 8)]


class Products(nn.Module):
    """Products with weights that are no `linear`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.right = nn.Parameter(torch.randn(6, 4))
        self.turned, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.right.T + self.bias + x @ self.turned


def test_products_with_weights_become_linear() -> None:
    x = torch.randn(2, 3, 4)
    program = capture(Products(), (x,))
    assert [miss.nearest for miss in program.explain().near_misses] == ["linear"] * 2
    new, (step,) = run_passes(program, [Canonicalize()], [[x]])
    assert not new.explain().near_misses
    assert list(step.plan.decisions.values()) == ["linear", "linear"]
    assert not any("matmul" in op for op in ops(new))
    torch.testing.assert_close(run(new, [x]), run(program, [x]))


def test_queries_without_keys_average_the_values() -> None:
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    keep[0] = False
    lowest = torch.finfo(torch.float32).min
    formula = lambda x, y, g: (  # noqa: E731
        torch.softmax((x @ y.mT).masked_fill(~keep, lowest), -1) @ y
    )
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    program = capture(Formula(formula), (x, y))
    new, (step,) = run_passes(program, [Canonicalize()], [program.signature.bind((x, y), {})])
    assert list(step.plan.decisions.values()) == ["attention"]
    torch.testing.assert_close(run(new, [x, y])[0][:, :, 0], y.mean(2))


QUICK = {
    "sigmoid first": lambda x, y, g: torch.sigmoid(x * 1.702) * x,
    "by silu": lambda x, y, g: F.silu(x * 1.702) / 1.702,
    "number first": lambda x, y, g: 1 / 1.702 * F.silu(1.702 * x),
}


@pytest.mark.parametrize("name", QUICK)
def test_quick_gelu_takes_its_shortest_spelling(name: str) -> None:
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    program = capture(Formula(QUICK[name]), (x, y))
    new, (step,) = run_passes(program, [Canonicalize()], [program.signature.bind((x, y), {})])
    assert list(step.plan.decisions.values()) == ["quick_gelu"]
    assert ops(new) == ["aten.mul.Tensor", "aten.sigmoid.default", "aten.mul.Tensor"]
    with pytest.raises(NoMatchError):
        run_passes(new, [Canonicalize()])


class Turned(nn.Module):
    """A weight stored as [in, out], which two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, torch.addmm(self.bias, x, self.weight), self.weight)


def test_a_shared_weight_is_not_turned_round_twice() -> None:
    program = capture(Turned(), (torch.randn(3, 4),))
    with pytest.raises(NoMatchError, match="reads a weight that others read as it is stored"):
        run_passes(program, [Canonicalize()])


class Parts(nn.Module):
    """A fused layer of two heads of width 2, whose parts are taken in one way or another."""

    def __init__(self, take: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.take = nn.Linear(4, 12), take

    def forward(self, x: Tensor) -> Tensor:
        q, _, v = self.take(self.qkv(x))
        return q.flatten(2) * v.flatten(2)


PARTED = {
    "chunk": lambda y: y.chunk(3, dim=-1),
    "split": lambda y: y.split(4, dim=-1),
    "unbind": lambda y: y.view(2, 3, 3, 2, 2).unbind(2),
    "unbind unflattened": lambda y: y.unflatten(-1, (3, 4)).unbind(-2),
}


@pytest.mark.parametrize("name", PARTED)
def test_parts_of_a_fused_layer_are_taken_in_one_way(name: str) -> None:
    x = torch.randn(2, 3, 4)
    program = capture(Parts(PARTED[name]), (x,))
    new, (step,) = run_passes(program, [Canonicalize()], [[x]])
    assert list(step.plan.decisions.values()) == ["split"]
    assert not {"aten.chunk.default", "aten.split.Tensor", "aten.unbind.int"} & set(ops(new))
    assert "aten.split_with_sizes.default" in ops(new)
    assert torch.equal(run(new, [x])[0], run(program, [x])[0])


WHOLE = {
    "sizes": lambda y: y.split([4, 4, 4], dim=-1),
    "another axis": lambda y: y.chunk(3, dim=1),
    "an axis inside heads": lambda y: y.view(2, 3, 4, 3).unbind(-1),
    "an axis before the features": lambda y: y.view(2, 3, 3, 4).transpose(1, 2).unbind(2),
}


@pytest.mark.parametrize("name", WHOLE)
def test_other_parts_are_left_alone(name: str) -> None:
    program = capture(Parts(WHOLE[name]), (torch.randn(2, 3, 4),))
    with pytest.raises(NoMatchError):
        run_passes(program, [Canonicalize()])


def test_a_layer_shared_with_attention_is_cut_in_two() -> None:
    from blockwright.models.flux import TOY_FLUX, Flux

    torch.manual_seed(0)
    model = Flux(TOY_FLUX).eval()
    inputs = list(model.example_inputs())
    program = capture(model, tuple(inputs))
    new, (step,) = run_passes(program, [Canonicalize()], [inputs])
    assert list(step.plan.decisions.values()) == ["linears"] * TOY_FLUX.single_depth
    last = new.attentions()[-1].output
    assert last is not None
    assert (last.columns, last.is_fused, last.in_features) == (None, False, TOY_FLUX.dim)
    torch.testing.assert_close(run(new, inputs), run(program, inputs))


class Concatenated(nn.Module):
    """A layer over two values, neither of which is an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.cat((x, x.relu()), dim=-1))
        return y


def test_a_layer_without_attention_is_left_whole() -> None:
    with pytest.raises(NoMatchError):
        run_passes(capture(Concatenated(), (torch.randn(2, 4),)), [Canonicalize()])


def test_declines_what_is_canonical(program: Program) -> None:
    with pytest.raises(NoMatchError, match="is one op already"):
        run_passes(program, [Canonicalize()])


def test_declines_by_pattern(spelled: Program) -> None:
    _, (step,) = run_passes(spelled, [Canonicalize(exclude=("spelled*",))])
    assert sorted(step.plan.decisions.values()) == ["linear", "rms_norm"]
    assert set(step.receipt.skipped.values()) == {"is excluded by pattern"}


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_decoders(family: str, attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24,
    }  # fmt: skip
    if family == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = getattr(transformers, f"{family}Config")(vocab_size=40, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")._from_config(
        config, attn_implementation=attention
    )
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    program = capture(model.eval(), {"input_ids": ids})
    new, _ = run_passes(program, [Canonicalize(), Canonicalize(allow_no_match=True)], [[ids]])
    text = new.text()
    assert text.count("= scaled_dot_product_attention(") == 1  # one class, two instances
    assert not any(word in text for word in ("softmax(", "rsqrt(", "addmm(", "tanh(", "pow("))
    assert ("rms_norm(" in text) == (family != "GPT2")
    assert ("enable_gqa=True" in text) == (family != "GPT2")


def test_module_alone() -> None:
    from blockwright.passes.canonicalize import Activation, RMSNorm

    x, gain = torch.randn(3, 4), torch.rand(4)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    torch.testing.assert_close(RMSNorm(gain, 4, 1e-6)(x), expected)
    torch.testing.assert_close(Activation("silu")(x), F.silu(x))


class LateMask(nn.Module):
    """Attention that makes its mask when the products are already there."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        hidden = ~torch.ones(4, 4, dtype=torch.bool).tril()
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_a_mask_may_come_between_the_ops_of_an_attention() -> None:
    inputs = list(torch.randn(3, 2, 2, 4, 8))
    program = capture(LateMask(), tuple(inputs))
    new, (step,) = run_passes(program, [Canonicalize()], [inputs])
    assert "scaled_dot_product_attention" in new.text()
    assert step.certificate is not None
