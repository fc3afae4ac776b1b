"""The smallest program that shows what a bisection found, as a directory to replay.

    case.json              the pass and its one decision, or the backend; the errors found
    graph.json             the block alone
    weights.safetensors    its weights
    inputs.safetensors     what the block was called with
    README.md              the same in words, and the command that replays it

Data only, in the container of crash reproducers: replaying interprets it and runs the pass or the
backend installed under that name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ..backends import container, plainjson, weights
from ..backends.base import Backend
from ..backends.plainjson import dumps
from ..backends.registry import get_backend
from ..ir.cut import cut_instance, cut_nodes, live_values, prefix
from ..ir.errors import ArtefactError, BlockwrightError
from ..ir.program import Program
from ..ir.recognize import Block
from ..ir.regions import find_once
from ..ir.run import run
from ..ir.serialize import from_json, to_json
from ..passes.base import Plan
from .bisect import Culprit, watched
from .bisect_backend import EngineBisection, WrongOp, measure_lowered
from .bisect_pass import Applied
from .bisect_search import Bound, worst_of
from .casefile import named, read_tensors, unnamed, versions
from .numerics import Inputs
from .recipe import resolve, to_text

CASE, GRAPH, README = "case.json", "graph.json", "README.md"
WEIGHTS, INPUTS = "weights.safetensors", "inputs.safetensors"
KIND = "bisected case"
_SHARE = 0.5  # of the recorded error that counts as the same fault


@dataclass(frozen=True)
class Case:
    """A small program on which a pass or an engine shows an error.

    Attributes:
        program: The block alone, or the whole program where the fault needs it.
        inputs: What it is called with.
        metric: How the error is measured; see `bisect_search.Bound`.
        error: The error found.
        about: The pass (`recipe`, `plan`, `seed`) or engine (`backend`, `options`), and for people
            `title`, `where`, `op`, and whether it is the block alone (`minimal`).
    """

    program: Program
    inputs: Inputs
    metric: str
    error: float
    about: Mapping[str, Any]


@dataclass(frozen=True)
class CaseReplay:
    """A case run again.

    Attributes:
        case: The case.
        error: The error now.
    """

    case: Case
    error: float

    @property
    def same(self) -> bool:
        """Whether the fault is still there."""
        return self.error > 0 and self.error >= _SHARE * self.case.error

    def __str__(self) -> str:
        """Render in a few lines."""
        now = "the same fault" if self.same else "the fault is gone"
        lines = [str(self.case.about["title"]), f"op: {self.case.about['op']}"]
        errors = f"{self.case.metric} error {self.case.error:.3g}, now {self.error:.3g}"
        return "\n".join([*lines, f"recorded: {errors}: {now}"])


def case_of_pass(culprit: Culprit, bound: Bound) -> Case:
    """Return the smallest case in which the pass shows the error: block, region, or everything."""
    applied, label = culprit.applied, culprit.region.label
    plan = applied.restricted([(culprit.region, culprit.module)])
    metric = "cosine" if bound.metric == "cosine" else "relative"
    for program, inputs, minimal in _pieces_of_pass(culprit):
        try:
            small = Applied.of(applied.pass_, program, [inputs], plan=plan, seed=applied.seed)
            error = _error_of_pass(small, metric)
        except BlockwrightError:  # the pass needs more of the model than the piece holds
            if not minimal:
                raise
            continue
        if error or not minimal:
            break
    about = {
        "recipe": to_text([applied.pass_]),
        "plan": plan.to_json(),
        "seed": applied.seed,
        "title": f"{applied.pass_} goes wrong at {label}",
        "where": label,
        "op": str(culprit.op),
        "minimal": minimal,
    }
    return Case(program, inputs, metric, error, about)


def case_of_engine(
    found: EngineBisection, culprit: WrongOp, backend: Backend, inputs: Sequence[Inputs],
    options: Mapping[str, Any],
) -> Case:  # fmt: skip
    """Return the smallest case in which the engine shows the error: op, or everything up to it."""
    flat, node = found.program, culprit.node
    worst = inputs[culprit.after.worst]
    metric = "cosine" if found.bound.metric == "cosine" else "relative"
    read = [n for n in node.all_input_nodes if n.op != "get_attr"]
    values = dict(zip(read, watched(flat, None, read, worst), strict=True))
    whole = (prefix(flat, live_values(flat.main, node)), worst)
    for program, given in (cut_nodes(flat, [node], values, [node]), whole):
        error = _error_of_engine(program, backend, given, metric, options)
        if found.bound.limit is None or error > found.bound.limit:
            break
    about = {
        "backend": backend.name,
        "options": dict(options),
        "title": f"{backend.name} goes wrong at {culprit.path or node.name}",
        "where": culprit.block,
        "op": culprit.to_json()["op"],
        "minimal": program is not whole[0],
    }
    return Case(program, given, metric, error, about)


def write(folder: Path, case: Case) -> Path:
    """Write a case: afterwards the directory holds it, or what it held before.

    Raises:
        ArtefactError: The disk refuses, or the program has no form as data.
    """
    about = {**case.about, "metric": case.metric, "error": str(case.error)}
    with container.Writer(folder) as writer:
        writer.add(CASE, [dumps(about)])
        writer.add(GRAPH, [dumps(to_json(case.program))])
        writer.add(WEIGHTS, weights.chunks(case.program.tensors))
        writer.add(INPUTS, weights.chunks(named([case.inputs])))
        writer.add(README, [_readme(folder, case).encode()])
        writer.commit({"kind": KIND, "made_by": versions()})
    return folder


def read(path: str | Path) -> Case:
    """Read a case.

    Raises:
        ArtefactError: The directory is damaged or holds something else.
    """
    folder = Path(path)
    manifest, entries = container.read(folder)
    if manifest.get("kind") != KIND:
        raise ArtefactError(f"{folder} holds no bisected case.", where=container.MANIFEST)
    try:
        about, graph = (plainjson.read(folder / entries[name].file) for name in (CASE, GRAPH))
        tensors = read_tensors(folder / entries[WEIGHTS].file)
        (inputs,) = unnamed(read_tensors(folder / entries[INPUTS].file)) or [[]]
        metric, error = str(about.pop("metric")), float(about.pop("error"))
        return Case(from_json(graph, tensors), inputs, metric, error, about)
    except BlockwrightError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{folder} is malformed: {error}.", where=str(folder)) from error


def replay(path: str | Path) -> CaseReplay:
    """Run a case again and measure its error.

    Raises:
        ArtefactError: The directory is damaged or holds something else.
        OptionError: The pass or backend is not installed here.
    """
    case = read(path)
    try:
        if "backend" in case.about:
            backend = get_backend(str(case.about["backend"]))
            options = dict(case.about["options"])
            error = _error_of_engine(case.program, backend, case.inputs, case.metric, options)
            return CaseReplay(case, error)
        (pass_,) = resolve(str(case.about["recipe"]))
        plan, seed = Plan.from_json(case.about["plan"], type(pass_)), int(case.about["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is malformed: {error}.", where=str(path)) from error
    applied = Applied.of(pass_, case.program, [case.inputs], plan=plan, seed=seed)
    return CaseReplay(case, _error_of_pass(applied, case.metric))


def _pieces_of_pass(culprit: Culprit) -> Iterator[tuple[Program, Inputs, bool]]:
    """Yield programs in which the pass finds the region, small ones first, and if they are cut."""
    before, region = culprit.applied.before, culprit.region
    for program, inputs in _cuts(before, culprit):
        found = {r.label for r in culprit.pass_.regions(program)}
        if region.label in found:
            yield program, inputs, True
    yield before, culprit.inputs, False


def _cuts(before: Program, culprit: Culprit) -> Iterator[tuple[Program, Inputs]]:
    region = culprit.region
    if region.instance:
        graph = before.graphs[before.instances[region.instance].block]
        places = [node for node in graph.nodes if node.op == "placeholder"]
        values = watched(before, region.instance, places, culprit.inputs)
        yield cut_instance(before, region.instance, values)
        return
    for block in (b for b in find_once(before.main, Block) if region.nodes[0] in b.nodes):
        known = watched(before, None, block.inputs, culprit.inputs)
        yield _cut(before, block.nodes, block.inputs, known, block.outputs)
    yield _cut(before, region.nodes, region.inputs, culprit.values, region.outputs)


def _cut(
    program: Program,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    values: Sequence[Any],
    outputs: Sequence[fx.Node],
) -> tuple[Program, list[Tensor]]:
    return cut_nodes(program, nodes, dict(zip(inputs, values, strict=True)), outputs)


def _error_of_pass(applied: Applied, metric: str) -> float:
    """Run a program before and after one decision of a pass."""
    (inputs,) = applied.inputs
    old, new = run(applied.before, inputs), run(applied.after(), inputs)
    bound = Bound(0.0, metric)
    return worst_of([bound.check(*pair) for pair in zip(new, old, strict=True)]).error


def _error_of_engine(
    program: Program, backend: Backend, inputs: Inputs, metric: str, options: Mapping[str, Any]
) -> float:
    return measure_lowered(program, backend, [inputs], Bound(0.0, metric), options).error


def _readme(folder: Path, case: Case) -> str:
    about, what = case.about, "The block alone" if case.about["minimal"] else "The whole program"
    return "\n".join(
        [
            f"# {about['title']}",
            "",
            f"{about['op']}.",
            f"{what}, on the inputs it was called with: {case.metric} error {case.error:.3g}.",
            "",
            f"    blockwright bisect --run {folder}",
            "",
            f"Pass: `{about['recipe']}`" if "recipe" in about else f"Backend: {about['backend']}",
            "",
        ]
    )
