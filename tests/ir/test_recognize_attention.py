"""Recognition of attention: streams, rotations, masks, cores; spelled in every way we know."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.recognize import Attention, Layer, Rotary
from blockwright.ir.recognize.rows import Rows
from blockwright.ir.run import run
from blockwright.models.flux import TOY_FLUX, Flux
from blockwright.models.sd3 import SD3, TOY_SD3

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """One attention over two heads of four, around any core."""

    def __init__(self, core: Core, *, qk: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.core, self.qk = core, qk or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = self.core(self.qk(q), self.qk(k), v)
        merged: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return x + merged


def only(model: nn.Module, *inputs: Tensor) -> Attention:
    (attention,) = capture(model.eval(), inputs or (X,)).attentions()
    return attention


def replays(program: Program, inputs: list[Tensor]) -> None:
    """Assert that every region computes its outputs from its inputs alone."""
    values: dict[tuple[str | None, fx.Node], Any] = {}
    run(program, inputs, on_node=lambda i, node, value: values.update({(i, node): value}))
    for region in program.attentions():
        before = [values[region.instance, node] for node in region.inputs]
        for node, value in zip(region.outputs, region.replay(before), strict=True):
            torch.testing.assert_close(value, values[region.instance, node], rtol=0, atol=0)


# Streams


@pytest.mark.parametrize(("model", "norm"), [(Flux(TOY_FLUX), True), (SD3(TOY_SD3), False)])
def test_joint_attention_has_a_stream_per_sequence(model: nn.Module, norm: bool) -> None:
    inputs = model.example_inputs()  # type: ignore[operator]
    program = capture(model.eval(), inputs)
    attention = program.attentions()[0]
    text, image = attention.streams
    assert (attention.source, attention.heads, attention.qk_norm) == ("joint", 2, norm)
    assert attention.query is None
    assert attention.output is None
    assert attention.outputs == (text.result, image.result)
    assert len(attention.layers) == 8
    assert [layer.features for layer in text.layers] == [(0, 16), (16, 32), (32, 48), (0, 16)]
    assert len({layer.weight.data_ptr() for layer in attention.layers}) == 8
    assert text.x_q is text.x_k is text.x_v is not image.x_q
    replays(program, list(inputs))


def test_a_stream_may_end_in_attention() -> None:
    text, image = capture(SD3(TOY_SD3).eval()).attentions()[-1].streams
    assert (text.output, text.result) == (None, None)
    assert image.output is not None
    assert image.result is image.output.node


def test_parallel_attention_has_a_share_of_the_columns() -> None:
    program = capture(Flux(TOY_FLUX).eval())
    attention = program.attentions()[-1]
    output = attention.output
    assert output is not None
    assert (output.columns, output.is_fused, output.in_features) == ((0, 16), True, 16)
    whole = program.weight(str(output.weight_node.target), attention.instance)  # type: ignore[union-attr]
    torch.testing.assert_close(output.weight, whole[:, :16], rtol=0, atol=0)
    assert output.bias is not None
    other = Layer.of(output.node, Layer.all_features(output.node), (16, 40))
    assert other.bind(program, attention.graph, attention.instance).bias is None
    assert attention.outputs[0] is attention.streams[0].result
    assert output.node not in attention.nodes


class Latent(nn.Module):
    """Keys joined of two projections, one turned into heads and one shared by all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.shared = nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(8, 2)
        self.up, self.o = nn.Linear(4, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 6)).transpose(1, 2)
        k, v = self.up(self.down(x)).unflatten(-1, (2, 8)).transpose(1, 2).split([4, 4], dim=-1)
        k = torch.cat([k, self.shared(x)[:, None].expand(-1, 2, -1, -1)], dim=-1)
        merged: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + merged


def test_keys_of_two_projections_are_stated_as_a_near_miss() -> None:
    attention = only(Latent())
    sizes = attention.heads, attention.kv_heads, attention.head_dim, attention.value_dim
    assert (*sizes, attention.key) == (2, 2, 6, 4, None)
    assert [(m.nearest, m.reason) for m in attention.misses()] == [
        ("attention.key", "joins several projections")
    ]


