"""Every registered pass keeps to every property; failures of the past are asked again first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import settings

from blockwright.passes import Canonicalize, FoldConstants, FuseProjections, QuantizeWeights
from blockwright.testing import pass_suite, replay
from blockwright.testing.machine import ProgramMachine

CORPUS = Path(__file__).parent.parent / "corpus"
FILES = sorted(CORPUS.glob("*.json"))
EXAMPLES = 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_once_failed(path: Path, request: pytest.FixtureRequest) -> None:
    data = json.loads(path.read_text())
    if "open" in data:
        request.applymarker(pytest.mark.xfail(reason=data["open"], strict=True))
    replay(data)


TestCanonicalize = pass_suite(Canonicalize(), examples=EXAMPLES)
TestFoldConstants = pass_suite(
    FoldConstants(), refused=({"max_growth_bytes": -1},), examples=EXAMPLES
)
TestFuseProjections = pass_suite(FuseProjections(), examples=EXAMPLES)
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
TestQuantizeActivations = pass_suite(QuantizeWeights(activations="int8"), examples=EXAMPLES)

TestProgramMachine = ProgramMachine.TestCase
TestProgramMachine.settings = settings(settings.get_profile("ci"), max_examples=6)
