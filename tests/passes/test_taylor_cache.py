"""A step that is left out costs nothing, one that is computed is the model's, bit by bit."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.backends.engine import Engine, Session
from blockwright.backends.registry import get_backend
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import ArtefactError, NoMatchError, OptionError
from blockwright.ir.graphs import aten
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.dit import TOY, DiT
from blockwright.models.flux import TOY_FLUX, Flux
from blockwright.models.sd3 import SD3, TOY_SD3
from blockwright.passes import QuantizeWeights, TaylorCache
from blockwright.passes.shared.differences import NEVER, forecast, pushed
from blockwright.passes.shared.trust import interval

DEPTH, STEPS = 4, 10
OPEN = 1e9  # a threshold that every step meets
GATE = 0.06  # one that some steps meet


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def dit() -> DiT:
    model = drawn(DiT(replace(TOY, depth=DEPTH)))
    assert isinstance(model, DiT)
    return model


@pytest.fixture(scope="module")
def captured(dit: DiT) -> Program:
    return bw.capture(dit, dit.example_inputs())


def calls(model: Any, steps: int = STEPS) -> list[tuple[Tensor, ...]]:
    """Return the inputs of a run: the image swings, the slower the later."""
    first, *others = model.example_inputs()
    return [(first * math.cos(3 * math.sqrt(k)), *others) for k in range(steps)]


def cached(program: Program, **options: Any) -> Program:
    new, _ = run_passes(program, [TaylorCache(steps=STEPS, **options)])
    return new


def session_of(program: Program, backend: str = "eager") -> Session:
    return engine_of(program, backend).session()


def engine_of(program: Program, backend: str = "eager") -> Engine:
    return Engine(program, get_backend(backend).lower(program, {"threads": 1}), backend, {})


def ran(session: Session, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [session(*call) for call in inputs]


def plainly(model: nn.Module, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(*call) for call in inputs]


def full(model: nn.Module, program: Program) -> str:
    """Return `1` for each step of a run that gave what the model gives, to the bit."""
    inputs = calls(model)
    pairs = zip(ran(session_of(program), inputs), plainly(model, inputs), strict=True)
    return "".join("01"[torch.equal(*pair)] for pair in pairs)


def test_golden(captured: Program, dit: DiT, golden: Callable[[str, str], None]) -> None:
    inputs = list(dit.example_inputs())
    options = TaylorCache(steps=4, when="mask", mask="1101")
    new, (step,) = run_passes(captured, [options], [inputs])
    golden("taylor_cache", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0},
        {"threshold": 0.0, "dtype": "model", "order": 0, "probe_order": 0},
        {"threshold": OPEN, "warmup": STEPS - 2},
        {"when": "interval", "every": 1},
        {"when": "interval", "every": 1, "what": "modules"},
    ],
)
@pytest.mark.filterwarnings("ignore:taylor_cache has taken no step")
def test_a_cache_that_is_never_asked_changes_no_bit(
    captured: Program, dit: DiT, options: dict[str, Any]
) -> None:
    assert full(dit, cached(captured, **options)) == "1" * STEPS


@pytest.mark.parametrize(
    ("steps", "first", "every", "count"),
    [(50, 2, 4, 14), (50, 2, 3, 18), (50, 3, 6, 10), (50, 3, 5, 12), (50, 3, 4, 14)],
)
def test_published_schedules(steps: int, first: int, every: int, count: int) -> None:
    assert interval(steps, first, every).count("1") == count == first + (steps - first) // every


@pytest.mark.parametrize("what", ["stack", "modules"])
def test_an_interval_computes_its_steps(captured: Program, dit: DiT, what: str) -> None:
    new = cached(captured, when="interval", first=2, every=3, what=what)
    assert full(dit, new) == interval(STEPS, 2, 3) == "1100100100"


def test_the_gate_opens_when_the_rule_says(captured: Program, dit: DiT) -> None:
    """Warm-up, the last step, and a limit in a row, where the threshold would let all pass."""
    assert full(dit, cached(captured, threshold=OPEN)) == "1110000001"
    assert full(dit, cached(captured, threshold=OPEN, force_last=False)) == "1110000000"
    assert full(dit, cached(captured, threshold=OPEN, warmup=0)) == "1000000001"
    assert full(dit, cached(captured, threshold=OPEN, max_skips=2)) == "1110010011"


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_the_gate_is_that_of_the_paper(captured: Program, dit: DiT, reduce: str) -> None:
    """Replays the rule in Python on the first block's outputs."""
    seen: list[Tensor] = []
    inputs = calls(dit)
    for call in inputs:
        run(captured, call, on_block=lambda name, values: seen.append(values[0]))
    probes = seen[::DEPTH]
    computed, past = "", list[tuple[int, Tensor]]()
    threshold = GATE
    for step, probe in enumerate(probes):
        guess = torch.zeros_like(probe)
        for order, difference in enumerate(differences([*past], 3)):
            guess = guess + difference * (step - past[-1][0]) ** order / math.factorial(order)
        axes = (1, 2) if reduce == "max" else (0, 1, 2)
        error = ((guess - probe).abs().mean(axes) / probe.abs().mean(axes)).max()
        skip = bool(error < threshold) and 2 < step < STEPS - 1
        computed += "01"[not skip]
        if not skip:
            past.append((step, probe))
    assert 4 < computed.count("1") < STEPS
    assert full(dit, cached(captured, threshold=threshold, reduce=reduce)) == computed


