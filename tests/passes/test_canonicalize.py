"""Canonicalize: each spelling is found, rewritten exactly, and near misses are left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def test_a_second_run_finds_the_repeated_heads(spelled: Program, inputs: list[Tensor]) -> None:
    once, _ = run_passes(spelled, [Canonicalize()], [inputs])
    twice, (step,) = run_passes(once, [Canonicalize()], [inputs])
    assert list(step.plan.decisions.values()) == ["attention"]
    assert not any("expand" in op for op in ops(twice))
    with pytest.raises(NoMatchError):
        run_passes(twice, [Canonicalize()])


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


FOUND = {
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
    assert len(ops(new)) < len(ops(program))


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
    "norm upside down": lambda x, y, g: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) / x,
    "mask that is taken away": lambda x, y, g: (
        torch.softmax(torch.sub(x @ y.mT, torch.ones(5, 5)), -1) @ y
    ),
    "heads that are tiled": lambda x, y, g: F.scaled_dot_product_attention(
        x[:, :2], *(y[:, :1, None].transpose(1, 2).expand(2, 2, 1, 5, 4).reshape(2, 2, 5, 4),) * 2
    ),
    "sigmoid gate": lambda x, y, g: x * torch.sigmoid(y),
    "quick gelu has no op": lambda x, y, g: x * torch.sigmoid(1.702 * x),
    "gelu whose tanh is read": lambda x, y, g: (
        0.5 * x * (1 + (t := torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))) + t
    ),
    "softmax over queries": lambda x, y, g: softmax(x, y, dim=2),
    "probabilities are read": lambda x, y, g: (p := torch.softmax(x @ y.mT, -1)) @ y + p.sum(),
}


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_are_left_alone(name: str) -> None:
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    program = capture(Formula(LEFT[name]), (x, y))
    with pytest.raises(NoMatchError):
        run_passes(program, [Canonicalize()])


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
