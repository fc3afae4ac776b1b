"""An engine is called like the model; sessions keep state apart."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from blockwright.backends.base import Backend
from blockwright.backends.eager import EagerBackend
from blockwright.backends.engine import Engine
from blockwright.backends.registry import backend_names, get_backend
from blockwright.backends.report import Report
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError, LoweringError, OptionError


@dataclass
class Result:
    hidden: Tensor
    parts: dict[str, Tensor]


pytree.register_dataclass(Result)


class Nested(nn.Module):
    """Takes and returns what a flat list of tensors cannot say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor, *more: Tensor, scale: float = 1.0, extra: Any = None) -> Result:
        y = self.second(self.first(x * scale) + sum(more))
        if extra is not None:
            y = y + extra["shift"][0]
        return Result(y, {"mean": y.mean(-1), "max": y.amax(-1)})


class Memory(nn.Module):
    """Adds up what it is given, and says how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.total.add_(x)
        self.calls.add_(1)
        return self.total, self.calls


class Latch(nn.Module):
    """Its next state is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        before = self.last.clone()
        self.last.copy_(x)
        return before


def engine_of(model: nn.Module, inputs: Any) -> Engine:
    program = capture(model, inputs)
    return Engine(program, EagerBackend().lower(program, {}), "eager", {"recipe": "none"})


@pytest.fixture(scope="module")
def memory() -> Engine:
    return engine_of(Memory(), (torch.ones(2),))


NESTED = (torch.ones(3, 8), torch.ones(3, 8))
KEYWORDS = {"scale": 0.5, "extra": {"shift": [torch.ones(8)]}}


@pytest.fixture(scope="module")
def nested() -> tuple[nn.Module, Engine]:
    torch.manual_seed(0)
    model = Nested().eval()
    exported = torch.export.export(model, NESTED, KEYWORDS, strict=False)
    program = capture(exported)
    return model, Engine(program, EagerBackend().lower(program, {}), "eager", {})


def test_nested_arguments_and_dataclass_results(nested: tuple[nn.Module, Engine]) -> None:
    model, engine = nested
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    keywords = {"scale": 0.5, "extra": {"shift": [torch.randn(8)]}}
    result = engine(x, other, **keywords)
    assert isinstance(result, Result)
    expected = model(x, other, **keywords)
    torch.testing.assert_close(result.hidden, expected.hidden)
    assert result.parts.keys() == expected.parts.keys()
    assert not result.hidden.requires_grad


def test_a_wrong_call_says_what_is_wrong(nested: tuple[nn.Module, Engine]) -> None:
    _, engine = nested
    with pytest.raises(OptionError, match=r"'scale' is 2\.0; the program was captured for 0.5"):
        engine(*NESTED, scale=2.0, extra=KEYWORDS["extra"])
    with pytest.raises(OptionError, match="missing"):
        engine(*NESTED)


def test_it_acts_like_a_module(nested: tuple[nn.Module, Engine]) -> None:
    model, engine = nested
    assert engine.eval() is engine
    assert not engine.training
    assert engine.state_dict().keys() == model.state_dict().keys()
    assert engine.state_dict()["second.weight"] is engine.state_dict()["first.weight"]
    assert repr(engine).endswith("on eager")
    assert isinstance(engine.report, Report)


def test_without_a_session_state_is_refused(memory: Engine) -> None:
    with pytest.raises(OptionError, match=r"keeps state .*total.*\n.*engine\.session\(\)"):
        memory(torch.ones(2))


def test_sessions_share_no_state(memory: Engine) -> None:
    one, two = memory.session(), memory.session()
    one(torch.ones(2))
    total, calls = one(torch.ones(2))
    assert (total.tolist(), calls.item()) == ([2, 2], 2)
    total, calls = two(torch.full((2,), 5.0))
    assert (total.tolist(), calls.item()) == ([5, 5], 1)
    assert memory.program.tensors["total"].tolist() == [0, 0]


def test_reset_makes_the_second_run_equal_the_first(memory: Engine) -> None:
    session = memory.session()
    first = [session(torch.full((2,), float(i)))[0] for i in range(3)]
    session.reset()
    second = [session(torch.full((2,), float(i)))[0] for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_failed_call_changes_no_state(memory: Engine) -> None:
    session = memory.session()
    session(torch.ones(2))
    with pytest.raises(OptionError):
        session(torch.ones(3))
    assert session.state_dict()["calls"].item() == 1


def test_callers_cannot_reach_the_state_through_what_they_hold(memory: Engine) -> None:
    session = memory.session()
    total, _ = session(torch.ones(2))
    total.fill_(100)
    assert session(torch.ones(2))[0].tolist() == [2, 2]
    session.state_dict()["total"].fill_(100)
    assert session(torch.ones(2))[0].tolist() == [3, 3]

    latch, x = engine_of(Latch(), (torch.ones(2),)).session(), torch.ones(2)
    latch(x)
    x.fill_(7)
    assert latch(x).tolist() == [1, 1]


def test_threads_do_not_lose_calls(memory: Engine) -> None:
    session = memory.session()
    others = [memory.session() for _ in range(4)]

    def work(own: Any) -> None:
        for _ in range(25):
            session(torch.ones(2))
            own(torch.ones(2))

    threads = [threading.Thread(target=work, args=(own,)) for own in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.state_dict()["calls"].item() == 100
    assert [own.state_dict()["calls"].item() for own in others] == [25] * 4


def test_a_session_is_saved_and_continued(memory: Engine, tmp_path: Path) -> None:
    session = memory.session()
    session(torch.ones(2))
    session.save(tmp_path / "state.safetensors")
    session.save(tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    continued = memory.session().load(tmp_path / "state.safetensors")
    assert continued(torch.ones(2))[1].item() == 2
    assert session(torch.ones(2))[1].item() == 2
    continued.reset()
    assert continued(torch.ones(2))[1].item() == 1


def test_the_state_of_another_model_is_refused(memory: Engine, tmp_path: Path) -> None:
    engine_of(Latch(), (torch.ones(2),)).session().save(tmp_path / "other")
    with pytest.raises(ArtefactError, match="state of another model; this one keeps total, calls"):
        memory.session().load(tmp_path / "other")
    (tmp_path / "other").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ArtefactError, match="not a sound safetensors file"):
        memory.session().load(tmp_path / "other")
    with pytest.raises(ArtefactError, match="cannot write"):
        memory.session().save(tmp_path / "missing" / "state")


def test_backends_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(get_backend("eager"), EagerBackend)
    assert {"eager", "inductor", "onnxruntime"} <= set(backend_names())
    with pytest.raises(OptionError, match=r"no backend 'eagre'.*\n.*use one of eager, inductor"):
        get_backend("eagre")


def test_other_packages_bring_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str, found: Any) -> None:
            self.name, self.found = name, found

        def load(self) -> Any:
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

    points = [Point("mine", EagerBackend), Point("broken", ImportError("no module named 'npu'"))]
    monkeypatch.setattr(
        "blockwright.backends.registry.entry_points",
        lambda group: points if group == "blockwright.backends" else [],
    )
    assert isinstance(get_backend("mine"), Backend)
    with pytest.raises(LoweringError, match="broken does not import: no module named 'npu'"):
        get_backend("broken")


def test_ordered_dicts_come_back_as_they_went() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return OrderedDict(b=x + 1, a=[x, (x * 2, None)])

    result = engine_of(Model(), (torch.ones(2),))(torch.ones(2))
    assert type(result) is OrderedDict
    assert list(result) == ["b", "a"]
    assert result["a"][1][1] is None