def differences(past: list[tuple[int, Tensor]], order: int) -> list[Tensor]:
    """Compute the differences of the paper anew from all values."""
    stack: list[Tensor] = []
    for index, (step, value) in enumerate(past):
        new = [value]
        for old in stack[:order]:
            new.append((new[-1] - old) / (step - past[index - 1][0]))
        stack = new
    return stack


def test_newton_is_exact_on_a_square_and_taylor_is_not() -> None:
    """F(k) = k^2 at steps 0, 1, 4; asked for at 6."""
    found = {}
    for basis in ("taylor", "newton"):
        stack, steps = torch.zeros(3, 2), torch.full((3,), NEVER)
        for k in (0, 1, 4):
            now = torch.tensor(k)
            stack, steps = pushed(now, torch.full((2,), float(k * k)), stack, steps, basis)
        assert steps.tolist() == [4, 1, 0]
        found[basis] = forecast(torch.tensor(6), stack, steps, basis)
    assert found["newton"].tolist() == [36, 36]
    assert found["taylor"].tolist() != [36, 36]


def test_orders_fill_up_one_by_one() -> None:
    stack, steps = torch.full((3, 1), 7.0), torch.tensor([9, 8, 7])  # of an earlier run
    for k, expected in ((0, [5, 0, 0]), (2, [9, 2, 0])):
        value = torch.tensor([5.0 + 2 * k])
        stack, steps = pushed(torch.tensor(k), value, stack, steps, "taylor")
        assert stack.flatten().tolist() == expected


def test_what_is_left_out_is_not_computed(captured: Program, dit: DiT) -> None:
    new = cached(captured, threshold=OPEN)
    state, counts = new.initial_state(), list[int]()
    for call in calls(dit):
        seen: list[Any] = []

        def see(instance: str | None, node: Any, value: Any, seen: list[Any] = seen) -> None:
            seen.append(node.target)

        found = run(new, new.arranged(call, state), on_node=see)
        state = {slot.name: found[slot.output] for slot in new.state}
        counts.append(seen.count(aten.scaled_dot_product_attention.default))
    assert counts == [DEPTH] * 3 + [1] * 6 + [DEPTH]
    assert state["taylor_cache.hits"].item() == 6


def test_a_run_after_reset_is_the_first_again(captured: Program, dit: DiT, tmp_path: Path) -> None:
    session, inputs = session_of(cached(captured, threshold=GATE)), calls(dit)
    first = ran(session, inputs)
    with pytest.raises(OptionError, match="has been through all steps"):
        session(*inputs[0])
    session.reset()
    half = ran(session, inputs[:5])
    session.save(tmp_path / "state.safetensors")
    resumed = session_of(cached(captured, threshold=GATE)).load(tmp_path / "state.safetensors")
    assert all(map(torch.equal, half + ran(resumed, inputs[5:]), first))
    with pytest.raises(ArtefactError, match="state of another model"):
        session_of(cached(captured, order=2)).load(tmp_path / "state.safetensors")


def test_a_step_may_be_told(captured: Program, dit: DiT) -> None:
    """Step 0 begins a run, whatever was before it."""
    session = session_of(cached(captured, threshold=GATE, counted=False))
    counting = ran(session_of(cached(captured, threshold=GATE)), calls(dit))
    for _ in range(2):
        for step, (call, expected) in enumerate(zip(calls(dit), counting, strict=True)):
            assert torch.equal(session(*call, step=torch.tensor(step)), expected)
    with pytest.raises(OptionError, match="this one is not the next"):
        session(*calls(dit)[0], step=torch.tensor(3))
    session(*calls(dit)[0], step=torch.tensor(0))
    with pytest.raises(OptionError, match="this one is not the next"):
        session(*calls(dit)[0], step=torch.tensor(2))
    session(*calls(dit)[0], step=torch.tensor(1))


def test_zero_hits_are_said(captured: Program, dit: DiT) -> None:
    session = session_of(cached(captured, threshold=1e-9))
    with pytest.warns(UserWarning, match=r"no step of this run from the cache.* was: 0\.\d+"):
        ran(session, calls(dit))


