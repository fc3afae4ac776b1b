"""QuantizeBlockwise: every operation on blocks, two lowerings of one result, ties kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import blockwright as bw
from blockwright.backends.block_ops import SPELLED, spell_blocks
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import LoweringError, NoMatchError, OptionError
from blockwright.ir.ops.block_values import grid_bytes
from blockwright.ir.program import Program
from blockwright.ir.recognize.operation import FORMS, Operation
from blockwright.ir.run import run
from blockwright.models.gpt import GPT
from blockwright.passes import Canonicalize, FuseProjections, QuantizeBlockwise
from blockwright.testing.families import FAMILIES, family

VARIANTS: list[dict[str, Any]] = [
    {},
    {"bits": 4, "activations": "fp8", "probabilities": "uint8"},
    {"activations": None, "scale": "float"},
]


def apart(new: Program, old: Program, inputs: list[Tensor]) -> float:
    """Distance of the first outputs, relative to their size."""
    after, before = run(new, inputs)[0], run(old, inputs)[0]
    return float((after - before).norm() / before.norm())


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    method = QuantizeBlockwise(bits=4, activation_block=8, weight_block=(4, 8))
    new, (step,) = run_passes(program, [method], [[tokens]])
    golden("quantize_blockwise", f"# {step.pass_}: {step.receipt}\n{new.text()}")


LARGE = {"dit", "flux", "swin"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in FAMILIES]
)
def test_every_family(name: str) -> None:
    of_family = family(name)
    program, inputs = of_family.program, of_family.inputs
    new, (step,) = run_passes(program, [QuantizeBlockwise()], [inputs])
    assert set(step.receipt.skipped.values()) <= {"is made of inputs alone"}
    assert apart(new, program, inputs) < 0.2
    assert new.cost().parameters == program.cost().parameters
    integer, _ = run_passes(program, [QuantizeBlockwise(lowering="integer")], [inputs])
    assert torch.equal(run(integer, inputs)[0], run(new, inputs)[0])
    assert all(torch.equal(new.tensors[n], integer.tensors[n]) for n in new.tensors)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_stay_near_the_model(options: dict[str, Any]) -> None:
    of_family = family("bert")
    new, (step,) = run_passes(of_family.program, [QuantizeBlockwise(**options)], [of_family.inputs])
    assert apart(new, of_family.program, of_family.inputs) < 0.2
    counts = QuantizeBlockwise(**options).statistics(step.plan)
    assert counts["coded_weights"] == 21
    alone = "activations" in options and options["activations"] is None
    assert (counts["operations_on_rounded_values"] == 0) == alone


def test_weights_on_the_grid_come_through_bit_by_bit(program: Program, tokens: Tensor) -> None:
    on_grid = {n: (t * 16).round().clamp(-100, 100) / 16 for n, t in program.tensors.items()}
    dense = program.with_(tensors=on_grid)
    for shape in ((32, 32), (1, 3)):
        method = QuantizeBlockwise(activations=None, weight_block=shape, embedding_block=shape)
        new, _ = run_passes(dense, [method], [[tokens]])
        assert torch.equal(run(new, [tokens])[0], run(dense, [tokens])[0])


def test_a_tied_table_is_stored_once(program: Program, tokens: Tensor) -> None:
    for method in (QuantizeBlockwise(), QuantizeBlockwise(bits=4, embedding_bits=4, head_bits=8)):
        new, _ = run_passes(program, [method], [[tokens]])
        (embedding,) = (n for n in new.main.nodes if "block_embedding" in str(n.target)
                        and n.args[1].target == "tokens.weight_q")  # fmt: skip
        (head,) = (n for n in new.main.nodes if "block_linear" in str(n.target))
        assert head.args[1].target == embedding.args[1].target
        assert head.args[2].target == embedding.args[2].target
        assert new.cost().parameters == program.cost().parameters


def test_bytes_are_those_of_the_formula(program: Program, tokens: Tensor) -> None:
    block = (4, 8)
    method = QuantizeBlockwise(
        bits=4, embedding_bits=4, head_bits=4, weight_block=block, embedding_block=block
    )
    new, _ = run_passes(program, [method], [[tokens]])
    expected = 0
    for name, tensor in program.tensors.items():
        if tensor.dim() == 2:
            expected += grid_bytes(*tensor.shape, 4, block, pow2=True)
        elif "norm" in name:
            expected += grid_bytes(1, len(tensor), 8, (1, 32), pow2=True)
        else:
            expected += tensor.nbytes  # biases stay
    assert new.cost().weight_bytes == expected


def test_meta_tensors_need_no_memory(program: Program, gpt: GPT, tokens: Tensor) -> None:
    with torch.device("meta"):
        model = GPT(gpt.config).eval()
    meta = capture(model, (tokens.to("meta"),))
    new, _ = run_passes(meta, [QuantizeBlockwise(bits=4)])
    real, _ = run_passes(program, [QuantizeBlockwise(bits=4)])
    assert all(tensor.is_meta for tensor in new.tensors.values())
    assert new.cost().weight_bytes == real.cost().weight_bytes


def test_spelled_attention_and_canonical_attention_agree_in_what_is_replaced() -> None:
    of_family = family("spelled")
    forms = {operation.form for operation in of_family.program.regions(Operation)}
    assert {"matmul", "softmax", "norm", "activation"} <= forms
    canonical, _ = run_passes(of_family.program, [Canonicalize()], [of_family.inputs])
    assert "attention" in {operation.form for operation in canonical.regions(Operation)}
    new, _ = run_passes(canonical, [QuantizeBlockwise()], [of_family.inputs])
    assert apart(new, of_family.program, of_family.inputs) < 0.1


def test_after_fused_projections(program: Program, tokens: Tensor) -> None:
    new, _ = run_passes(program, [FuseProjections(), QuantizeBlockwise()], [[tokens]])
    assert apart(new, program, [tokens]) < 0.2
    with pytest.raises(OptionError, match="packs the weights that fuse-projections must join"):
        run_passes(program, [QuantizeBlockwise(), FuseProjections()], [[tokens]])


def test_a_second_run_finds_nothing(program: Program, tokens: Tensor) -> None:
    once, _ = run_passes(program, [QuantizeBlockwise()], [[tokens]])
    with pytest.raises(NoMatchError, match="reads blocks already"):
        run_passes(once, [QuantizeBlockwise()], [[tokens]])


def test_declines(program: Program) -> None:
    nothing = QuantizeBlockwise(
        bits=None, embedding_bits=None, head_bits=None, norm_bits=None, activations=None
    )
    with pytest.raises(NoMatchError, match="no weights that are compressed"):
        run_passes(program, [nothing])
    with pytest.raises(NoMatchError, match="is excluded by pattern"):
        run_passes(program, [QuantizeBlockwise(exclude=("*",))])
    with pytest.raises(NoMatchError, match="which is not asked for"):
        run_passes(program, [QuantizeBlockwise(operations=())])


def test_weights_alone_are_called_that(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [QuantizeBlockwise(activations=None)], [[tokens]])
    assert step.receipt.skipped["blocks.0.attention"].endswith("values stay as they are")
    assert all(scheme.values is None for scheme in step.plan.decisions.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(program: Program, value: float) -> None:
    name = "blocks.1.up.weight"
    broken = program.tensors[name].clone()
    broken[2, 3] = value
    with pytest.raises(OptionError, match=r"blocks\.1\.up\.weight holds NaN or infinity"):
        run_passes(program.with_(tensors={**program.tensors, name: broken}), [QuantizeBlockwise()])


def test_an_outlier_and_a_zero_block_come_through(program: Program, tokens: Tensor) -> None:
    weight = torch.zeros_like(program.tensors["blocks.1.up.weight"])
    weight[0, 0] = 1e30
    tensors = {**program.tensors, "blocks.1.up.weight": weight}
    new, _ = run_passes(program.with_(tensors=tensors), [QuantizeBlockwise(weight_block=(4, 4))])
    assert run(new, [tokens])[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits=3 is not supported; use one of 8, 4, None"),
        ({"norm_bits": 4}, "norm_bits=4"),
        ({"activations": "int4"}, "activations=int4"),
        ({"probabilities": "int4"}, "probabilities=int4"),
        ({"scale": "log"}, "scale=log"),
        ({"lowering": "fast"}, "lowering=fast"),
        ({"operations": ("pool",)}, "operations=pool"),
        ({"weight_block": (0, 8)}, r"weight_block=\[0, 8\] is no rows and columns"),
        ({"activation_block": 0}, "activation_block=0 holds no number"),
        ({"lowering": "integer", "activations": "fp8"}, "lowering=integer needs"),
        ({"lowering": "integer", "scale": "float"}, "lowering=integer needs"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        QuantizeBlockwise(**options)


def test_every_form_can_be_left_out() -> None:
    of_family = family("bert")
    for form in FORMS:
        kept = tuple(other for other in FORMS if other != form)
        _, (step,) = run_passes(of_family.program, [QuantizeBlockwise(operations=kept)])
        left = [o.label for o in of_family.program.regions(Operation) if o.form == form]
        assert not set(left) & set(step.receipt.changed)


@pytest.fixture(scope="module")
def dynamic(gpt: GPT, tokens: Tensor) -> Program:
    return capture(gpt, (tokens,), dynamic_shapes=({1: Dim("seq", min=2, max=16)},))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lowering": "integer"}, {"scale": "float"}], ids=str)
def test_spelled_out_it_is_the_same(dynamic: Program, options: dict[str, Any]) -> None:
    new, _ = run_passes(dynamic, [QuantizeBlockwise(activation_block=3, **options)])
    spelled = spell_blocks(new)
    targets = {node.target for graph in spelled.graphs.values() for node in graph.nodes}
    assert not targets & SPELLED.keys()
    for seq in (2, 3, 8, 16):
        x = torch.randint(0, 32, (2, seq), generator=torch.Generator().manual_seed(0))
        assert torch.equal(run(spelled, [x])[0], run(new, [x])[0])


@pytest.mark.slow
def test_integers_are_refused_where_there_is_no_translation(gpt: GPT, tokens: Tensor) -> None:
    method = QuantizeBlockwise(lowering="integer")
    with pytest.raises(LoweringError, match="integer blocks have no translation"):
        bw.compile(gpt, [method], (tokens,), backend="onnxruntime")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("backend", "options"),
    [("eager", {}), ("onnxruntime", VARIANTS[0]), ("onnxruntime", VARIANTS[1]), ("inductor", {})],
    ids=str,
)
def test_engines_compute_it(
    dynamic: Program, gpt: GPT, backend: str, options: dict[str, Any], tmp_path: Path
) -> None:
    x = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    method = QuantizeBlockwise(activation_block=3, **options)
    engine = bw.compile(
        gpt, [method], (x[:, :8].contiguous(),), backend=backend,
        dynamic_shapes=({1: Dim("seq", min=2, max=16)},),
    )  # fmt: skip
    new, _ = run_passes(dynamic, [method])
    torch.testing.assert_close(engine(x), run(new, [x])[0], atol=0.02, rtol=0.02)
    engine.save(tmp_path / "a.bw")
    assert torch.equal(bw.load(tmp_path / "a.bw")(x), engine(x))
