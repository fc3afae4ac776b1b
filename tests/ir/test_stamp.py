"""Capture block by block gives what flat capture gives, or is not used."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.ir import capture as capture_module
from blockwright.ir import repeats, stamp
from blockwright.ir.capture import capture
from blockwright.ir.press import Press
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.ir.verify import verify
from blockwright.models.gpt import GPT, GPT2_XL, GPTConfig


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "FEWEST", 3)


def both(
    model: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Program, Program]:
    """Capture block by block and flat; check that both compute what the model does."""
    stamped = capture(model.eval(), inputs, **options)
    with monkeypatch.context() as patch:
        patch.setattr(repeats, "FEWEST", 10**9)
        flat = capture(model, inputs, **options)
    for program in (stamped, flat):
        verify(program)
    flat_inputs = [t for t in inputs if isinstance(t, Tensor)]
    for ours, theirs in zip(run(stamped, flat_inputs), run(flat, flat_inputs), strict=True):
        assert torch.equal(ours, theirs)
    return stamped, flat


def was_stamped(caplog: pytest.LogCaptureFixture) -> bool:
    return not any("captured flat" in record.message for record in caplog.records)


def test_a_gpt_is_the_same_to_the_letter(
    gpt: GPT, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    stamped, flat = both(gpt, (tokens,), monkeypatch, dynamic_shapes=shapes)
    assert was_stamped(caplog)
    assert stamped.text() == flat.text()
    assert stamped.tensors.keys() == flat.tensors.keys()
    assert stamped.aliases == flat.aliases
    assert stamped.signature == flat.signature
    assert {n: i.weights for n, i in stamped.instances.items()} == {
        n: i.weights for n, i in flat.instances.items()
    }


def test_the_model_is_as_before(gpt: GPT, tokens: Tensor) -> None:
    keys = set(vars(gpt.blocks[1]))
    names = [name for name, _ in gpt.named_parameters()]
    expected = gpt(tokens)
    capture(gpt, (tokens,))
    assert set(vars(gpt.blocks[1])) == keys
    assert [name for name, _ in gpt.named_parameters()] == names
    assert torch.equal(gpt(tokens), expected)


def test_a_failing_capture_restores_the_model(gpt: GPT, tokens: Tensor) -> None:
    names = [name for name, _ in gpt.named_parameters()]
    press = Press(repeats.find_repeats(gpt))

    def interrupted() -> None:
        with press.open(gpt):
            assert len(dict(gpt.named_parameters())) < len(names)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [name for name, _ in gpt.named_parameters()] == names
    assert "forward" not in vars(gpt.blocks[0])


def test_on_the_meta_device_ties_are_kept() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab=8, context=8, dim=4, heads=1, depth=4, ffn_dim=4)).eval()
        tokens = torch.zeros(1, 4, dtype=torch.int64)
    program = capture(model, (tokens,))
    assert program.aliases == {"head.weight": "tokens.weight"}
    assert program.cost().parameters == sum(p.numel() for p in model.parameters())
    assert len(program.instances) == 4


class Layer(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.linear(x) * scale


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Numbered(Layer):
    """Knows its place among the blocks, as Hugging Face decoders do."""

    def __init__(self, number: int, uses: str = "nothing") -> None:
        super().__init__()
        self._number, self.uses = number, uses

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = super().forward(x)
        passed_on = (self._number, x) if isinstance(self._number, int) else None
        assert passed_on is not None
        if self.uses == "arithmetic":
            return y * (self._number + 1)
        if self.uses == "an index":
            return y * [1, 2, 3, 4][self._number]
        if self.uses == "a comparison":
            return y if self._number else -y
        if self.uses == "a key":
            return y * {0: 1, 1: 2, 2: 3, 3: 4}[self._number]
        return y * self._number if self.uses == "a tensor" else y


def test_blocks_may_be_numbered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    model = Stack(*(Numbered(i) for i in range(4)))
    stamped, _ = both(model, (torch.randn(2, 4),), monkeypatch)
    assert was_stamped(caplog)
    assert len(stamped.instances) == 4
    assert [layer._number for layer in model.layers] == [0, 1, 2, 3]
    assert all(type(layer._number) is int for layer in model.layers)


@pytest.mark.parametrize("use", ["arithmetic", "an index", "a comparison", "a key", "a tensor"])
def test_a_number_that_is_used_makes_blocks_different(
    use: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    model, x = Stack(*(Numbered(i, use) for i in range(4))), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    stamped, _ = both(model, (x,), monkeypatch)
    assert not was_stamped(caplog)
    assert torch.equal(run(stamped, [x])[0], expected)


def test_integers_with_few_values_split_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(*(Numbered(i // 3, "arithmetic") for i in range(6)))
    stamped, _ = both(model, (torch.randn(2, 4),), monkeypatch)
    assert [i.block for i in stamped.instances.values()] == ["block0"] * 3 + ["block1"] * 3


class Config:
    def __init__(self) -> None:
        self.scale, self.names = 2.0, {"norm": ["a", "b"]}


class Configured(Layer):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * self.config.scale


def test_blocks_may_share_a_config(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    config = Config()
    both(Stack(*(Configured(config) for _ in range(4))), (torch.randn(2, 4),), monkeypatch)
    assert was_stamped(caplog)


class Alternating(Stack):
    """Two kinds in turn, a residual around each, and every hidden state returned."""

    def forward(self, x: Tensor) -> Any:
        states = []
        for layer in self.layers:
            y = layer(x)
            states.append(y)
            x = y if len(states) % 3 else x + y
        return states


def test_kinds_in_turn_and_every_state_returned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    layers = [Configured(Config()) if i % 2 else Layer() for i in range(8)]
    stamped, _ = both(Alternating(*layers), (torch.randn(2, 4),), monkeypatch)
    assert was_stamped(caplog)
    assert len(stamped.instances) == 8


class InPlace(Stack):
    def forward(self, x: Tensor) -> Any:
        x = x + 0
        total = torch.zeros_like(x)
        for layer in self.layers:
            y = layer(x)
            x.mul_(2)  # after the block has read it
            total = total + y
        return total


def test_writes_between_blocks_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = InPlace(*(Layer() for _ in range(4))), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    stamped, _ = both(model, (x,), monkeypatch)
    torch.testing.assert_close(run(stamped, [x])[0], expected)


class Meddling(Stack):
    """Sets an attribute right before each call, and back again."""

    def forward(self, x: Tensor) -> Any:
        for index, layer in enumerate(self.layers):
            layer.uses, layer._number = "arithmetic", index
            x = layer(x)
            layer.uses, layer._number = "nothing", 0
        return x


def test_attributes_set_from_outside_are_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    model, x = Meddling(*(Numbered(0) for _ in range(4))), torch.randn(2, 4)
    stamped, _ = both(model, (x,), monkeypatch)
    assert any("changed by something outside" in record.message for record in caplog.records)
    with torch.no_grad():
        assert torch.equal(run(stamped, [x])[0], model(x))


class Writes(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Twice(Stack):
    def forward(self, x: Tensor) -> Any:
        return super().forward(super().forward(x))


class Scales(Stack):
    def forward(self, x: Tensor) -> Any:
        for index, layer in enumerate(self.layers):
            x = layer(x, scale=float(index))
        return x


class Returns(Layer):
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return super().forward(x), x


class ReturnsStack(Stack):
    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x, _ = layer(x)
        return x


SHARED = nn.Parameter(torch.ones(4))


class Reaches(Layer):
    def __init__(self, table: list[Tensor]) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * self.table[0]


class Auxiliary(Layer):
    """Appends to a list that its caller holds."""

    def forward(self, x: Tensor, aux: Any = None) -> Tensor:  # type: ignore[override]
        y = self.linear(x)
        aux.append(y.pow(2).mean())
        return x + y


class AuxiliaryStack(Stack):
    def forward(self, x: Tensor) -> Any:
        aux: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, aux)
        return x + sum(aux)


class Keeps(Layer):
    """Leaves a tensor on itself for its model to read."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.aux = self.linear(x)
        return x + self.aux