def test_bad_calls(captured: Program, dit: DiT) -> None:
    engine = engine_of(cached(captured, threshold=GATE))
    first = calls(dit)[0]
    with pytest.raises(OptionError, match="keeps state from call to call"):
        engine(*first)
    session = engine.session()
    with pytest.raises(OptionError, match=r"has shape \[1, 4, 8, 8\]"):
        session(*(value[:1] for value in first))
    with pytest.raises(OptionError, match="gate of the cache is NaN"):
        session(torch.full_like(first[0], float("nan")), *first[1:])
    assert torch.equal(session(*first), plainly(dit, [first])[0])


def test_sessions_in_threads_do_not_mix(captured: Program, dit: DiT) -> None:
    engine, inputs = engine_of(cached(captured, threshold=GATE)), calls(dit)
    other = [(-x, *rest) for x, *rest in inputs]
    alone = [ran(engine.session(), each) for each in (inputs, other)]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        found[number] = ran(engine.session(), (inputs, other)[number])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number in range(2):
        assert all(map(torch.equal, found[number], alone[number]))


@pytest.fixture(scope="module")
def flux() -> Flux:
    model = drawn(Flux(TOY_FLUX))
    assert isinstance(model, Flux)
    return model


@pytest.fixture(scope="module")
def fluxes(flux: Flux) -> Program:
    return bw.capture(flux, flux.example_inputs())


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_joint_blocks_keep_the_image(name: str, flux: Flux, fluxes: Program) -> None:
    model: Any = flux if name == "flux" else drawn(SD3(TOY_SD3))
    program = fluxes if name == "flux" else bw.capture(model, model.example_inputs())
    new = cached(program, threshold=OPEN)
    assert full(model, new) == "1110000001"
    shapes = {name: tuple(value.shape) for name, value in new.initial_state().items()}
    batch, patches, dim = shapes["taylor_cache.value_0"][1:]
    assert shapes["taylor_cache.probe"][1:] == (batch, patches, dim)


def test_modules_of_joint_and_parallel_blocks(flux: Flux, fluxes: Program) -> None:
    """Four values of a joint block, one of a single block: attention and network share a matrix."""
    new = cached(fluxes, what="modules", when="interval", first=2, every=3)
    values = [name for name in new.initial_state() if ".value_" in name and "steps" not in name]
    joint, single = TOY_FLUX.double_depth, TOY_FLUX.single_depth
    assert len(values) == 4 * joint + single
    assert full(flux, new) == "1100100100"


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_engines_leave_out_the_same_steps(
    captured: Program, dit: DiT, backend: str, tmp_path: Path
) -> None:
    new, inputs = cached(captured, threshold=GATE), calls(dit)
    engine_of(new, backend).save(tmp_path / "cached.bw")
    sessions = [session_of(new), bw.load(tmp_path / "cached.bw").session()]
    (expected, hits), (found, others) = (
        (ran(session, inputs), session.state_dict()["taylor_cache.hits"]) for session in sessions
    )
    assert torch.equal(hits, others)
    assert 0 < hits < STEPS
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_goes_with_quantization(captured: Program, dit: DiT) -> None:
    passes = [TaylorCache(steps=STEPS, threshold=GATE), QuantizeWeights()]
    inputs = [list(dit.example_inputs())]
    first, _ = run_passes(captured, passes, inputs)
    second, _ = run_passes(captured, passes[::-1], inputs)
    for a, b in zip(*(ran(session_of(p), calls(dit)) for p in (first, second)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dynamic_sizes_are_declined(dit: DiT) -> None:
    sizes = {0: Dim("batch", min=1, max=8)}
    program = bw.capture(dit, dit.example_inputs(), dynamic_shapes=(sizes, sizes, sizes))
    with pytest.raises(NoMatchError, match="has dynamic sizes, and state has fixed ones"):
        cached(program)


def test_a_second_cache_finds_nothing(captured: Program) -> None:
    with pytest.raises(NoMatchError, match="taylor-cache changed nothing"):
        cached(cached(captured))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 is out of range"),
        ({"steps": 10**9}, "steps=1000000000 is out of range"),
        ({"order": 99}, "order=99 is out of range"),
        ({"threshold": -1.0}, "threshold=-1.0 is out of range"),
        ({"threshold": float("nan")}, "threshold=nan is out of range"),
        ({"probe_depth": 0}, "probe_depth=0 is out of range"),
        ({"when": "never"}, "when .* is not supported"),
        ({"what": "modules"}, "when .with what=modules.=gate is not supported"),
        ({"basis": "fourier"}, "basis=fourier is not supported"),
        ({"when": "mask", "mask": "0111"}, "does not fit 4 steps"),
        ({"when": "mask", "mask": "11"}, "does not fit 4 steps"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TaylorCache(**{"steps": 4, **options})