class Shared(nn.Module):
    """One tensor is queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_one_tensor_for_all_three_is_counted_three_times() -> None:
    program = capture(Shared(), (torch.randn(2, 2, 5, 4),))
    assert program.explain().flops == program.cost().flops == 2 * 2 * 2 * 5 * 5 * (4 + 4)
    assert not any("softmax" in miss.reason for miss in program.explain().near_misses)


def by_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with axes [batch, seq, heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    probs = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v).transpose(1, 2)


def test_heads_behind_the_sequence() -> None:
    attention = only(Toy(by_sequence))
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (2, 2, 4)
    assert (attention.scale, attention.source) == (0.5, "self")
    assert len(attention.layers) == 4
    spelled = capture(Toy(by_sequence).eval(), (X,)).explain()
    assert not any(miss.nearest == "attention" for miss in spelled.near_misses)


class KeysOfBoth(nn.Module):
    """Only keys and values are joined: no stream of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.k2, self.v2, self.o = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        def heads(*parts: Tensor) -> Tensor:
            return torch.cat([p.unflatten(-1, (2, 4)).transpose(1, 2) for p in parts], dim=2)

        k, v = heads(self.k(x), self.k2(y)), heads(self.v(x), self.v2(y))
        z = F.scaled_dot_product_attention(heads(self.q(x)), k, v)
        merged: Tensor = self.o(z.transpose(1, 2).flatten(2))
        return merged


def test_joined_keys_alone_are_no_streams() -> None:
    attention = only(KeysOfBoth(), X, Y)
    assert len(attention.streams) == 1
    assert attention.source == "mixed"
    reasons = {miss.nearest: miss.reason for miss in attention.misses()}
    assert reasons["attention.key"] == "joins several projections"


class Reduced(nn.Module):
    """Keys and values of every second token, mixed with the next one."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.conv, self.norm, self.act = nn.Conv1d(8, 8, 2, stride=2), nn.LayerNorm(8), act

    def forward(self, x: Tensor) -> Tensor:
        few = self.norm(self.act(self.conv(x.transpose(1, 2))).transpose(1, 2))
        q, k, v = (
            y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.q(x), self.k(few), self.v(few))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        merged: Tensor = self.o(y)
        return merged


@pytest.mark.parametrize(("act", "source"), [(nn.Identity(), "self"), (nn.Softmax(-1), "cross")])
def test_keys_of_fewer_tokens(act: nn.Module, source: str) -> None:
    assert only(Reduced(act)).source == source


@pytest.mark.parametrize(
    ("cut", "is_whole"),
    [
        (lambda y: (y[:, :, :2], y[:, :, 2:]), True),
        (lambda y: (y[:, :, :-4], y[:, :, -4:]), True),
        (lambda y: (y[:, :, :3], y[:, :, :3]), False),
        (lambda y: (y[:, :, ::2], y[:, :, 3:]), False),
    ],
)
def test_attended_values_cut_and_joined_again(
    cut: Callable[[Tensor], tuple[Tensor, ...]], is_whole: bool
) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat(cut(F.scaled_dot_product_attention(q, k, v)), dim=2)

    program = capture(Toy(core).eval(), (X,))
    (attention,) = program.attentions()
    assert (attention.output is not None) is is_whole
    replays(program, [X])


# Rotations

ANGLES = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1])
COS, SIN = ANGLES.cos(), ANGLES.sin()


def turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def half(x: Tensor) -> Tensor:
    return x * torch.cat((COS, COS), -1) + turned(x) * torch.cat((SIN, SIN), -1)


def half_in_parts(x: Tensor) -> Tensor:
    a, b = x[..., :2], x[..., 2:]
    return torch.cat((a * COS - b * SIN, b * COS + a * SIN), dim=-1)


def interleaved(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (2, 2)).unbind(-1)
    return torch.stack((a * COS - b * SIN, a * SIN + b * COS), dim=-1).flatten(-2)


def interleaved_by_steps(x: Tensor) -> Tensor:
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * COS.repeat_interleave(2, -1) + swapped * SIN.repeat_interleave(2, -1)


def as_complex(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)))
    return torch.view_as_real(pairs * torch.complex(COS, SIN)).flatten(-2)


def in_place(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (2, 2)).unbind(-1)
    y = torch.empty_like(x)
    y[..., 0::2] = a * COS - b * SIN
    y[..., 1::2] = a * SIN + b * COS
    return y


def partly(x: Tensor) -> Tensor:
    first, rest = x[..., :2], x[..., 2:]
    cos, sin = torch.cat((COS[:, :1],) * 2, -1), torch.cat((SIN[:, :1],) * 2, -1)
    return torch.cat((first * cos + turned(first) * sin, rest), dim=-1)


def by_parts_of_one_table(x: Tensor) -> Tensor:
    cos, sin = torch.cat((COS, SIN), dim=-1).split(2, dim=-1)
    return x * torch.cat((cos, cos), -1) + turned(x) * torch.cat((sin, sin), -1)


def by_steps_of_one_table(x: Tensor) -> Tensor:
    cos, sin = torch.cat((COS, SIN), dim=-1).split(2, dim=-1)
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos.repeat_interleave(2, -1) + swapped * sin.repeat_interleave(2, -1)


ROTATIONS = {
    half: ("half", 4), half_in_parts: ("half", 4), interleaved: ("interleaved", 4),
    interleaved_by_steps: ("interleaved", 4), as_complex: ("interleaved", 4),
    in_place: ("interleaved", 4), partly: ("half", 2), by_parts_of_one_table: ("half", 4),
    by_steps_of_one_table: ("interleaved", 4),
}  # fmt: skip


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotations(rotate: Callable[[Tensor], Tensor]) -> None:
    program = capture(Toy(F.scaled_dot_product_attention, qk=rotate).eval(), (X,))
    (attention,) = program.attentions()
    rotary = attention.rotary
    assert rotary
    assert (rotary.pairing, rotary.dims) == ROTATIONS[rotate]
    assert rotary.tables
    assert [layer.features for layer in attention.layers] == [(0, 8)] * 4
    replays(program, [X])


def reflected(x: Tensor) -> Tensor:
    a, b = x[..., :2], x[..., 2:]
    return torch.cat((a * COS + b * SIN, b * COS + a * SIN), dim=-1)


def twisted(x: Tensor) -> Tensor:
    return x * torch.cat((COS, COS), -1) + x.flip(-1) * torch.cat((SIN, SIN), -1)


@pytest.mark.parametrize("mix", [reflected, twisted])
def test_what_is_no_rotation(mix: Callable[[Tensor], Tensor]) -> None:
    rotary = only(Toy(F.scaled_dot_product_attention, qk=mix)).rotary
    assert not rotary
    assert rotary.kind == "unknown"


def test_no_rotation() -> None:
    assert only(Toy(F.scaled_dot_product_attention)).rotary == Rotary("none")


# Masks


def masked(mask: Callable[[], Tensor]) -> Core:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask())


def places() -> tuple[Tensor, Tensor]:
    return torch.arange(6)[:, None], torch.arange(6)[None]


def added(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))


SLOPES = -(torch.arange(6.0)[:, None] - torch.arange(6.0)).abs()
MASKS: dict[str, tuple[Callable[[], Tensor], str, int | None]] = {
    "comparison": (lambda: places()[1] <= places()[0], "causal", None),
    "triangle": (lambda: torch.ones(6, 6, dtype=torch.bool).tril(), "causal", None),
    "filled": (lambda: torch.full((6, 6), float("-inf")).triu(1), "causal", None),
    "lowest": (lambda: torch.full((6, 6), torch.finfo(torch.float32).min).triu(1), "causal", None),
    "window": (
        lambda: (places()[1] <= places()[0]) & (places()[0] - places()[1] < 3), "window", 3
    ),
    "open": (lambda: torch.ones(6, 6, dtype=torch.bool), "none", None),
    "one number per query": (lambda: places()[0].float().expand(6, 6), "none", None),
    "slopes and a condition": (lambda: (places()[0] >= 0) + SLOPES, "bias", None),
    "slopes": (lambda: -(places()[0] - places()[1]).abs().float(), "bias", None),
    "strictly below": (lambda: places()[1] < places()[0], "input", None),
    "two sided": (lambda: (places()[0] - places()[1]).abs() < 2, "input", None),
    "upside down": (lambda: places()[1] >= places()[0], "input", None),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    make, kind, window = MASKS[name]
    attention = only(Toy(masked(make)))
    assert (attention.mask, attention.window) == (kind, window)


class Given(Toy):
    """An attention whose mask is made of inputs."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__(F.scaled_dot_product_attention)
        self.make = make
        self.table = nn.Parameter(torch.rand(2, 6, 6))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        mask = self.make(seen)
        if mask.is_floating_point() and mask.dim() == 3:
            mask = mask[:, None] + self.table
        self.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)
        return super().forward(x)


