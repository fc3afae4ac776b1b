"""Every registered pass keeps to every property; failures of the past are asked again first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from blockwright.driver.calibration import example_set
from blockwright.ir.program import Program
from blockwright.passes import (
    Canonicalize,
    DeltaCache,
    DenseToMoE,
    DropBlocks,
    DropIdleFeatures,
    DropSublayers,
    EmergentMoE,
    FoldConstants,
    FuseBlocks,
    FuseProjections,
    HardAttention,
    HashedLinearAttention,
    HashLinear,
    JointAttention,
    KVCache,
    LinearizeStreams,
    LinearizeSublayers,
    LoopBlocks,
    MixtureOfBlocks,
    PiecewiseAttention,
    ProxyAttention,
    PruneAccuracyDriven,
    PruneContiguous,
    PruneHeads,
    PruneNeurons,
    QuantizeBlockwise,
    QuantizeWeights,
    ReuseCache,
    SceneMaskAttention,
    ShareBlocks,
    ShareModulation,
    SkipBricks,
    SparseGlobalAttention,
    StripAttention,
    TaylorCache,
    WindowAttention,
)
from blockwright.passes.base import Evidence, Plan
from blockwright.testing import pass_suite, replay
from blockwright.testing.machine import ProgramMachine

CORPUS = Path(__file__).parent.parent / "corpus"
FILES = sorted(CORPUS.glob("*.json"))
EXAMPLES = 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_once_failed(path: Path, request: pytest.FixtureRequest) -> None:
    data = json.loads(path.read_text())
    if "open" in data:
        request.applymarker(pytest.mark.xfail(reason=data["open"], strict=True))
    replay(data)


class Noise:
    """Made-up inputs, judged by the distance of each sample's outputs to noise."""

    def __init__(self, program: Program) -> None:
        self.inputs = example_set(program, None, None)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([self.inputs])

    def pairs(self) -> Iterator[tuple[list[Tensor], None]]:
        return iter([(self.inputs, None)])

    def loss(self, outputs: Sequence[Tensor], target: None) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        return sum(
            (y.float() - torch.randn(y.shape, generator=noise)).square().flatten(1).mean(1)
            for y in outputs
        )


class JudgedByNoise(PruneAccuracyDriven):
    """The pass with a task of its own: random models have none."""

    def measure(self, program: Program, calibration: object) -> Evidence | None:
        return super().measure(program, Noise(program))

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan:
        return super().plan(program, evidence or self.measure(program, None))


class DetectedOnNoise(PruneContiguous):
    """The pass with a calibration of its own."""

    def measure(self, program: Program, calibration: object) -> Evidence | None:
        return super().measure(program, Noise(program))

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan:
        return super().plan(program, evidence or self.measure(program, None))


