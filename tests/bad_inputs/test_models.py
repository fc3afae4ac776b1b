"""Odd models: entries 51 to 76 of docs/bad-inputs.md."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import blockwright as bw
from blockwright.ir.errors import CaptureError, NoMatchError
from blockwright.models.gpt import GPT, GPTConfig

X = torch.linspace(-1, 1, 16).reshape(2, 8)
SMALL = {"vocab": 8, "context": 8, "dim": 4, "heads": 1, "ffn_dim": 4}


def compiled(model: nn.Module, *inputs: Tensor, passes: Any = "quantize-weights") -> bw.Engine:
    return bw.compile(model, passes, inputs or (X,), backend="eager")


def agree(model: nn.Module, engine: bw.Engine, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected = model(*(inputs or (X,)))
    torch.testing.assert_close(engine(*(inputs or (X,))), expected, rtol=0.1, atol=0.05)


class Views(nn.Module):
    """Parameters that overlap in one storage."""

    def __init__(self) -> None:
        super().__init__()
        storage = torch.randn(2, 8, 8) / 3
        self.a, self.b = nn.Parameter(storage[0]), nn.Parameter(storage[1])
        self.c = nn.Parameter(storage.view(16, 8)[4:12])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, self.a), self.b), self.c)


class Strides(nn.Module):
    """A transposed parameter and one that repeats a row without storing it again."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter((torch.randn(8, 8) / 3).t())
        self.repeated = nn.Parameter((torch.randn(1, 8) / 3).expand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.turned), self.repeated)


class Mixed(nn.Module):
    """Three layers, three precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.float64)
        self.c = nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).double()).bfloat16()).float()


def hooked() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, given, result: result * 2)
    return layer


def nested(depth: int) -> nn.Module:
    model: nn.Module = nn.Linear(8, 8)
    for _ in range(depth):
        model = nn.Sequential(model)
    return model


def named(name: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(8, 8))
    return model


def lying(hook: Callable[..., Any]) -> nn.Module:
    layer = nn.Linear(8, 8)
    layer._register_state_dict_hook(hook)
    return layer


WELCOME: dict[str, Callable[[], nn.Module]] = {
    "views of one storage": Views,
    "odd strides": Strides,
    "mixed precisions": Mixed,
    "a hook": hooked,
    "a name of 4 000 letters": lambda: named("m" * 4000),
    "a hundred levels": lambda: nested(100),
    "a state_dict without weights": lambda: lying(lambda module, state, *rest: state.clear()),
    "a state_dict of other weights": lambda: lying(
        lambda module, state, *rest: {name: torch.zeros(3) for name in state}
    ),
}


@pytest.mark.parametrize("kind", WELCOME)
def test_odd_models_are_compiled_and_saved(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WELCOME[kind]()
    engine = compiled(model)
    agree(model, engine)
    engine.save(tmp_path / "model.bw")
    assert torch.equal(bw.load(tmp_path / "model.bw")(X), engine(X))


@pytest.mark.parametrize("kind", ["views of one storage", "odd strides"])
def test_weights_are_saved_as_they_are_read(kind: str, tmp_path: Path) -> None:
    model = WELCOME[kind]()
    compiled(model, passes=()).save(tmp_path / "model.bw")
    with torch.no_grad():  # other strides, other order of summation
        torch.testing.assert_close(bw.load(tmp_path / "model.bw")(X), model(X))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.ReLU(), X),
        (nn.Identity(), X),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.ones(1, 3, 8, 8)),
    ],
    ids=["no parameters", "identity", "no transformer"],
)
def test_a_model_no_pass_applies_to_is_still_a_model(model: nn.Module, x: Tensor) -> None:
    agree(model, compiled(model, x, passes=()), x)
    agree(model, compiled(model, x, passes="quantize-weights{allow_no_match=true}"), x)
    with pytest.raises(NoMatchError, match="found no linear"):
        compiled(model, x)


def test_zero_layers() -> None:
    model, ids = GPT(GPTConfig(**SMALL, depth=0)).eval(), torch.tensor([[1, 2]])
    agree(model, compiled(model, ids, passes=()), ids)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_weights_that_are_computed_are_kept_so(norm: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(8, 8)))
    agree(model, compiled(model, passes=()))
    with pytest.raises(NoMatchError, match="quantize-weights changed nothing"):
        compiled(model)


@pytest.mark.parametrize("value", [1e-42, 1e30])
def test_tiny_and_huge_weights_stay_finite(value: float) -> None:
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight[0, 0] = value
    assert compiled(model)(X).isfinite().all()


def test_doubles_keep_their_type() -> None:
    model = nn.Linear(8, 8).double()
    engine = compiled(model, X.double())
    assert engine(X.double()).dtype == torch.float64
    agree(model, engine, X.double())


def test_complex_weights_are_named_and_left() -> None:
    model, x = nn.Linear(8, 8, dtype=torch.complex64), X.to(torch.complex64)
    with pytest.raises(NoMatchError, match=r"has torch\.complex64 weights"):
        compiled(model, x)
    agree(model, compiled(model, x, passes=()), x)


def test_a_weight_without_data_among_others_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    with pytest.raises(CaptureError, match="on several devices: cpu, meta"):
        compiled(model)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Splits(nn.Module):
    """Eight features are not three heads."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, -1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Writes(), "writes into its input 'x'"),
        (Splits(), "don't multiply up to the size"),
        (nested(400), "recursion"),
        (nested(2000), "nested too deep"),
    ],
    ids=["writes", "heads", "400 levels", "2000 levels"],
)
def test_what_cannot_be_captured_is_said_and_undone(model: nn.Module, message: str) -> None:
    training, x = [module.training for module in itertools.islice(chain_of(model), 50)], X.clone()
    with pytest.raises(CaptureError, match=message):
        bw.capture(model, (x,))
    assert [module.training for module in itertools.islice(chain_of(model), 50)] == training
    assert torch.equal(x, X) or isinstance(model, Writes)


def chain_of(model: nn.Module) -> Any:
    """Yield a module and the first in it, and so on; `modules()` is recursive."""
    while True:
        yield model
        inner = next(iter(model.children()), None)
        if inner is None:
            return
        model = inner


def test_dropout_is_left_out_and_the_model_stays_in_training() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    engine = compiled(model, passes=())
    assert all(module.training for module in model.modules())
    assert torch.equal(engine(X), model.eval()(X))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(8)


def test_random_numbers_are_noted() -> None:
    assert any("draws random numbers" in note for note in bw.capture(Noisy(), (X,)).notes)


def test_no_rows_and_one_row() -> None:
    model, rows = nn.Linear(8, 8), ({0: Dim("rows", min=0, max=9)},)
    engine = bw.compile(model, "quantize-weights", (X,), dynamic_shapes=rows, backend="eager")
    assert engine(X[:0]).shape == (0, 8)
    agree(model, engine, X[:1])
    for count in (0, 1):
        agree(model, compiled(model, X[:count]), X[:count])


@pytest.mark.slow
def test_a_thousand_layers_take_linear_time() -> None:
    def seconds(depth: int) -> float:
        model = GPT(GPTConfig(**SMALL, depth=depth)).eval()
        start = time.process_time()
        compiled(model, torch.tensor([[1, 2]]))
        return time.process_time() - start

    seconds(12)
    assert seconds(1000) < 8 * seconds(250)
