"""What a pass may do to a graph."""

from __future__ import annotations

import json
import random

import torch
from torch import fx

from ..ir.branches import scope
from ..ir.program import MAIN, Program
from ..ir.serialize import to_json
from ..ir.shapes import describe
from ..ir.verify import verify
from .case import Case, apply
from .fakes import fakes
from .snapshot import renamed, skeleton, snapshot


def keeps_invariants(case: Case) -> None:
    """Ask for a sound graph with the interface it had, and sizes as free as they were (I1-I11)."""
    if case.applied is None:
        return
    new, old = case.applied[0], case.program
    verify(new, by=case.pass_.name)
    verify(new, by=case.pass_.name)  # a second look finds nothing new
    assert new.signature == old.signature
    assert new.state == old.state
    assert not fakes().settled, f"{case.pass_.name} settled {fakes().settled}"
    assert new.unused_tensors() <= old.unused_tensors(), "left tensors that nobody reads"
    assert new.parameters <= new.tensors.keys()
    assert set(new.aliases.values()) <= new.tensors.keys(), "left a name of no tensor"
    json.dumps(to_json(new))


def keeps_names_of_what_it_leaves(case: Case) -> None:
    """Ask that a node the pass did not make is what it was: name, op, place, shape (I4)."""
    if case.applied is None:
        return
    new, old = case.applied[0], case.program
    roots = {new.instances[name].block: old.instances[name].block for name in new.instances}
    for root, origin in {MAIN: MAIN, **roots}.items():
        keys = scope(old.graphs, origin)
        before = {node.name: node for key in keys for node in old.graphs[key].nodes}
        for node in (n for key in scope(new.graphs, root) for n in new.graphs[key].nodes):
            given = node.op == "placeholder" and node.graph is new.graphs[root]
            computed = node.op == "call_function"
            if (computed or given) and not _made_by(node, case.pass_.name):
                was = before.get(node.name)
                assert was is not None, f"{node.name} is new and does not say who made it"
                assert node.target == was.target
                assert describe(node.meta["val"]) == describe(was.meta["val"])
                assert _place(node) == _place(was)


def leaves_its_input_alone(case: Case) -> None:
    """Ask that program, tensors and random state are as before (S12, B1)."""
    program = case.program
    before, places = snapshot(program), [t.data_ptr() for t in program.tensors.values()]
    state, python = torch.get_rng_state(), random.getstate()
    apply(case.pass_, program, [case.flat])
    assert snapshot(program) == before
    assert [t.data_ptr() for t in program.tensors.values()] == places
    assert torch.equal(torch.get_rng_state(), state), "drew random numbers"
    assert random.getstate() == python, "drew random numbers"


def is_deterministic(case: Case) -> None:
    """Ask for the same graph and weights whatever ran before (S3)."""
    if case.applied is None:
        return
    torch.rand(1)
    again = apply(case.pass_, case.program)
    assert again is not None
    assert snapshot(again[0]) == snapshot(case.applied[0])
    assert again[1].plan.to_json() == case.applied[1].plan.to_json()


def has_an_honest_receipt(case: Case) -> None:
    """Ask that what it looked at is what it changed and what it skipped."""
    if case.applied is None:
        return
    (new, step), old = case.applied, case.program
    receipt, labels = step.receipt, [region.label for region in case.pass_.regions(old)]
    assert len(set(labels)) == len(labels), "two regions have one label"
    assert receipt.candidates == len(receipt.changed) + len(receipt.skipped)
    assert set(receipt.changed) <= set(labels)
    assert not set(receipt.changed) & receipt.skipped.keys()
    assert all(receipt.skipped.values()), "a skip gives no reason"
    assert receipt.parameters == (old.cost().parameters, new.cost().parameters)
    assert receipt.bytes == (old.cost().weight_bytes, new.cost().weight_bytes)
    assert receipt.nodes == (old.nodes(), new.nodes())
    json.dumps(step.to_json(), allow_nan=False)


def is_idempotent(case: Case) -> None:
    """Ask that a second run finds nothing to do, or puts back what it found (S4)."""
    if case.applied is None or not case.subject.idempotent:
        return
    again = apply(case.pass_, case.applied[0])
    assert again is None or skeleton(again[0]) == skeleton(case.applied[0]), (
        f"a second run changed {again[1].receipt.changed[:3]}"
    )


def ignores_names(case: Case) -> None:
    """Ask for the same result when modules and weights are called something else."""
    other = apply(case.pass_, renamed(case.program))
    assert (other is None) == (case.applied is None)
    if other is not None and case.applied is not None:
        assert skeleton(other[0]) == skeleton(case.applied[0])


def keeps_ties(case: Case) -> None:
    """Ask that a shared weight stays shared or is replaced everywhere (I9)."""
    if case.applied is None:
        return
    new, old = case.applied[0], case.program
    for alias, name in old.aliases.items():
        if name in new.tensors and new.tensors[name] is old.tensors[name]:
            assert new.aliases.get(alias) == name, f"{alias} is no longer {name}"
    before, after = readers(old), readers(new)
    for name, count in before.items():
        if count > 1 and new.tensors.get(name) is old.tensors[name]:
            gone = new.tensors.keys() <= old.tensors.keys()  # nothing stands in the other places
            assert gone or after[name] == count, (
                f"{name} was replaced in some of its {count} places"
            )
        elif count > 1:
            grown = new.cost().parameters - old.cost().parameters
            assert grown <= 0, f"{name} was shared and became several: {grown} parameters more"
    assert new.cost().weight_bytes == sum(
        {t.untyped_storage().data_ptr(): t.numel() * t.element_size()
         for t in new.tensors.values()}.values()
    )  # fmt: skip


def readers(program: Program) -> dict[str, int]:
    """Count the places that read each tensor."""
    counts = dict.fromkeys(program.tensors, 0)
    for node in (n for key in program.scope() for n in program.graphs[key].nodes):
        if node.op == "get_attr":
            counts[str(node.target)] += 1
    for instance in program.instances.values():
        for name in instance.weights.values():
            counts[name] += 1
    return counts


def _made_by(node: fx.Node, name: str) -> bool:
    return any(source.pass_name == name for source in node.meta.get("from_node") or ())


def _place(node: fx.Node) -> object:
    stack = node.meta.get("nn_module_stack") or {}
    return node.meta.get("local_path"), list(stack.values())[-1:]