TestCanonicalize = pass_suite(Canonicalize(), examples=EXAMPLES)
TestDenseToMoE = pass_suite(
    DenseToMoE(experts=2, active=1, shared=0.5, importance="magnitude"),
    exact=DenseToMoE(experts=2, active=2, shared=0.5, score="unit", importance="magnitude"),
    refused=({"experts": 0}, {"active": 3}, {"shared": 1.0}, {"score": "best"}, {"scale": 0.0}),
    examples=EXAMPLES,
)
TestDropBlocks = pass_suite(
    DropBlocks(keep_ratio=0.6),
    exact=DropBlocks(keep_ratio=1.0, allow_no_match=True),
    idempotent=False,
    refused=({"keep_ratio": 0.0}, {"importance": "luck"}),
    examples=EXAMPLES,
)
TestDropIdleFeatures = pass_suite(DropIdleFeatures(), examples=EXAMPLES)
TestDropSublayers = pass_suite(
    DropSublayers(importance="random", keep_ratio=0.6),
    idempotent=False,
    refused=({"keep_ratio": 0.0}, {"importance": "luck"}, {"parts": ("head",)}),
    examples=EXAMPLES,
)
TestEmergentMoE = pass_suite(
    EmergentMoE(experts=2, active=1),
    exact=EmergentMoE(experts=2, active=2),
    refused=({"experts": 0}, {"active": 0}, {"active": 3}, {"cluster": "alphabet"}),
    examples=EXAMPLES,
)
TestFoldConstants = pass_suite(
    FoldConstants(), refused=({"max_growth_bytes": -1},), examples=EXAMPLES
)
TestFuseBlocks = pass_suite(
    FuseBlocks(keep_ratio=0.6),
    exact=FuseBlocks(keep_ratio=1.0, allow_no_match=True),
    idempotent=False,
    refused=({"keep_ratio": 0.0}, {"group": 1}, {"rank": 0}, {"loss": "luck"}),
    examples=EXAMPLES,
)
TestFuseProjections = pass_suite(FuseProjections(), examples=EXAMPLES)
TestHardAttention = pass_suite(HardAttention(top_k=2), refused=({"top_k": 0},), examples=EXAMPLES)
TestHashLinear = pass_suite(
    HashLinear(tau=2),
    refused=({"tau": 0}, {"score": "cosine"}, {"init": "zeros"}, {"parts": ("head",)}),
    examples=EXAMPLES,
)
TestHashedLinearAttention = pass_suite(
    HashedLinearAttention(bits=4, anchors=2, neighbours=1, steps=2, dense_below=0),
    refused=({"bits": 0}, {"anchors": 0}, {"share": "value"}, {"offset": "none"}),
    examples=2,
)
TestJointAttention = pass_suite(
    JointAttention(chunk=2, dense_below=0),
    refused=({"chunk": 0}, {"rate": 0.0}),
    examples=2,
)
TestLinearizeStreams = pass_suite(
    LinearizeStreams(), exact=LinearizeStreams(), refused=({"stream": -1},), examples=2
)
TestLinearizeSublayers = pass_suite(
    LinearizeSublayers(keep_ratio=0.0),
    exact=LinearizeSublayers(keep_ratio=1.0, allow_no_match=True),
    refused=({"keep_ratio": -1.0}, {"distance": "luck"}),
    examples=EXAMPLES,
)
TestMixtureOfBlocks = pass_suite(
    MixtureOfBlocks(),
    exact=MixtureOfBlocks(active=2),
    idempotent=False,
    refused=({"group": 1}, {"active": 3}, {"alpha": -1.0}, {"noise": -1.0}, {"rate": 0.0}),
    examples=EXAMPLES,
)
TestPiecewiseAttention = pass_suite(
    PiecewiseAttention(block_size=2, density=0.5, allow_no_match=True),
    exact=PiecewiseAttention(block_size=2, density=1.0, dense_above=1.0, allow_no_match=True),
    refused=({"density": 0.0}, {"block_size": 0}, {"order": "second"}, {"sink": 3}),
    examples=2,
)
TestProxyAttention = pass_suite(
    ProxyAttention(window=(1,), only_cheaper=False),
    exact=ProxyAttention(allow_no_match=True),
    idempotent=False,
    refused=({"window": (0,)}, {"proxy": "last"}, {"prefix": -1}, {"epochs": 0}),
    examples=2,
)
TestPruneAccuracyDriven = pass_suite(
    JudgedByNoise(top_k=2, group_size=3),
    idempotent=False,
    refused=(
        {"top_k": -1},
        {"group_size": 0},
        {"fine": 0.9},
        {"majority": 1.0},
        {"order": "any"},
        {"budget": 0},
    ),
    examples=2,
)
TestPruneContiguous = pass_suite(
    DetectedOnNoise(keep_ratio=0.6),
    exact=PruneContiguous(intervals=(), allow_no_match=True),
    idempotent=False,
    refused=({"keep_ratio": 0.0}, {"start": "luck"}, {"distance": "luck"}, {"length": -1.0}),
    examples=EXAMPLES,
)
TestPruneHeads = pass_suite(
    PruneHeads(),
    idempotent=False,
    refused=({"keep_ratio": 0.0}, {"keep": 0}, {"importance": "luck"}, {"unit": "key"}),
    examples=EXAMPLES,
)
TestPruneQueries = pass_suite(PruneHeads(unit="query"), idempotent=False, examples=2)
TestPruneNeurons = pass_suite(
    PruneNeurons(),
    idempotent=False,
    refused=({"keep_ratio": 1.5}, {"keep": 0}, {"importance": "luck"}, {"multiple_of": 0}),
    examples=EXAMPLES,
)
TestQuantizeBlockwise = pass_suite(
    QuantizeBlockwise(),
    exact=QuantizeBlockwise(activations=None),
    refused=(
        {"bits": 2},
        {"activations": "int4"},
        {"scale": "log"},
        {"weight_block": (0, 1)},
        {"lowering": "integer", "scale": "float"},
    ),
    examples=2,
)
TestQuantizeWeights = pass_suite(
    QuantizeWeights(),
    exact=QuantizeWeights(bits=4),
    levels=7,
    refused=(
        {"bits": 3},
        {"group_size": 0},
        {"activations": "int4"},
        {"activations": "int8", "bits": 4},
    ),
    examples=EXAMPLES,
)
TestQuantizeGroups = pass_suite(
    QuantizeWeights(bits=4, group_size=2, symmetric=False, embeddings=True), examples=EXAMPLES
)


