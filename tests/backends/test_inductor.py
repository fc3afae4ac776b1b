"""Ahead-of-time compilation: same numbers as eager, at sizes the example did not have."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from blockwright.backends import inductor
from blockwright.backends.base import Lowered
from blockwright.backends.eager import EagerBackend
from blockwright.backends.inductor import MADE_FOR, PACKAGE, InductorBackend
from blockwright.ir.capture import capture
from blockwright.ir.errors import LoweringError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.rewrite import rewrite
from blockwright.passes import QuantizeWeights

needs_compiler = pytest.mark.skipif(
    InductorBackend().missing() is not None, reason="there is no C++ compiler"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    dynamic = {0: Dim("batch", min=1, max=8), 1: Dim("seq", min=2, max=64)}
    model = nn.Sequential(Block(), Block())
    return capture(model, torch.randn(2, 16, 32), dynamic_shapes=(dynamic,))


def quantized(program: Program, **options: Any) -> Program:
    method = QuantizeWeights(**options)
    plan = method.plan(program)
    replacements = [
        (region, method.replace(region, plan.decisions[region.label]))
        for region in method.regions(program)
    ]
    return rewrite(program, replacements, by=method.name)


def check(lowered: Lowered, program: Program, atol: float = 1e-4) -> None:
    eager = EagerBackend().lower(program, {})
    for batch, seq in ((2, 16), (1, 2), (3, 7)):
        x = torch.randn(batch, seq, 32)
        torch.testing.assert_close(lowered.run([x]), eager.run([x]), rtol=1e-4, atol=atol)


@needs_compiler
def test_compiles_a_dynamic_program(program: Program) -> None:
    lowered = InductorBackend().lower(program, {"threads": 1})
    check(lowered, program)
    x = torch.randn(32, 5, 2).permute(2, 1, 0)
    torch.testing.assert_close(lowered.run([x]), lowered.run([x.contiguous()]))


@needs_compiler
@pytest.mark.slow
def test_integer_layers_run_in_integers_and_come_back_from_files(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = quantized(program, activations="int8")
    lowered = InductorBackend().lower(program, {"threads": 1})
    step = 0.01  # an activation between two codes may round either way
    check(lowered, program, step)
    files = lowered.files(None)  # type: ignore[arg-type]
    package, stamp = files.compiled[PACKAGE], files.portable[MADE_FOR]
    assert isinstance(package, Path)
    assert isinstance(stamp, bytes)
    assert b"qlinear_pointwise" in wrapper_source(package)

    (tmp_path / MADE_FOR).write_bytes(stamp)
    (tmp_path / PACKAGE).write_bytes(package.read_bytes())
    monkeypatch.setattr(InductorBackend, "lower", never)
    portable, compiled = {MADE_FOR: tmp_path / MADE_FOR}, {PACKAGE: tmp_path / PACKAGE}
    check(InductorBackend().restore(program, portable, compiled, {}), program, step)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_layers_are_folded(program: Program, bits: int) -> None:
    program = quantized(program, bits=bits, group_size=16, symmetric=False)
    check(InductorBackend().lower(program, {"freezing": True}), program)


@pytest.mark.parametrize("stamp", [None, '{"torch": "0.1"}'])
def test_a_package_for_another_machine_is_lowered_again(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamp: str | None
) -> None:
    again = object()
    monkeypatch.setattr(InductorBackend, "lower", lambda *args: again)
    portable: Mapping[str, Path] = {}
    if stamp is not None:
        portable = {MADE_FOR: tmp_path / MADE_FOR}
        portable[MADE_FOR].write_text(stamp)
    restored = InductorBackend().restore(program, portable, {PACKAGE: tmp_path / PACKAGE}, {})
    assert restored is again


def test_without_a_compiler_it_says_so_first(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "compiler", lambda: None)
    assert "g++" in str(InductorBackend().missing())
    with pytest.raises(LoweringError, match=r"no C\+\+ compiler.*\n.*try: .*install g\+\+"):
        InductorBackend().lower(program, {})


def test_the_compiler_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CXX", "my-c++")
    assert inductor.compiler() == "/bin/my-c++"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 11}, "no option 'speed'"),
        ({"threads": 0}, "threads=0 is no number of threads"),
        ({"freezing": "yes"}, "freezing='yes' is neither true nor false"),
    ],
)
def test_bad_options_are_refused(program: Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        InductorBackend().lower(program, options)


def test_a_damaged_package_is_an_error_with_a_place(tmp_path: Path) -> None:
    (tmp_path / PACKAGE).write_bytes(b"PK nonsense")
    with pytest.raises(LoweringError, match=r"does not load(.|\n)*where: .*model.pt2"):
        inductor.Package(tmp_path / PACKAGE)


@needs_compiler
def test_a_compiler_error_is_a_lowering_error(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("g++: internal error\nmore")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(LoweringError, match=r"cannot compile the program: g\+\+: internal error\."):
        InductorBackend().lower(program, {})


def never(*args: Any) -> Lowered:
    raise AssertionError("lowered again")


def wrapper_source(package: Path) -> bytes:
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if name.endswith("wrapper.cpp")]
        return b"".join(map(archive.read, names))
