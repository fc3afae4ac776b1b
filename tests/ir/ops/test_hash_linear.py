"""The op of hashed tables: what it means, its gradients, what it costs, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from blockwright.backends.cpu_ops import lower_structural
from blockwright.backends.onnxruntime import OnnxRuntimeBackend
from blockwright.driver.account import Meter
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.kernels.hashing import SCORES, hashed, rows_of

OP = torch.ops.blockwright.hash_linear
THREADS = {"threads": 1}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("score", SCORES)
def test_it_is_a_sum_of_rows_however_they_are_read(score: str) -> None:
    x, tables, bias = torch.randn(2, 5, 12), torch.randn(4, 8, 7), torch.randn(7)
    code, weight = hashed(x, 3, score)
    rows, flat = rows_of(code, 3), tables.flatten(0, 1)
    y = OP(x, tables, bias, score)
    gathered = (weight[..., None] * flat[rows]).sum(dim=-2) + bias
    bag = nn.functional.embedding_bag(
        rows.flatten(0, 1), flat, mode="sum", per_sample_weights=weight.flatten(0, 1)
    )
    torch.testing.assert_close(y, gathered, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(y, bag.view(2, 5, 7) + bias, atol=1e-6, rtol=1e-5)


def test_tables_side_by_side_are_layers_that_read_one_value() -> None:
    x, parts = torch.randn(6, 8), [torch.randn(2, 16, width) for width in (3, 5, 1)]
    together = OP(x, torch.cat(parts, dim=-1), None, "l1_softmax")
    apart = [OP(x, part, None, "l1_softmax") for part in parts]
    assert torch.equal(together, torch.cat(apart, dim=-1))


def test_chunks_do_not_see_each_other() -> None:
    x, tables = torch.randn(1, 12), torch.randn(4, 8, 5)
    other = x.clone()
    other[:, 3:6] = torch.randn(3)
    change = OP(other, tables, None, "softmax") - OP(x, tables, None, "softmax")
    own = [OP(v[:, 3:6], tables[1:2], None, "softmax") for v in (other, x)]
    torch.testing.assert_close(change, own[0] - own[1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("biased", [True, False])
def test_gradients(score: str, biased: bool) -> None:
    x, tables, bias = drawn(2, 3, 6), drawn(2, 8, 3), drawn(3)
    assert torch.autograd.gradcheck(
        lambda *given: OP(*given, score), (x, tables, bias if biased else None)
    )


def test_only_addressed_rows_have_gradients() -> None:
    x, tables = torch.randn(5, 8), torch.randn(2, 16, 3, requires_grad=True)
    OP(x, tables, None, "l1_softmax").sum().backward()
    assert tables.grad is not None
    code, _ = hashed(x, 4, "l1_softmax")
    for table in range(2):
        used = tables.grad[table].abs().sum(dim=-1) > 0
        assert set(used.nonzero().flatten().tolist()) == set(code[:, table].tolist())


def test_registration_is_sound_for_training() -> None:
    x, tables, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 6), (2, 8, 4), (4,)))
    torch.library.opcheck(OP.default, (x, tables, bias, "softmax"))


class Hashed(nn.Module):
    """Tables of three bits on rows of 12."""

    def __init__(self, score: str = "l1_softmax", *, bias: bool = True) -> None:
        super().__init__()
        self.tables, self.score = nn.Parameter(torch.randn(4, 8, 10)), score
        self.bias = nn.Parameter(torch.randn(10)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return OP(x, self.tables, self.bias, self.score)


def captured(score: str, *, bias: bool) -> Program:
    tokens = {0: Dim("batch", min=1, max=64), 1: Dim("seq", min=1, max=64)}
    model = Hashed(score, bias=bias).eval()
    return capture(model, torch.randn(2, 5, 12), dynamic_shapes=(tokens,))


def on_onnxruntime(program: Program) -> Callable[[list[Tensor]], list[Tensor]]:
    return OnnxRuntimeBackend().lower(program, THREADS).run


def on_pytorch(program: Program) -> Callable[[list[Tensor]], list[Tensor]]:
    lowered = lower_structural(program, {})
    assert {str(n.target) for n in lowered.main.nodes} >= {"blockwright_cpu.hash_linear.default"}
    return lambda inputs: list(lowered.module()(*inputs))


@pytest.mark.parametrize("lower", [on_onnxruntime, on_pytorch])
@pytest.mark.parametrize(
    ("score", "bias"),
    [("l1_softmax", True), pytest.param("softmax", False, marks=pytest.mark.slow)],
)
def test_any_batch_and_length(
    lower: Callable[[Program], Callable[[list[Tensor]], list[Tensor]]], score: str, bias: bool
) -> None:
    program = captured(score, bias=bias)
    call = lower(program)
    for shape in ((2, 5, 12), (1, 1, 12), (9, 8, 12)):
        x = torch.randn(shape)
        x[0, 0, :3] = torch.tensor([0.0, -0.0, -1.0])
        torch.testing.assert_close(call([x]), run(program, [x]), atol=1e-5, rtol=1e-5)


def test_cost_counts_rows_that_are_read() -> None:
    program = captured("l1_softmax", bias=True)
    cost = program.cost({"batch": 1, "seq": 9})
    assert cost.parameters == 4 * 8 * 10 + 10
    assert cost.activated_parameters == 4 * 10 + 10
    assert cost.by_kind == {"elementwise": 3 * 9 * 12, "linear": 2 * 9 * 4 * 10}
    meter = Meter(program)
    run(program, [torch.randn(1, 9, 12)], on_node=meter.saw)
    counts = meter.counts()
    assert counts["activated_parameters"] == cost.activated_parameters
    assert counts["flops"] == cost.flops


@pytest.mark.parametrize(
    ("tables", "score", "message"),
    [
        ((4, 8, 5), "cosine", "score='cosine' is unknown"),
        ((4, 6, 5), "softmax", "4 tables of 6 rows do not fit 12 features"),
        ((3, 8, 5), "softmax", "3 tables of 8 rows do not fit 12 features"),
    ],
)
def test_what_does_not_fit_is_refused(tables: tuple[int, ...], score: str, message: str) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OP(x, torch.ones(tables), None, score)

    with pytest.raises(Exception, match=message) as caught:
        capture(Wrong(), torch.randn(2, 12))
    assert isinstance(caught.value, OptionError) or caught.value.__cause__ is not None