class CalibratedOnNoise(QuantizeWeights):
    """The pass with a calibration of its own."""

    def calibrate(
        self, old: Program, new: Program, plan: Plan, calibration: object
    ) -> dict[str, Tensor]:
        return super().calibrate(old, new, plan, Noise(old))


TestQuantizeByGptq = pass_suite(
    CalibratedOnNoise(bits=4, group_size=3, method="gptq"),
    exact=CalibratedOnNoise(bits=4, method="gptq"),
    levels=7,
    refused=({"method": "best"}, {"damping": 0.0}, {"budget_bits": 4.0}),
    examples=2,
)
TestQuantizeByAwq = pass_suite(CalibratedOnNoise(bits=4, method="awq"), examples=2)
TestQuantizeActivations = pass_suite(QuantizeWeights(activations="int8"), examples=EXAMPLES)
TestSceneMaskAttention = pass_suite(
    SceneMaskAttention(scenes=1, rows=("10", "11")),
    exact=SceneMaskAttention(scenes=1, allow_no_match=True),
    idempotent=False,
    refused=({"scenes": 0}, {"mask": "all"}, {"text": -1}, {"rows": ("1",)}),
    examples=2,
)
TestShareModulation = pass_suite(
    ShareModulation(), refused=({"across": "time"}, {"epochs": 0}), examples=EXAMPLES
)
TestSkipBricks = pass_suite(
    SkipBricks(steps=2, stages="blocks"),
    exact=SkipBricks(steps=2, skip_ratio=0.1, stages="blocks", allow_no_match=True),
    idempotent=False,
    refused=({"steps": 0}, {"skip_ratio": 0.0}, {"when": "never"}, {"masks": ("1",)}),
    examples=EXAMPLES,
)

TestSparseGlobalAttention = pass_suite(
    SparseGlobalAttention(dense_below=0),
    refused=({"tile": 0}, {"rate": 0.0}),
    examples=2,
)
TestStripAttention = pass_suite(
    StripAttention(),
    refused=({"reduce": 0}, {"qk_channels": 0}, {"start": "luck"}),
    examples=2,
)
TestShareBlocks = pass_suite(
    ShareBlocks(start="first"),
    idempotent=False,
    refused=({"groups": 0}, {"what": "norms"}, {"experts": 2, "active": 3}),
    examples=EXAMPLES,
)
TestLoopBlocks = pass_suite(
    LoopBlocks(before=0, after=0, start="first"),
    idempotent=False,
    refused=({"body": 0}, {"turns": 0}, {"start": "last"}),
    examples=EXAMPLES,
)
TestKVCache = pass_suite(KVCache(length=64), refused=({"length": 0},), examples=2)
TestWindowAttention = pass_suite(
    WindowAttention(window=(1,), shift="double"),
    exact=WindowAttention(allow_no_match=True),
    refused=({"window": (0,)}, {"shift": "left"}, {"every": 0}, {"prefix": -1}),
    examples=2,
)
TestTaylorCache = pass_suite(
    TaylorCache(steps=4),
    exact=TaylorCache(steps=4, threshold=0.0),
    refused=({"steps": 0}, {"threshold": -1.0}, {"every": 0}, {"when": "never"}, {"order": 99}),
    examples=2,
)
TestTaylorCacheOfModules = pass_suite(
    TaylorCache(steps=4, what="modules", when="interval"),
    exact=TaylorCache(steps=4, what="modules", when="interval"),
    idempotent=False,
    examples=2,
)
TestDeltaCache = pass_suite(
    DeltaCache(steps=4, count=1),
    exact=DeltaCache(steps=4, count=1),
    idempotent=False,
    refused=({"steps": 0}, {"count": 0}, {"boundary": 9}, {"stages": "middle"}),
    examples=2,
)
TestReuseCache = pass_suite(
    ReuseCache(steps=4, when="first-block"),
    exact=ReuseCache(steps=4, when="first-block"),
    refused=({"steps": 0}, {"threshold": -1.0}, {"value": "noise"}),
    examples=2,
)

TestProgramMachine = ProgramMachine.TestCase
TestProgramMachine.settings = settings(settings.get_profile("ci"), max_examples=2)
