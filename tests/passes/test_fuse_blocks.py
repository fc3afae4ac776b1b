"""FuseBlocks: fires, declines, starts as plain removal, folds, leaves the rest alone, refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.driver.student import Student, Teacher
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Block, Linear
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.models import bert, dit, flux, gpt, llama, qwen_image, sd3, swin, vit
from blockwright.passes import DropBlocks, FuseBlocks, QuantizeWeights
from blockwright.passes.fuse_blocks import group_of
from blockwright.passes.shared.grafts import GraftedMatrix, GraftedVector
from blockwright.passes.shared.recovery import Stage

Sets = list[list[Tensor]]
DEEP = gpt.GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=6, ffn_dim=12)
QUICK = Recover(steps=4)


def deep() -> gpt.GPT:
    torch.manual_seed(0)
    return gpt.GPT(DEEP).eval()


@pytest.fixture(scope="module")
def stack() -> Program:
    """Six blocks."""
    return capture(deep(), (torch.zeros(4, 8, dtype=torch.int64),))


@pytest.fixture(scope="module")
def sets() -> Sets:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(0, 32, (4, 8), generator=generator)] for _ in range(4)]


def label(index: int) -> str:
    return f"blocks.{index}.block"


def fuse(program: Program, sets: Sets, recover: Recover | bool = QUICK, **options: Any) -> Any:
    settings = {"group": 4, "rank": 2, **options}
    new, (step,) = run_passes(
        program, [FuseBlocks(**settings)], sets[:1], calibration=sets, recover=recover
    )
    return new, step


def stage_of(program: Program, pass_: FuseBlocks) -> tuple[Program, Stage]:
    """Return a program after one removal, and how it would be trained."""
    plan = pass_.plan(program)
    found = [
        (block, pass_.replace(block, plan.decisions[block.label]))
        for block in program.blocks()
        if block.label in plan.decisions
    ]
    new = rewrite(program, found, by=pass_.name)
    torch.manual_seed(0)
    (stage,) = pass_.recovery(program, new, plan)
    return new, stage


def names_of(program: Program) -> list[str]:
    return [block.label for block in program.blocks()]


# Fires.


def test_golden(program: Program, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [FuseBlocks(blocks=(label(1),))])
    golden("fuse_blocks", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_each_round_decides_on_what_the_one_before_left(stack: Program, sets: Sets) -> None:
    new, step = fuse(stack, sets, keep_ratio=0.5)
    decisions = step.plan.decisions
    assert len(new.blocks()) == 3
    assert [d.depth for d in decisions.values()] == [6, 5, 4]
    assert set(names_of(new)) == set(names_of(stack)) - decisions.keys()
    gone: set[str] = set()
    for name, decision in decisions.items():
        assert len(decision.group) == 3
        assert not gone & set(decision.group)
        gone.add(name)
    assert [t.stage for t in step.receipt.trained] == [f"group of {name}" for name in decisions]
    assert step.certificate is not None


def test_the_block_of_least_influence_goes_first(stack: Program, sets: Sets) -> None:
    silent = {n: torch.zeros_like(t) if _silences(n, 3) else t for n, t in stack.tensors.items()}
    _, step = fuse(stack.with_(tensors=silent), sets, keep_ratio=0.9)
    assert list(step.plan.decisions) == [label(3)]
    assert abs(step.plan.decisions[label(3)].influence) < 1e-6


def _silences(name: str, index: int) -> bool:
    return name.startswith((f"blocks.{index}.attention.out", f"blocks.{index}.down"))


def test_blocks_go_in_the_order_given(stack: Program, sets: Sets) -> None:
    new, step = fuse(stack, sets, blocks=(label(4), label(1)))
    assert names_of(new) == [label(i) for i in (0, 2, 3, 5)]
    assert {name: d.depth for name, d in step.plan.decisions.items()} == {label(4): 6, label(1): 5}


def test_a_plan_is_replayed_round_by_round(stack: Program, sets: Sets) -> None:
    options = FuseBlocks(keep_ratio=0.5, group=4, rank=2)
    new, (step,) = run_passes(stack, [options], calibration=sets, recover=QUICK)
    again, (other,) = run_passes(
        stack, [options], calibration=sets, recover=QUICK, plans=[step.plan.to_json()]
    )
    assert other.plan == step.plan
    assert all(torch.equal(again.tensors[name], t) for name, t in new.tensors.items())


def test_a_plan_that_decides_more_than_is_carried_out_is_refused(
    stack: Program, sets: Sets
) -> None:
    _, step = fuse(stack, sets, recover=False, keep_ratio=0.5)
    with pytest.raises(OptionError, match=r"decides about 3 places.*1 of them"):
        run_passes(stack, [FuseBlocks(keep_ratio=0.9)], plans=[step.plan])


@pytest.mark.parametrize(
    ("index", "depth", "size", "expected"),
    [
        (0, 32, 8, (0, 8)),
        (3, 32, 8, (0, 8)),
        (4, 32, 8, (0, 8)),
        (5, 32, 8, (1, 9)),
        (28, 32, 8, (24, 32)),
        (29, 32, 8, (24, 32)),
        (31, 32, 8, (24, 32)),
        (2, 6, 4, (0, 4)),
        (1, 3, 8, (0, 3)),
        (3, 9, 3, (2, 5)),
    ],
)
def test_groups(index: int, depth: int, size: int, expected: tuple[int, int]) -> None:
    blocks: Any = range(depth)
    assert tuple(group_of(blocks, index, size)) == tuple(range(*expected))


def test_a_group_larger_than_the_stack_is_the_stack(stack: Program, sets: Sets) -> None:
    _, step = fuse(stack, sets, recover=False, keep_ratio=0.9, group=100)
    (decision,) = step.plan.decisions.values()
    assert len(decision.group) == 5


# The invariants.


@pytest.mark.parametrize("coefficient", ["low_rank", "row", "matrix", "none"])
def test_a_graft_begins_as_plain_removal(stack: Program, sets: Sets, coefficient: str) -> None:
    pass_ = FuseBlocks(blocks=(label(2),), group=4, rank=2, coefficient=coefficient)
    new, stage = stage_of(stack, pass_)
    tensors = Student(new, stage).tensors()
    assert tensors.keys() == {
        n for n in new.tensors if n.startswith(("blocks.0", "blocks.1", "blocks.3"))
    }
    assert all(torch.equal(tensor, new.tensors[name]) for name, tensor in tensors.items())
    dropped, _ = run_passes(stack, [DropBlocks(blocks=(2,))])
    (ours,), (theirs,) = run(new, sets[0]), run(dropped, sets[0])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("coefficient", ["low_rank", "row", "matrix", "none"])
@pytest.mark.parametrize("biased", [False, True])
def test_folding_keeps_the_numbers(coefficient: str, biased: bool) -> None:
    torch.manual_seed(0)
    own, donor, bias, x = torch.randn(6, 4), torch.randn(6, 4), torch.randn(2, 6), torch.randn(9, 4)
    graft = GraftedMatrix(own, donor, rank=2, form=coefficient)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.normal_()
        y = F.linear(x, own) + F.linear(F.linear(x, graft.lora_a), graft.lora_b)
        if coefficient != "none":
            factors = list(graft.coef)
            coefficients = factors[0] @ factors[1] if len(factors) == 2 else factors[0]
            y = y + F.linear(x, coefficients.expand(6, 4) * donor)
        folded = F.linear(x, graft())
        if biased:
            vector = GraftedVector(bias[0], bias[1])
            vector.coef.normal_()
            y = y + bias[0] + vector.coef * bias[1]
            folded = folded + vector()
    assert (folded - y).abs().max() < 1e-5 * y.abs().max()


def test_half_precision_is_folded_in_single_precision() -> None:
    own = torch.randn(4, 4, dtype=torch.bfloat16)
    graft = GraftedMatrix(own, torch.randn(4, 4, dtype=torch.bfloat16), rank=9, form="low_rank")
    assert {p.dtype for p in graft.parameters()} == {torch.float32}
    assert graft.lora_a.shape == (4, 4)  # ranks are clipped to the layer
    assert torch.equal(graft(), own)
    with torch.no_grad():
        graft.lora_b.normal_()
    exact = own.float() + graft.lora_b @ graft.lora_a
    assert torch.equal(graft(), exact.to(torch.bfloat16))


def test_the_folded_program_gives_what_the_student_gave(stack: Program, sets: Sets) -> None:
    new, stage = stage_of(stack, FuseBlocks(blocks=(label(2),), group=4, rank=2))
    student, teacher = Student(new, stage), Teacher(stack, stage)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        wanted, given = teacher(sets[0])
        before = student(sets[0], given, wanted)
        folded = new.with_(tensors={**new.tensors, **student.tensors()})
        alone = dataclasses.replace(stage, weights={"blocks.0.up.bias": None})
        after = Student(folded, alone)(sets[0], given, wanted)
    assert torch.equal(before, after)


def test_what_is_outside_of_the_group_stays(stack: Program, sets: Sets) -> None:
    new, step = fuse(stack, sets, blocks=(label(1),), group=2)
    assert list(step.plan.decisions[label(1)].group) == [label(0)]
    inside = {name for name in new.tensors if name.startswith("blocks.0.")}
    for name, tensor in new.tensors.items():
        assert torch.equal(tensor, stack.tensors[name]) == (name not in inside), name
    per_block = sum(t.numel() for n, t in stack.tensors.items() if n.startswith("blocks.1."))
    assert new.cost().parameters == stack.cost().parameters - per_block


def test_nothing_to_remove_is_the_same_program(stack: Program, sets: Sets) -> None:
    with pytest.raises(NoMatchError, match="changed nothing"):
        fuse(stack, sets, keep_ratio=1.0)
    new, _ = fuse(stack, sets, keep_ratio=1.0, allow_no_match=True)
    assert new is stack


def test_training_brings_the_group_nearer(stack: Program, sets: Sets) -> None:
    _, step = fuse(stack, sets, Recover(steps=30, rate=3.0), keep_ratio=0.9)
    (training,) = step.receipt.trained
    assert training.kept
    assert training.after < 0.97 * training.before


@pytest.mark.parametrize("loss", ["mse", "kl_feature", "kl_batch"])
@pytest.mark.parametrize("coefficient", ["low_rank", "row", "matrix", "none"])
def test_losses_and_coefficients_train(
    stack: Program, sets: Sets, loss: str, coefficient: str
) -> None:
    _, step = fuse(stack, sets, blocks=(label(2),), loss=loss, coefficient=coefficient)
    (training,) = step.receipt.trained
    assert 0 < training.after < training.before


def test_rates(stack: Program) -> None:
    _, stage = stage_of(stack, FuseBlocks(blocks=(label(2),), rate=2e-3, base_rate=1e-5))
    assert (stage.rate, stage.rates, stage.betas) == (1e-5, {"coef*": 2e-3}, (0.9, 0.95))
    names = {n for m in stage.weights.values() if m for n, _ in m.named_parameters()}
    assert names == {"lora_a", "lora_b", "coef.0", "coef.1", "value", "coef"}


# Any recognised stack.


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: gpt.GPT(gpt.TOY),
    "llama": lambda: llama.Llama(llama.TOY),
    "bert": lambda: bert.Bert(bert.TOY),
    "vit": lambda: vit.ViT(vit.TOY),
    "dit": lambda: dit.DiT(dit.TOY),
    "sd3": lambda: sd3.SD3(sd3.TOY_SD3),
    "flux": lambda: flux.Flux(flux.TOY_FLUX),
    "qwen_image": lambda: qwen_image.QwenImage(qwen_image.TOY),
    "swin": lambda: swin.Swin(swin.TOY),
}


SLOW = ("flux", "qwen_image", "sd3", "swin")


@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS]
)
def test_families(family: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    example = model.example_inputs()  # type: ignore[operator]
    program = capture(model, example)
    inputs = [list(program.arranged(program.signature.bind(example, {})))]
    pass_ = FuseBlocks(keep_ratio=0.8, group=4, rank=2)
    new, (step,) = run_passes(program, [pass_], calibration=inputs, recover=QUICK)
    assert len(step.plan.decisions) == len(program.blocks()) - len(new.blocks()) >= 1
    for training in step.receipt.trained:
        assert 0 < training.after < training.before
    last = min(step.plan.decisions.values(), key=lambda decision: decision.depth)
    for block in new.blocks():
        matrices = [new.tensors[name] for name in _matrices(block)]
        before = [program.tensors[name] for name in _matrices(block)]
        moved = [not torch.equal(a, b) for a, b in zip(matrices, before, strict=True)]
        assert sum(moved) >= 3 or block.label not in last.group
    assert all(torch.isfinite(y).all() for y in run(new, inputs[0]))


def _matrices(block: Block) -> list[str]:
    layers = [x for x in block.program.regions(Linear) if x.instance == block.instance]
    return [x.tensor_name(x.weight_node) for x in layers if {*x.nodes} <= {*block.nodes}]


def test_the_layers_that_modulate_are_grafted_too() -> None:
    torch.manual_seed(0)
    program = capture(dit.DiT(dit.TOY).eval(), dit.DiT(dit.TOY).example_inputs())
    _, stage = stage_of(program, FuseBlocks(blocks=(label(1),)))
    modulation = [name for name in stage.weights if "modulation" in name and "weight" in name]
    assert len(modulation) == 2
    assert all(stage.weights[name].donor is not None for name in modulation)  # type: ignore[union-attr]


def test_a_shared_weight_is_left_alone() -> None:
    model = deep()
    model.blocks[3].up.weight = model.blocks[0].up.weight
    program = capture(model, (torch.zeros(4, 8, dtype=torch.int64),))
    new, stage = stage_of(program, FuseBlocks(blocks=(label(2),), group=4))
    shared = "blocks.0.up.weight"
    assert new.aliases.get(shared, shared) not in stage.weights
    assert "blocks.0.down.weight" in stage.weights


def test_blocks_that_are_built_otherwise_get_no_graft() -> None:
    model = deep()
    torch.manual_seed(1)
    model.blocks[3] = gpt.Block(dataclasses.replace(DEEP, ffn_dim=20))
    program = capture(model.eval(), (torch.zeros(4, 8, dtype=torch.int64),))
    _, stage = stage_of(program, FuseBlocks(blocks=(label(2),), group=4))
    donors = {name: stage.weights[f"{name}.up.weight"].donor for name in ("blocks.1", "blocks.3")}  # type: ignore[union-attr]
    assert donors["blocks.3"] is None
    assert torch.equal(donors["blocks.1"], program.tensors["blocks.2.up.weight"])


# It exports as an ordinary smaller model.


def test_what_is_left_loads_into_a_smaller_gpt(stack: Program, sets: Sets) -> None:
    new, _ = fuse(stack, sets, blocks=(label(1), label(4)))
    small = gpt.GPT(dataclasses.replace(DEEP, depth=4)).eval()
    small.load_state_dict(new.state_dict(renumbered=True))
    assert torch.equal(small(sets[0][0]), run(new, sets[0])[0])
    assert "blocks.5.up.weight" in new.state_dict()
    assert "blocks.5.up.weight" not in new.state_dict(renumbered=True)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_left_loads_into_a_smaller_model_of_hugging_face(kind: str, sets: Sets) -> None:
    transformers = pytest.importorskip("transformers")

    def build(depth: int) -> nn.Module:
        ids = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
        if kind == "gpt2":
            config = transformers.GPT2Config(
                n_layer=depth, n_embd=8, n_head=2, n_positions=16, **ids
            )
            return transformers.GPT2LMHeadModel(config).eval()
        config = transformers.LlamaConfig(
            num_hidden_layers=depth, hidden_size=16, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, **ids,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    torch.manual_seed(0)
    program = capture(build(4), {"input_ids": sets[0][0]})
    new, _ = fuse(program, sets, blocks=(program.blocks()[1].label,))
    small = build(3)
    small.load_state_dict(new.state_dict(renumbered=True))
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=sets[0][0]).logits, run(new, sets[0])[0])


# Declines.


def test_declines_by_pattern(stack: Program, sets: Sets) -> None:
    _, step = fuse(stack, sets, recover=False, keep_ratio=0.8, exclude=("blocks.[0-4].*",))
    assert list(step.plan.decisions) == [label(5)]
    assert step.plan.skips[label(0)] == "is excluded by pattern"


def test_says_why_the_others_stay(stack: Program, sets: Sets) -> None:
    _, step = fuse(stack, sets, recover=False, keep_ratio=0.9)
    assert set(step.plan.skips.values()) == {"is kept: another matters less"}


def test_the_last_block_of_a_stack_stays(program: Program, tokens: Tensor) -> None:
    new, _ = fuse(program, [[tokens]], recover=False, keep_ratio=0.34)
    assert len(new.blocks()) == 1
    with pytest.raises(NoMatchError, match="is the only block of its stack"):
        run_passes(new, [FuseBlocks()], [[tokens]])


def test_blocks_that_share_all_their_weights_stay(sets: Sets) -> None:
    model = deep()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    program = capture(model, (sets[0][0],))
    with pytest.raises(NoMatchError, match="with dense weights of its own"):
        fuse(program, sets)


class Interrupted(nn.Module):
    """Two stacks: something else computes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = deep()
        self.middle = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        model = self.gpt
        x = model.tokens(tokens)
        for index, block in enumerate(model.blocks):
            x = block(x)
            if index == 2:
                x = self.middle(x)
        return model.head(model.norm(x))


