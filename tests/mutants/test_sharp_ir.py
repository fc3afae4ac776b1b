"""What mutants of the intermediate representation showed to be untested elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.ir.capture import capture
from blockwright.ir.errors import VerifyError
from blockwright.ir.graphs import copy_graph
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.ir.serialize import from_json, to_json
from blockwright.ir.shapes import fake_mode
from blockwright.ir.verify import check_shapes, verify


class Plain(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class Chain(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Spare(nn.Module):
    """Two layers that share a weight and are never called, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.one, self.two = (nn.Linear(4, 4) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_names_of_tensors_that_are_left_out_go_with_them() -> None:
    program = capture(Spare().eval(), (torch.ones(2, 4),))
    assert set(program.tensors) == {"used.weight", "used.bias"}
    assert not program.aliases


class Wired(nn.Module):
    """Two blocks that call the same ops on the same shapes, wired differently."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.layer, self.down, self.crossed = nn.Linear(4, 4), nn.Linear(4, 4), crossed

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.layer(x))
        b = torch.tanh(a)
        return x + self.down(b * torch.tanh(a if self.crossed else b))


def test_blocks_that_are_wired_differently_share_no_class() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = Chain(*(Wired(i in (2, 3)) for i in range(5))).eval()
    program = capture(model, (x,))
    assert torch.equal(run(program, [x])[0], run(capture(model, (x,), fold=False), [x])[0])


class Shift(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 4), nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x)) * self.shift


def test_blocks_with_weights_of_other_shapes_share_no_class() -> None:
    program = capture(Chain(*(Shift(size) for size in (4, 4, 1, 1))).eval(), (torch.ones(2, 4),))
    verify(program)
    for key in {instance.block for instance in program.instances.values()}:
        shapes = [
            tuple(program.weight(slot, name).shape for slot in program.instances[name].weights)
            for name in program.instances_of(key)
        ]
        assert len(set(shapes)) == 1


def test_a_rewrite_keeps_further_names_of_tied_weights(program: Program) -> None:
    region = next(r for r in program.regions(Linear) if r.label.endswith(".up"))
    layer = nn.Linear(8, 12, bias=region.bias is not None)
    new = rewrite(program, [(region, layer)], by="test")
    assert program.aliases
    assert new.aliases == program.aliases


def test_shared_key_heads_are_counted_for_every_query_head() -> None:
    q, k, v = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 6)
    attend = Plain(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    cost = capture(attend, (q, k, v)).cost()
    assert cost.by_kind["attention"] == 2 * 4 * 3 * 5 * (8 + 6)


def test_keyword_arguments_are_part_of_the_structure() -> None:
    x = torch.ones(2, 4)
    hashes = {
        capture(Plain(lambda x, kind=kind: F.gelu(x, approximate=kind)), (x,)).structure_hash()
        for kind in ("none", "tanh")
    }
    assert len(hashes) == 2


def test_eps_of_a_norm_is_the_one_given() -> None:
    model = Plain(lambda x: F.layer_norm(x, [4], eps=1e-3) + F.rms_norm(x, [4], eps=1e-2))
    norms = capture(model, (torch.ones(2, 4),)).norms()
    assert [norm.eps for norm in norms] == [1e-3, 1e-2]


class Network(nn.Module):
    """A feed-forward network on a stream."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(4, 8), nn.Linear(8, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x), approximate=self.kind))


@pytest.mark.parametrize(("kind", "name"), [("none", "gelu"), ("tanh", "gelu_tanh")])
def test_the_two_gelus_are_told_apart(kind: str, name: str) -> None:
    (network,) = capture(Network(kind).eval(), (torch.ones(2, 4),)).feed_forwards()
    assert network.activation == name


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def test_state_comes_after_the_results() -> None:
    (slot,) = capture(Counting(), (torch.ones(2),)).state
    assert slot.output == 1


def test_checking_a_graph_that_fixes_a_size_does_not_fix_it() -> None:
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    captured = capture(nn.Linear(4, 4).eval(), (torch.ones(3, 4),), dynamic_shapes=shapes)
    # Symbols of captured programs are frozen; those of programs from files are not.
    program = from_json(to_json(captured), captured.tensors)
    before, graph = program.structure_hash(), copy_graph(program.main)
    mode, last = fake_mode(graph), next(n for n in graph.nodes if n.op == "call_function")
    with graph.inserting_after(last):
        shift = graph.get_attr("shift")
        shift.meta["val"] = mode.from_tensor(torch.ones(3, 4), static_shapes=True)
    with graph.inserting_after(shift):
        total = graph.call_function(torch.ops.aten.add.Tensor, (last, shift))
        total.meta["val"] = last.meta["val"]
    with contextlib.suppress(VerifyError):
        check_shapes(graph, "main", "test")
    assert program.structure_hash() == before


def test_queries_may_be_the_last_of_the_keys() -> None:
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 6, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(3, 6, dtype=torch.bool).tril(3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    (attention,) = capture(Plain(attend), (q, k, k.clone())).attentions()
    assert attention.mask == "causal"


class Joint(nn.Module):
    """Attention with fewer key heads, its projections joined in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split((8, 4, 4), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


def test_heads_of_queries_and_keys() -> None:
    (attention,) = capture(Joint().eval(), (torch.ones(1, 3, 8),)).attentions()
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 2)


def test_a_split_joint_projection_has_its_rows() -> None:
    (attention,) = capture(Joint().eval(), (torch.ones(1, 3, 8),)).attentions()
    rows = [layer.rows for layer in (attention.query, attention.key, attention.value) if layer]
    assert [r and r.span for r in rows] == [(0, 8), (8, 12), (12, 16)]


def test_the_causal_flag_of_an_op_is_a_mask() -> None:
    x = torch.ones(1, 2, 3, 4)
    attend = Plain(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    (attention,) = capture(attend, (x, x.clone(), x.clone())).attentions()
    assert (attention.is_causal, attention.mask) == (True, "causal")