def low(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))


GIVEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "keys": (lambda seen: seen[:, None, None].bool(), "padding"),
    "keys, added": (lambda seen: (1.0 - seen[:, None, None].float()) * -1e9, "padding"),
    "causal": (
        lambda seen: seen[:, None, None].bool() & (places()[1] <= places()[0]), "causal+padding"
    ),
    "with a table": (lambda seen: (1.0 - seen[:, None].float()) * -1e9, "padding+bias"),
    "chosen": (lambda seen: torch.where(seen[:, None, None] > 0, SLOPES, -1e9), "padding+bias"),
    "queries": (lambda seen: seen[:, None, :, None].bool().expand(2, 1, 6, 6), "input"),
    "pairs": (lambda seen: seen[:, None, :, None] == seen[:, None, None], "input"),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_masks_made_of_inputs(name: str) -> None:
    make, kind = GIVEN[name]
    seen = torch.ones(2, 6, dtype=torch.long)
    assert only(Given(make), X, seen).mask == kind


def test_a_mask_that_is_an_input_is_not_guessed() -> None:
    model = Given(lambda mask: mask)
    assert only(model, X, torch.zeros(2, 1, 6, 6)).mask == "input"


def test_a_window_that_the_example_cannot_show() -> None:
    """With a dynamic length, a mask that only looks causal on short inputs is not called causal."""

    class Long(Toy):
        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[1])
            behind = place[:, None] - place
            keep = (behind >= 0) & (behind < 4096)
            self.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, keep)
            return super().forward(x)

    model = Long(F.scaled_dot_product_attention).eval()
    shapes = ({1: torch.export.Dim("seq", min=2, max=9000)},)
    (attention,) = capture(model, (X,), dynamic_shapes=shapes).attentions()
    assert attention.mask == "input"
    assert only(Long(F.scaled_dot_product_attention)).mask == "causal"