def test_groups_end_where_a_stack_is_interrupted(sets: Sets) -> None:
    program = capture(Interrupted().eval(), (sets[0][0],))
    assert [len(stack.blocks) for stack in program.stacks()] == [3, 3]
    new, step = fuse(program, sets, blocks=("gpt.blocks.2.block",), group=4)
    assert step.plan.decisions["gpt.blocks.2.block"].group == [
        "gpt.blocks.0.block",
        "gpt.blocks.1.block",
    ]
    assert torch.equal(new.tensors["middle.weight"], program.tensors["middle.weight"])
    assert len(new.blocks()) == 5


# Refuses.


@pytest.mark.parametrize(
    "options",
    [
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.1},
        {"group": 1},
        {"rank": 0},
        {"epochs": 0},
        {"samples": 0},
        {"rate": 0.0},
        {"base_rate": -1.0},
        {"blocks": ("blocks.1.block", "blocks.1.block")},
    ],
)
def test_refuses_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        FuseBlocks(**options)


@pytest.mark.parametrize("option", ["coefficient", "loss"])
def test_refuses_choices(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}=other is not supported"):
        FuseBlocks(**{option: "other"})


def test_refuses_to_remove_all_blocks(stack: Program, sets: Sets) -> None:
    with pytest.raises(OptionError, match=r"keep_ratio=0.1 of 6 blocks keeps none"):
        fuse(stack, sets, keep_ratio=0.1)
    with pytest.raises(OptionError, match="would fuse all 6 blocks of a stack"):
        fuse(stack, sets, blocks=tuple(names_of(stack)))


