"""One block stands for a run: which runs, what it is taught, and how the blocks come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.student import Student, Teacher
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.flux import TOY_FLUX, Flux
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import FuseProjections, PruneContiguous, QuantizeWeights
from blockwright.passes.shared.contiguous import grown
from blockwright.passes.shared.least_squares import LeastSquares
from blockwright.passes.shared.probes import alignment_terms, probe
from blockwright.testing.families import FAMILIES, family

Sets = list[list[Tensor]]


def gpt(depth: int) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=depth, ffn_dim=12)
    return GPT(config).eval()


@pytest.fixture(scope="module")
def deep(tokens: Tensor) -> Program:
    return bw.capture(gpt(6), (tokens,))


@pytest.fixture(scope="module")
def sets() -> Sets:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randint(0, 32, (2, 8), generator=generator)] for _ in range(6)]


class Step(nn.Module):
    """A block whose attention is off; its network is linear, or bent as much as `bend` says."""

    def __init__(self, dim: int, bend: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.out.weight)
        if not bend:
            nn.init.constant_(self.up.bias, 100.0)  # where relu is the identity
        self.bend = bend
        with torch.no_grad():
            self.down.weight.mul_(bend or 0.3)
            self.down.bias.copy_(-self.down(self.up.bias) + self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        x = x + self.out(y)
        return x + self.down(torch.relu(self.up(x)))


def planted(bends: Sequence[float], dim: int = 6) -> tuple[Program, Sets]:
    """Return blocks of which those with no bend are exactly linear, and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(dim, bend) for bend in bends)).eval()
    sets = [[torch.randn(4, 8, dim)] for _ in range(8)]
    return bw.capture(model, (sets[0][0],)), sets


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [PruneContiguous(intervals=((0, 1),))], [[tokens]])
    golden("prune_contiguous", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize(
    ("start", "kept"), [("first", [0, 1, 3]), ("middle", [0, 1, 4]), ("last", [0, 2, 5])]
)
def test_what_is_left_is_the_model_with_fewer_blocks(
    tokens: Tensor, start: str, kept: list[int]
) -> None:
    model = gpt(6)
    pass_ = PruneContiguous(intervals=((1, 2), (3, -1)), start=start)
    new, (step,) = run_passes(bw.capture(model, (tokens,)), [pass_], [[tokens]])
    assert list(new.instances) == [f"blocks.{index}" for index in kept]
    model.blocks = nn.ModuleList(model.blocks[index] for index in kept)
    assert torch.equal(run(new, [tokens])[0], model(tokens))
    assert pass_.statistics(step.plan) == {"intervals": 2, "removed": 3}


def test_an_average_has_the_mean_of_the_weights(deep: Program, tokens: Tensor) -> None:
    new, _ = run_passes(deep, [PruneContiguous(intervals=((1, 3),), start="average")], [[tokens]])
    assert list(new.instances) == [f"blocks.{index}" for index in (0, 1, 4, 5)]
    assert set(new.tensors) < set(deep.tensors)
    for leaf in ("attention.query.weight", "ffn_norm.bias", "down.bias"):
        mean = torch.stack([deep.tensors[f"blocks.{i}.{leaf}"] for i in (1, 2, 3)]).mean(0)
        assert torch.equal(new.tensors[f"blocks.1.{leaf}"], mean)


@pytest.mark.parametrize("intervals", [(), ((2, 2),), ((0, 0), (3, 3))])
def test_nothing_to_remove_is_the_same_program(
    deep: Program, tokens: Tensor, intervals: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(NoMatchError, match="prune-contiguous changed nothing"):
        run_passes(deep, [PruneContiguous(intervals=intervals)], [[tokens]])
    pass_ = PruneContiguous(intervals=intervals, allow_no_match=True)
    new, _ = run_passes(deep, [pass_], [[tokens]], calibration=[[tokens]])
    assert new is deep


def test_a_linear_block_has_a_perfect_probe() -> None:
    program, sets = planted([0.5, 0.0, 0.0, 1.0])
    (stack,) = program.stacks()
    found = probe(stack, sets)
    errors = [error for (error,) in found.errors]
    assert max(errors[1:3]) < 1e-5
    assert all(0 < error < 1 for error in (errors[0], errors[3]))
    assert found.similarity[0][1:3] == pytest.approx([1, 1], abs=1e-6)
    assert found.similarity[0][3] < 1 - 1e-4


def test_no_probe_is_worse_than_the_identity(deep: Program, sets: Sets) -> None:
    (stack,) = deep.stacks()
    assert all(0 <= error <= 1 for (error,) in probe(stack, sets).errors)


def test_sums_give_what_all_samples_at_once_give() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    fit = LeastSquares()
    for index in range(0, 50, 10):
        fit.add(x[index : index + 10], y[index : index + 10])
    weight, bias = fit.solve()
    ones = torch.cat([x, torch.ones(50, 1)], dim=1).double()
    best = torch.linalg.lstsq(ones, y.double()).solution
    assert torch.allclose(torch.cat([weight.T, bias[None]]), best, atol=1e-6)
    rest = (ones @ best - y).norm() / y.norm()
    assert fit.error(weight, bias) == pytest.approx(rest.item(), rel=1e-6)


def test_alignment_is_one_for_turned_values() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, 4, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    for y, expected in ((3 * x @ turn + 1, 1.0), (torch.randn(5, 8, 4, generator=generator), 0.1)):
        cross, one, two = alignment_terms(x, y)
        assert (cross / (one * two).sqrt() > 0.999) == (expected == 1.0)


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [
        ([1.0], 0),
        ([1.0, 0.9], 1),
        ([1.0, 0.9, 0.85, 0.82], 3),
        ([1.0, 0.9, 0.85, 0.7, 0.69], 2),
        ([1.0, 0.99, 0.9], 1),
    ],
)
def test_a_run_ends_where_the_fall_turns_upwards(similarity: list[float], expected: int) -> None:
    assert grown(similarity, [True] * len(similarity), 1e-6) == expected


def test_a_run_ends_before_a_block_that_must_stay() -> None:
    assert grown([1.0, 0.9, 0.85, 0.82], [True, True, False, True], 0.0) == 1


PLANTED = [0.5, 0.5, 3.0, 0.0, 0.0, 0.0, 4.0, 8.0]  # after block 2, three blocks are linear


def test_planted_linear_blocks_are_found() -> None:
    program, sets = planted(PLANTED)
    _, (step,) = run_passes(program, [PruneContiguous(keep_ratio=5 / 8)], calibration=sets)
    (interval,) = set(step.plan.decisions.values())
    assert (interval.first, interval.last) == ("2.block", "5.block")
    assert interval.similarity == pytest.approx(1, abs=1e-5)
    assert step.receipt.changed == ("3.block", "4.block", "5.block")


def test_without_a_budget_there_are_more() -> None:
    program, sets = planted(PLANTED)
    _, (step,) = run_passes(
        program, [PruneContiguous(keep_ratio=0.2)], calibration=sets, recover=False
    )
    found = {(interval.first[0], interval.last[0]) for interval in step.plan.decisions.values()}
    assert found == {("0", "1"), ("2", "5"), ("6", "7")}


def test_the_budget_takes_the_cheapest_and_shortens_the_last() -> None:
    program, sets = planted(PLANTED)
    _, (step,) = run_passes(program, [PruneContiguous(keep_ratio=6 / 8)], calibration=sets)
    assert step.receipt.changed == ("3.block", "4.block")


def test_students_learn_alone(deep: Program, sets: Sets) -> None:
    """The gradient of a student is the same whatever another one is."""
    pass_ = PruneContiguous(intervals=((1, 2), (3, 5)))
    new, (step,) = run_passes(deep, [pass_], recover=False)
    (stage,) = pass_.recovery(deep, new, step.plan)

    def gradients(program: Program) -> dict[str, Tensor]:
        student = Student(program, stage)
        wanted, given = Teacher(deep, stage)(sets[0])
        found = torch.autograd.grad(student(sets[0], given, wanted), list(student.parameters()))
        return dict(zip(student.names, found, strict=True))

    other = {n: t + (n.startswith("blocks.1.")) * 0.1 for n, t in new.tensors.items()}
    before, after = gradients(new), gradients(new.with_(tensors=other))
    late = [name for name in before if name.startswith("blocks.3.")]
    assert len(late) == 16 == len(before) - len(late)
    assert all(torch.equal(before[name], after[name]) for name in late)
    assert any(not torch.equal(before[n], after[n]) for n in before if n not in late)
    assert all(bool(before[name].any()) for name in late if "key.bias" not in name)


def test_sequential_students_read_each_other(deep: Program) -> None:
    pass_ = PruneContiguous(intervals=((1, 2), (3, 5)), sequential=True)
    new, (step,) = run_passes(deep, [pass_], recover=False)
    (stage,) = pass_.recovery(deep, new, step.plan)
    assert not stage.feeds
    assert (
        len(PruneContiguous(intervals=((1, 2), (3, 5))).recovery(deep, new, step.plan)[0].feeds)
        == 2
    )


@pytest.mark.parametrize(
    "options", [{}, {"distance": "direction_l1"}, {"distance": "mse"}, {"length": 0.1}]
)
def test_only_students_move_and_they_come_closer(
    deep: Program, sets: Sets, options: dict[str, Any]
) -> None:
    pass_ = PruneContiguous(intervals=((1, 2), (4, 5)), epochs=2, **options)
    new, (step,) = run_passes(deep, [pass_], [sets[0]], calibration=sets)
    (training,) = step.receipt.trained
    assert training.after < training.before
    moved = {n for n, t in new.tensors.items() if not torch.equal(t, deep.tensors[n])}
    assert {name[:8] for name in moved} == {"blocks.1", "blocks.4"}


def test_everything_is_tuned_in_the_end(deep: Program, sets: Sets) -> None:
    pass_ = PruneContiguous(intervals=((1, 2),), fine_tune_epochs=2, output="kl")
    new, (step,) = run_passes(deep, [pass_], [sets[0]], calibration=sets)
    assert [training.stage for training in step.receipt.trained] == ["distil", "fine-tune"]
    assert step.receipt.trained[1].kept
    assert not torch.equal(new.tensors["blocks.4.up.weight"], deep.tensors["blocks.4.up.weight"])


def test_any_of_the_intervals_without_training(tokens: Tensor, sets: Sets, tmp_path: Path) -> None:
    """Tables of a trained engine: the fewer students, the closer to the teacher."""
    model, whole = gpt(6), ((1, 2), (3, 4))
    calibration = [tuple(inputs) for inputs in sets[:3]]
    pass_ = PruneContiguous(intervals=whole, epochs=8)
    engine = bw.compile(model, pass_, (tokens,), calibration=calibration, backend="eager")
    engine.save(tmp_path / "students.bw")
    taken = bw.Recover(weights=tmp_path / "students.bw")

    def table(*intervals: tuple[int, int]) -> bw.Engine:
        chosen = PruneContiguous(intervals=intervals, allow_no_match=True)
        return bw.compile(
            model, chosen, (tokens,), calibration=calibration, backend="eager", recover=taken
        )

    assert torch.equal(table(*whole)(tokens), engine(tokens))
    assert torch.equal(table()(tokens), model(tokens))
    losses = [(table(*some)(tokens) - model(tokens)).norm() for some in ((), whole[:1], whole)]
    assert losses == sorted(losses)
    one = table(whole[0])
    assert torch.equal(
        one.program.tensors["blocks.1.up.weight"], engine.program.tensors["blocks.1.up.weight"]
    )
    assert torch.equal(one.program.tensors["blocks.3.up.weight"], model.blocks[3].up.weight)


def test_a_saved_plan_is_replayed(deep: Program, sets: Sets) -> None:
    first, (step,) = run_passes(deep, [PruneContiguous()], calibration=sets, recover=False)
    plans = [step.plan.to_json()]
    second, _ = run_passes(deep, [PruneContiguous()], plans=plans, recover=False)
    assert first.text() == second.text()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    model = family(name)
    stacks = [stack for stack in model.program.stacks() if len(stack.blocks) > 1]
    if not stacks:
        pytest.skip("has no two blocks in a row")
    labels = [block.label for block in model.program.blocks()]
    starts = [labels.index(stack.blocks[0].label) for stack in stacks]
    pass_ = PruneContiguous(intervals=tuple((start, start + 1) for start in starts))
    new, (step,) = run_passes(model.program, [pass_], [model.inputs], calibration=[model.inputs])
    assert len(new.blocks()) == len(labels) - len(stacks)
    assert step.receipt.trained[0].after <= step.receipt.trained[0].before
    _, (found,) = run_passes(
        model.program, [PruneContiguous(keep_ratio=0.5)], calibration=[model.inputs], recover=False
    )
    assert found.receipt.changed


def test_both_stacks_of_flux() -> None:
    torch.manual_seed(0)
    model = Flux(TOY_FLUX).eval()
    inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    pass_ = PruneContiguous(intervals=((0, 1), (4, 5)))
    new, (step,) = run_passes(program, [pass_], [list(inputs)], calibration=[list(inputs)])
    assert [len(stack.blocks) for stack in new.stacks()] == [2, 2]
    (stage,) = pass_.recovery(program, new, step.plan)
    assert len(stage.feeds) == 3  # image and text, then both joined
    with pytest.raises(OptionError, match=r"\[2, 3\] runs over two stacks"):
        run_passes(program, [PruneContiguous(intervals=((2, 3),))], [list(inputs)])


@pytest.mark.parametrize("backend", ["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_with_other_passes_to_an_engine(
    tokens: Tensor, sets: Sets, tmp_path: Path, backend: str
) -> None:
    recipe = [PruneContiguous(intervals=((1, 2),)), FuseProjections(), QuantizeWeights()]
    calibration = [tuple(inputs) for inputs in sets]
    engine = bw.compile(gpt(4), recipe, (tokens,), calibration=calibration, backend=backend)
    engine.save(tmp_path / "model.bw")
    again = bw.load(tmp_path / "model.bw")
    assert torch.equal(again(tokens), engine(tokens))
    assert len(engine.program.blocks()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "is no fraction of blocks"),
        ({"start": "best"}, "start=best is not supported"),
        ({"distance": "cosine"}, "distance=cosine is not supported"),
        ({"output": "l1"}, "output=l1 is not supported"),
        ({"length": -1.0}, "use 0 or more"),
        ({"tolerance": -1.0}, "use 0 or more"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneContiguous(**options)


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (PruneContiguous(intervals=((0, 6),)), r"\[0, 6\] is none of a model of 6 blocks"),
        (PruneContiguous(intervals=((3, 2),)), r"\[3, 2\] is none of a model of 6 blocks"),
        (PruneContiguous(intervals=((0, 2), (2, 3))), r"\[2, 3\] overlaps another one"),
        (PruneContiguous(keep_ratio=0.05), "keep_ratio=0.05 of 6 blocks keeps none"),
    ],
)
def test_bad_plans(deep: Program, sets: Sets, pass_: PruneContiguous, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run_passes(deep, [pass_], calibration=sets)


def test_calibration_must_be_there_and_finite(deep: Program) -> None:
    with pytest.raises(OptionError, match="calibration inputs, and there are none"):
        run_passes(deep, [PruneContiguous()])
    program, sets = planted([0.5, 0.5])
    with pytest.raises(OptionError, match="NaN or infinity on the calibration inputs"):
        run_passes(program, [PruneContiguous()], calibration=[[sets[0][0] * torch.nan]])


def test_blocks_that_differ_have_no_average() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Step(6, 0.5), Step(6, 0.5)])
            self.blocks[1].up, self.blocks[1].down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    program = bw.capture(Mixed().eval(), (torch.randn(4, 8, 6),))
    with pytest.raises(OptionError, match="cannot average blocks that differ"):
        run_passes(program, [PruneContiguous(intervals=((0, 1),), start="average")])
    new, _ = run_passes(program, [PruneContiguous(intervals=((0, 1),), start="last")])
    assert len(new.blocks()) == 1