# Cores


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k) / 2, dim=-1) @ v


def scaled_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q * 0.5, k), dim=-1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(4, 6, 4) for x in (q, k, v))
    probs = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, dim=-1)
    return torch.bmm(probs, v).view(2, 2, 6, 4)


def with_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(4, 6, 4) for x in (q, k, v))
    bias = torch.arange(6.0).expand(4, 6, 6)
    attn = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
    return torch.bmm(torch.softmax(attn, dim=-1), v).view(2, 2, 6, 4)


def with_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    probs = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) * 0.5, dim=-1)
    return torch.einsum("bhij,bjhd->bihd", probs, v).transpose(1, 2)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    below = torch.ones(6, 6, dtype=torch.bool).tril()
    return torch.softmax((scores(q, k) / 2).masked_fill(~below, float("-inf")), dim=-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    below = torch.ones(6, 6, dtype=torch.bool).tril()
    kept = torch.where(below, scores(q, k) / 2, torch.finfo(torch.float32).min)
    return torch.softmax(kept, dim=-1, dtype=torch.float32).type_as(q) @ v


def stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k) * 0.5
    return torch.softmax(s - s.amax(dim=-1, keepdim=True), dim=-1) @ v


def twice_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = -torch.arange(6.0).expand(6, 6)
    below = torch.full((6, 6), float("-inf")).triu(1)
    return torch.softmax(scores(q, k) / 2 + bias + below, dim=-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tanh(scores(q, k) * 0.5 / 30.0) * 30.0
    return torch.softmax(s + torch.full((6, 6), float("-inf")).triu(1), dim=-1) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([scores(q, k) * 0.5, torch.zeros(2, 2, 6, 1)], dim=-1)
    return torch.softmax(s, dim=-1)[..., :-1] @ v


CORES: dict[Core, str] = {
    spelled: "none", scaled_queries: "none", batched: "none", with_baddbmm: "bias",
    with_einsum: "none", filled: "causal", chosen: "causal", stable: "none",
    twice_masked: "causal+bias", capped: "causal", with_sink: "none",
}  # fmt: skip


@pytest.mark.parametrize("core", CORES)
def test_cores(core: Core) -> None:
    program = capture(Toy(core).eval(), (X,))
    (attention,) = program.attentions()
    assert attention.mask == CORES[core]
    assert attention.scale == pytest.approx(0.5)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (2, 2, 4)
    assert (attention.softcap, len(attention.layers)) == (30.0 if core is capped else None, 4)
    replays(program, [X])


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), dim=-2) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k)) @ v


def cubed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k) ** 3, dim=-1) @ v


@pytest.mark.parametrize("core", [over_queries, gated, cubed])
def test_what_is_no_attention(core: Core) -> None:
    assert not capture(Toy(core).eval(), (X,)).attentions()


# Rows


@pytest.mark.parametrize(
    ("start", "steps", "rows"),
    [
        (2, [(3, 1)], [2, 3, 4]),
        (1, [(2, 6), (2, 1)], [1, 2, 7, 8]),
        (0, [(2, 4), (2, 2), (2, 1)], list(range(8))),
    ],
)
def test_rows(start: int, steps: list[tuple[int, int]], rows: list[int]) -> None:
    found = Rows.of(start, steps)
    assert found is not None
    assert (found.take(torch.arange(12)).tolist(), found.count) == (rows, len(rows))
    assert (found.span is not None) == (rows == list(range(rows[0], rows[-1] + 1)))


def test_rows_that_meet_twice_are_no_set() -> None:
    assert Rows.of(0, [(3, 1), (2, 2)]) is None


def test_unions_of_rows() -> None:
    even, odd = Rows(0, ((4, 2),)), Rows(1, ((4, 2),))
    assert even.union(odd) == Rows(0, ((8, 1),))
    assert Rows(0, ((2, 1),)).union(Rows(2, ((6, 1),))) == Rows(0, ((8, 1),))
    assert Rows(0, ((2, 1),)).union(Rows(3, ((6, 1),))) is None


def test_scale_of_an_op_is_known() -> None:
    assert only(Toy(F.scaled_dot_product_attention)).scale == pytest.approx(1 / math.sqrt(4))
