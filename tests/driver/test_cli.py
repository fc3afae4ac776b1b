"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from blockwright.driver import cli, cli_view
from blockwright.passes import PASSES

TINY = """
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        return x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Offers(Tiny):
    def example_inputs(self):
        return (torch.ones(2, 5, dtype=torch.long),)


class Limited(Tiny):
    def forward(self, ids):
        torch._check(ids.shape[1] <= 9)
        return super().forward(ids)


def broken():
    model = Offers()
    model.blocks[1].q.weight.data[0, 0] = float("nan")
    return model


def crashes():
    raise RuntimeError("no such luck")


def needs(dim):
    return Tiny()


def three():
    return 3


nothing = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def data(*args: str) -> Any:
    result = call(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def saved(name: str = "tiny.bw", *args: str) -> str:
    result = call("compile", "tiny.py:Tiny", "-o", name, "--backend", "eager", "--input",
                  "ids=i64[batch=2,seq=5]", "--dynamic", "batch=1..8", *args)  # fmt: skip
    assert result.exit_code == 0, result.output
    return name


def test_version_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("--version").stdout.startswith("blockwright ")
    assert all(name in call("--help").stdout for name in ("compile", "bench", "doctor"))
    plain = re.sub(r"\x1b\[[\d;]*m", "", call("compile", "--help").stdout)
    assert "int64[batch=2,seq=16]" in plain


def test_passes_lists_the_register() -> None:
    found = data("passes")
    assert [each["name"] for each in found] == sorted(kind.name for kind in PASSES)
    assert all(each["summary"].endswith(".") and each["promise"] for each in found)


def test_a_pass_is_shown_with_its_options() -> None:
    found = data("passes", "quantize-weights")
    bits = found["options"][0]
    assert (bits["name"], bits["type"], bits["default"]) == ("bits", "a whole number", 8)
    assert found["notes"]["Source"].startswith("Jacob et al.")
    text = call("passes", "quantize-weights").stdout
    assert "group_size" in text
    assert "Exact when" in text


def test_passes_prints_the_schema_of_recipes() -> None:
    assert data("passes", "--schema")["title"] == "blockwright recipe"


def test_inspect_counts_by_module(folder: Path) -> None:
    sizes = ("--input", "ids=int64[batch=2,seq=5]", "--cost", "seq=16")
    found = data("inspect", "tiny.py:Tiny", *sizes)
    assert found["cost"]["parameters"] == 20 * 8 + 2 * (16 + 4 * 72)
    assert found["sizes"] == {"batch": 2, "seq": 16}
    assert found["paths"]["blocks.*.q"] == {"flops": 2 * 2 * 16 * 2 * 64, "parameters": 144,
                                            "bytes": 576}  # fmt: skip
    assert [block["instances"] for block in found["blocks"].values()] == [["blocks.0", "blocks.1"]]
    assert found["inputs"] == {"ids": {"dtype": "int64", "shape": ["batch", "seq"]}}


def test_inspect_prints_tables_or_text(folder: Path) -> None:
    tables = call("inspect", "tiny.py:Offers", "--dynamic", "*:0=batch,batch=1..64").stdout
    assert "blocks.0 .. blocks.1" in tables
    assert "[batch 1..64, 5]" in tables
    assert call("inspect", "tiny.py:Offers", "--text").stdout.startswith("def main(ids):")


def test_compile_run_and_read_back(folder: Path) -> None:
    result = call("compile", "tiny.py:Offers", "-o", "tiny.bw", "--pass", "fuse-projections",
                  "--backend", "eager")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "fuse-projections" in result.stdout
    assert "saved tiny.bw" in result.stdout
    save_file({"ids": torch.ones(2, 5, dtype=torch.long)}, "in.safetensors")
    assert call("run", "tiny.bw", "--input", "in.safetensors", "-o", "out.npz").exit_code == 0
    assert np.load("out.npz")["output"].shape == (2, 5, 8)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_compile_takes_a_recipe_then_passes(folder: Path) -> None:
    (folder / "fuse.toml").write_text('[[pass]]\nname = "fuse-projections"\n')
    found = data("compile", "tiny.py:Offers", "-o", "a.zip", "--recipe", "fuse.toml", "--pass",
                 "quantize-weights{bits=8}", "--backend", "eager", "--threads", "1")  # fmt: skip
    assert found["record"]["recipe"] == "fuse-projections, quantize-weights"
    assert (found["output"], found["backend"]) == ("a.zip", "eager")
    assert (folder / "a.zip").is_file()
    assert data("inspect", "a.zip")["cost"]["parameters"] == 768


def test_a_saved_engine_is_a_model_too(folder: Path) -> None:
    found = data("compile", saved(), "-o", "b.bw", "--pass", "fuse-projections", "--backend",
                 "eager")  # fmt: skip
    assert found["record"]["recipe"] == "fuse-projections"
    assert data("run", "b.bw", "--random")["outputs"]["output"]["shape"] == [2, 5, 8]


def test_run_makes_valid_inputs_up(folder: Path) -> None:
    found = data("run", saved(), "--random", "--size", "batch=3", "-o", "out.safetensors")
    assert found["outputs"]["output"]["shape"] == [3, 5, 8]
    assert found["outputs"]["output"]["nonfinite"] == 0
    assert load_file("out.safetensors")["output"].shape == (3, 5, 8)
    assert "Outputs" in call("run", "tiny.bw", "--random").stdout


def test_bench_compares_with_the_first(folder: Path) -> None:
    found = data("bench", "tiny.py:Offers", "--pass", "fuse-projections", "--backend", "eager",
                 "--against", "eager", "--rounds", "5")  # fmt: skip
    assert list(found["timings"]) == ["eager", "tiny.py:Offers"]
    assert found["timings"]["eager"]["speedup"] == 1.0
    assert found["relative_error"]["tiny.py:Offers"] < 1e-6
    text = call("bench", saved(), "--against", "eager,tiny.bw", "--rounds", "1").stdout
    assert "no verdict: " in text  # one round is too few, if the machine stood still at all


def test_diff_compares_saved_engines(folder: Path) -> None:
    fused = saved("fused.bw", "--pass", "fuse-projections")
    result = call("diff", saved(), fused)
    assert result.exit_code == 1, result.output
    assert "q/k/v separate -> joined" in result.stdout
    assert "bytes moved" in result.stdout
    assert "+++ fused.bw" in call("diff", "tiny.bw", fused, "--level", "nodes").stdout
    assert data("diff", fused, fused)["diff"] == ""


def test_doctor_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_view, "PATIENCE_S", 0)
    monkeypatch.setenv("COLUMNS", "120")
    found = data("doctor")
    assert found["backends"]["eager"] is None
    assert found["optional"]["ray"]["install"] == 'pip install "blockwright[search]"'
    assert "Backends" in call("doctor").stdout


MISTAKES = {
    ("inspect", "tiny.py:Tiny"): "CaptureError: Tiny offers no example inputs. [tiny.py:Tiny] Try:"
    " describe them: --input 'x=float32[2,16]', once per argument.",
    ("inspect", "gone"): "'gone' is not a model. Try: give a Hugging Face directory,",
    ("inspect", "tiny.py:gone"): "tiny.py has no 'gone'.",
    ("inspect", "gone.py:Tiny"): "there is no file gone.py.",
    ("inspect", "gone.away:Tiny"): "there is no module 'gone.away'.",
    ("inspect", "tiny.py:needs"): "cannot be called without arguments.",
    ("inspect", "tiny.py:nothing"): "tiny.py:nothing is not a module",
    ("inspect", "tiny.py:three"): "tiny.py:three gave a value of type int, no torch module.",
    ("inspect", "."): "is not a Hugging Face model directory.",
    ("inspect", "tiny.py:Offers", "--cost", "b=3"): "there is no dynamic size 'b'. Try: every size"
    " of this program is fixed.",
    ("inspect", "tiny.py:Tiny", "--input", "x=i64[2]"): "the model has no argument 'x'.",
    ("inspect", "tiny.py:Limited", "--input", "ids=i64[batch=2,seq=5]"): "the model does not allow"
    " every size of seq. Try: limit them: --dynamic seq=0..9.",
    ("inspect", "tiny.py:Tiny", "--input", "ids=i64[2,seq=1]"): "Try: fix seq at 1, or give another"
    " example.",
    (
        "passes",
        "quantize",
    ): "there is no pass 'quantize'. Try: did you mean quantize-weights or quantize-blockwise?",
    ("compile", "tiny.py:Offers", "-o", "x.bw", "--backend", "egaer"): "there is no backend"
    " 'egaer'.",
    ("compile", "tiny.py:broken", "-o", "x.bw"): "'blocks.1.q.weight' holds 1 NaN",
    ("compile", "tiny.py:Offers", "-o", "x.bw", "--pass", "quantize-weights{bits=3}"): "bits=3 is"
    " not supported",
    ("compile", "tiny.py:Offers", "-o", "x.bw", "--pass", "fold-constants"): "NoMatchError:",
    ("run", "gone.bw", "--random"): "gone.bw",
    ("run", "gone.bw"): "give one of --input FILE or --random.",
    ("run", "gone.bw", "--random", "-o", "x.txt"): "x.txt has no known format.",
}


@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_mistakes_take_one_line_and_write_nothing(folder: Path, args: tuple[str, ...]) -> None:
    before = {path for path in folder.iterdir() if path.name != "__pycache__"}
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert MISTAKES[args] in line
    assert {path for path in folder.iterdir() if path.name != "__pycache__"} == before


def test_mistakes_as_json(folder: Path) -> None:
    result = call("inspect", "gone", "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    error = json.loads(result.stdout)["error"]
    assert (error["type"], error["what"]) == ("OptionError", "'gone' is not a model.")


def test_debug_shows_the_traceback(folder: Path) -> None:
    result = call("inspect", "gone", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_wrong_files_and_wrong_inputs(folder: Path) -> None:
    artefact = saved()
    (folder / "bad.npz").write_bytes(b"no zip")
    assert "cannot read bad.npz" in call("run", artefact, "--input", "bad.npz").stderr
    np.savez("other.npz", idz=np.ones((2, 5), dtype=np.int64))
    assert "there is no input 'idz'." in call("run", artefact, "--input", "other.npz").stderr
    np.savez("none.npz")
    assert "'ids' is missing." in call("run", artefact, "--input", "none.npz").stderr
    result = call("run", artefact, "--random", "-o", "gone/out.npz")
    assert "cannot write gone/out.npz" in result.stderr
    assert call("run", artefact, "--random", "--size", "batch=9").exit_code == 2


def test_unexpected_errors_keep_their_traceback(folder: Path) -> None:
    result = call("inspect", "tiny.py:crashes")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_interrupt_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_program", interrupted)
    result = call("inspect", "tiny.py:Offers")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted.\n"