class KeepsStack(Stack):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y + sum(layer.aux for layer in self.layers)


class Context:
    depth = 0


class Counting(Layer):
    """Counts in an object that all blocks share."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.context.depth += 1
        return x + self.linear(x) / self.context.depth


class CountingStack(Stack):
    def forward(self, x: Tensor) -> Any:
        self.layers[0].context.depth = 0
        return super().forward(x)


class LooksInside(Stack):
    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            gain = getattr(layer.linear, "bias", None)
            x = layer(x) if gain is None else layer(x) * gain
        return x


class CountsLayers(Stack):
    def forward(self, x: Tensor) -> Any:
        linears = sum(isinstance(module, nn.Linear) for module in self.modules())
        return super().forward(x) / linears


class SumsWeights(Stack):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + sum(p.sum() for p in self.layers.parameters())


class Gain(float):
    pass


class Gained(Layer):
    """Scales by a number whose class is not `float` itself."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = Gain(gain)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * self.gain


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table.cos()


class Rotated(Layer):
    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.linear(self.rotary(x))


def sharing(kind: str) -> nn.Module:
    if kind == "a module in every block":
        rotary = Rotary()
        return Stack(*(Rotated(rotary) for _ in range(4)))
    if kind == "blocks in two containers":
        stack = Stack(*(Layer() for _ in range(4)))
        stack.again = nn.Sequential(*stack.layers)
        return stack
    if kind == "an object that counts":
        context = Context()
        return CountingStack(*(Counting(context) for _ in range(4)))
    if kind == "a list that grows":
        return AuxiliaryStack(*(Auxiliary() for _ in range(4)))
    if kind == "modules counted while running":
        return CountsLayers(*(Layer() for _ in range(4)))
    if kind == "weights summed while running":
        return SumsWeights(*(Layer() for _ in range(4)))
    if kind == "one number of a class of its own":
        return Stack(*(Gained(gain) for gain in (1.0, 1.0, 3.0, 1.0)))
    if kind == "attributes read later":
        return KeepsStack(*(Keeps() for _ in range(4)))
    return LooksInside(*(Layer() for _ in range(4)))