def test_refuses_a_block_that_is_not_there(stack: Program, sets: Sets) -> None:
    with pytest.raises(OptionError, match=r"there is no block 'blocks.9'.*has 6"):
        fuse(stack, sets, blocks=("blocks.9",))


def test_refuses_a_named_block_that_cannot_go(stack: Program, sets: Sets) -> None:
    with pytest.raises(OptionError, match="cannot fuse the block: it is excluded by pattern"):
        fuse(stack, sets, blocks=(label(1),), exclude=("*.1.*",))


def test_refuses_to_compare_a_batch_of_one(stack: Program, sets: Sets) -> None:
    single = [[tokens[:1]] for (tokens,) in sets]
    one = capture(deep(), (single[0][0],))
    with pytest.raises(OptionError, match="a calibration set has one alone"):
        fuse(one, single, blocks=(label(1),), loss="kl_batch")


def test_refuses_to_choose_without_calibration(stack: Program) -> None:
    with pytest.raises(OptionError, match="there are none"):
        run_passes(stack, [FuseBlocks()])
    with pytest.raises(OptionError, match="nobody has measured it"):
        FuseBlocks().plan(stack)


def test_refuses_calibration_with_nan() -> None:
    torch.manual_seed(0)
    program = capture(vit.ViT(vit.TOY).eval(), vit.ViT(vit.TOY).example_inputs())
    image = torch.full((2, 3, 8, 8), math.nan)
    before = {name: tensor.clone() for name, tensor in program.tensors.items()}
    with pytest.raises(OptionError, match="NaN"):
        run_passes(program, [FuseBlocks()], calibration=[[image]])
    with pytest.raises(OptionError, match="it holds NaN"):
        bw.compile(program, [FuseBlocks()], calibration=[(image,)], backend="eager")
    assert all(torch.equal(program.tensors[name], t) for name, t in before.items())


def test_order_is_checked_before_anything_runs(stack: Program, sets: Sets) -> None:
    with pytest.raises(OptionError, match="packs the weights that fuse-blocks must graft"):
        run_passes(stack, [QuantizeWeights(), FuseBlocks()], sets[:1])