@pytest.mark.parametrize(
    "kind",
    [
        "a module in every block",
        "blocks in two containers",
        "an object that counts",
        "a list that grows",
        "attributes read later",
        "weights read from outside",
        "modules counted while running",
        "weights summed while running",
        "one number of a class of its own",
    ],
)
def test_what_blocks_share_in_python_is_not_lost(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = sharing(kind), torch.randn(2, 4)
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        expected = model(x)
    stamped, _ = both(model, (x,), monkeypatch)
    assert torch.equal(run(stamped, [x])[0], expected)
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == tensors


class Side(Stack):
    def forward(self, x: Tensor) -> Any:
        return torch.stack([layer(x) for layer in self.layers])


def test_inputs_may_be_handed_through(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    both(ReturnsStack(*(Returns() for _ in range(4))), (torch.randn(2, 4),), monkeypatch)
    assert was_stamped(caplog)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Twice(*(Layer() for _ in range(4))), "is called twice"),
        (lambda: Scales(*(Layer() for _ in range(4))), "other arguments than the first"),
        (lambda: Side(*(Layer() for _ in range(4))), "no block of a stack"),
    ],
)
def test_what_does_not_fit_is_captured_flat(
    model: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    both(model(), (torch.randn(2, 4),), monkeypatch)
    assert any(reason in record.message for record in caplog.records)


def test_written_buffers_are_captured_flat() -> None:
    program = capture(Stack(*(Writes() for _ in range(4))), (torch.randn(2, 4),))
    verify(program)
    assert len(program.state) == 4


def test_foreign_tensors_are_captured_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [torch.full((4,), 2.0)]
    both(Stack(*(Reaches(table) for _ in range(4))), (torch.randn(2, 4),), monkeypatch)


class Conditioned(nn.Module):
    """Blocks that take a condition they ignore, a dict, and return a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, context: dict[str, Tensor], unread: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = x + self.linear(x) * context["gate"]
        return y, y.sum(dim=-1)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Conditioned() for _ in range(5))

    def forward(self, x: Tensor, gate: Tensor) -> list[Tensor]:
        sums = []
        for layer in self.layers:
            x, total = layer(x, {"gate": gate.sigmoid()}, unread=gate)
            sums.append(total)
        return [x, sums[0], sums[-1]]


def test_nested_arguments_and_unread_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    stamped, _ = both(Wrapped(), (torch.randn(2, 4), torch.randn(2, 4)), monkeypatch)
    assert was_stamped(caplog)
    assert len(stamped.instances) == 5


def test_tied_layers_stay_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(*(Layer() for _ in range(4)))
    model.layers[3].linear.weight = model.layers[1].linear.weight
    stamped, _ = both(model, (torch.randn(2, 4),), monkeypatch)
    assert len(stamped.tensors) == 7


class Liar(Layer):
    """Computes something else from the second call of any of its kind on."""

    calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        Liar.calls += 1
        y = super().forward(x)
        return torch.relu(y) if Liar.calls > 1 else y


def test_a_block_unlike_its_kind_is_found(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "blockwright.capture")
    program = capture(Stack(*(Liar() for _ in range(4))), (torch.randn(2, 4),), fold=True)
    assert any("computes something else" in record.message for record in caplog.records)
    assert sum("relu" in str(node.target) for node in program.module().graph.nodes) == 4


@pytest.mark.parametrize("blocks", [3, 40])
def test_a_stack_is_two_marks_and_one_for_all_others(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stack(*(Layer() for _ in range(blocks)))
    roles: list[str] = []

    def kept(program: Program, press: Press, *rest: Any) -> Program:
        roles.extend(entry.role for entry in press.marks)
        return stamp.stamp(program, press, *rest)

    monkeypatch.setattr(capture_module, "stamp", kept)
    program = capture(model.eval(), (torch.randn(2, 4),))
    assert roles == ["enter", "leave", "calls"]
    assert len(program.instances) == blocks


def test_a_preset_is_captured_without_memory() -> None:
    with torch.device("meta"):
        model = GPT(GPT2_XL).eval()
        tokens = torch.zeros(1, 16, dtype=torch.int64)
    program = capture(model, (tokens,))
    assert len(program.instances) == 48
    assert program.cost().parameters == sum(p.numel() for p in model.parameters())
    assert all(tensor.is_meta for tensor in program.tensors.values())
