"""What each command shows: the data as plain dicts, and the same data as tables."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from ..backends.report import count, size
from ..ir.plain import plain
from ..ir.program import Program
from ..ir.recognize import block_classes
from .cli_view import depth_for, grouped, table, titled
from .measure import Comparison
from .options import describe, options_of
from .recipe_text import write
from .register import AnyPass
from .zoo import Preset

Data = Mapping[str, Any]
_COUNTS = {
    "parameters": count, "activated_parameters": count, "weight_bytes": size,
    "flops": count, "bytes_moved": size, "state_bytes": size,
}  # fmt: skip


def program_data(program: Program, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return what a program is made of and costs."""
    cost = program.cost(sizes or None)
    blocks = {key: program.instances_of(key) for key in program.graphs if key != "main"}
    return {
        "cost": cost.to_json(),
        "sizes": program.sizes() | dict(sizes),
        "paths": _by_path(program, cost.by_path),
        "blocks": {key: {"instances": names, "nodes": len(program.graphs[key].nodes)}
                   for key, names in blocks.items()},
        "recognized": [found.to_json() for found in block_classes(program)],
        "stacks": [stack.to_json() for stack in program.stacks()],
        "nodes": program.nodes(),
        "inputs": {
            spec.name: {"dtype": _type(spec.dtype), "shape": list(spec.shape)}
            for spec in program.signature.inputs
        },
        "ranges": {name: list(limits) for name, limits in program.signature.ranges.items()},
        "outputs": program.signature.outputs.paths() or [],
        "state": [slot.name for slot in program.state],
        "notes": list(program.notes),
    }  # fmt: skip


def program_view(data: Data) -> list[RenderableType]:
    """Show `program_data`."""
    cost, flops = data["cost"], data["cost"]["flops"] or 1
    sizes = ", ".join(f"{name}={size}" for name, size in data["sizes"].items())
    parts: list[RenderableType] = [
        table(
            f"One call{f' at {sizes}' if sizes else ''}; one multiply-add is two FLOPs",
            ("", "#"),
            [(n.replace("_", " "), text(cost[n])) for n, text in _COUNTS.items() if n in cost],
        ),
        table(
            "\nFLOPs by kind",
            ("kind", "#FLOPs", "#share"),
            [(kind, count(n), f"{n / flops:.1%}") for kind, n in cost["by_kind"].items()],
        ),
        table(
            "\nBy module",
            ("module", "#FLOPs", "#share", "#parameters", "#bytes"),
            [
                (
                    path or "(model)",
                    count(row["flops"]),
                    f"{row['flops'] / flops:.1%}",
                    count(row["parameters"]),
                    size(row["bytes"]),
                )
                for path, row in data["paths"].items()
            ],
        ),
        table(
            f"\nBlock classes ({data['nodes']} nodes in all)",
            ("class", "#instances", "#nodes", "first .. last"),
            [
                (key, len(b["instances"]), b["nodes"], _ends(b["instances"]))
                for key, b in data["blocks"].items()
            ],
        ),
        table(
            "\nBlocks by structure",
            ("structure", "#count", "what", "first .. last"),
            [
                (
                    r["structure"],
                    r["count"],
                    r["text"],
                    _ends(list(dict.fromkeys((r["first"], r["last"])))),
                )
                for r in data["recognized"]
            ],
        ),
        table(
            "\nInputs",
            ("name", "type", "shape"),
            [(n, i["dtype"], _shape(i["shape"], data)) for n, i in data["inputs"].items()],
        ),
        titled("\nOutputs", ", ".join(path or "(one tensor)" for path in data["outputs"])),
    ]
    return parts + [f"note: {note}" for note in data["notes"]]


def pass_data(kind: type[AnyPass]) -> dict[str, Any]:
    """Return what a pass says about itself."""
    sections = _sections(inspect.getdoc(kind) or "")
    return {
        "name": kind.name,
        "promise": str(kind.promise),
        "summary": sections.pop("", ""),
        "requires": sorted(kind.requires),
        "options": [
            {
                "name": option.name,
                "type": describe(option.hint),
                "required": option.required,
                "default": None if option.required else plain(option.default),
                "help": option.help,
            }
            for option in options_of(kind).values()
        ],
        "notes": {
            title: text
            for title, text in sections.items()
            if title in ("Source", "Differs", "Exact when")
        },
    }


def passes_view(data: list[dict[str, Any]]) -> list[RenderableType]:
    """Show the register."""
    rows = [(each["name"], each["promise"], each["summary"]) for each in data]
    return [table("Passes", ("name", "promise", "summary"), rows)]


def pass_view(data: Data) -> list[RenderableType]:
    """Show one pass in full."""
    rows = [
        (o["name"], o["type"], "(required)" if o["required"] else write(o["default"]), o["help"])
        for o in data["options"]
    ]
    return [
        titled(data["name"], f"({data['promise']})\n{data['summary']}\n"),
        table("Options", ("name", "type", "default", "meaning"), rows),
        *(titled(f"\n{title}", text) for title, text in data["notes"].items()),
    ]


def preset_data(preset: Preset) -> dict[str, Any]:
    """Return what a preset is."""
    parameters, sizes = preset.parameters, dict(preset.sizes)
    family = preset.architecture.__name__
    return {"name": preset.name, "family": family, "parameters": parameters, "sizes": sizes}


def presets_view(data: list[dict[str, Any]]) -> RenderableType:
    """Show the presets."""
    rows = [
        (p["name"], p["family"], f"{p['parameters']:,}",
         ", ".join(f"{name}={size}" for name, size in p["sizes"].items()))
        for p in data
    ]  # fmt: skip
    return table("Presets", ("name", "architecture", "#parameters", "one call at"), rows)


def statistics_view(figures: Mapping[str, Data]) -> RenderableType:
    """Show figures of tensors."""
    columns = ("name", "type", "shape", "#min", "#max", "#mean", "#std", "#NaN or inf")
    rows = [
        (
            name,
            f["dtype"],
            f["shape"],
            *(f"{f[k]:.4g}" if k in f else "" for k in ("min", "max", "mean", "std")),
            f.get("nonfinite", ""),
        )
        for name, f in figures.items()
    ]
    return table("Outputs", columns, rows)


def comparison_view(
    comparison: Comparison, errors: Mapping[str, float | None]
) -> list[RenderableType]:
    """Show a comparison and its verdict."""
    rows = [
        (
            name,
            f"{timing.median_ms:.3f}",
            f"{timing.speedup:.2f}x",
            "{:.2f} .. {:.2f}".format(*timing.interval),
            _error(errors[name]),
        )
        for name, timing in comparison.timings.items()
    ]
    columns = ("", "#CPU ms", "#speed-up", "#90 % interval", "#relative error")
    title = f"One call on one thread, median of {comparison.rounds} rounds"
    noise = f"noise {comparison.noise:.2f}x"
    end = f"no verdict: {comparison.objection}" if comparison.objection else f"verdict ok, {noise}"
    return [table(title, columns, rows), end]


def doctor_view(data: Data) -> list[RenderableType]:
    """Show what `doctor.examine` found."""
    machine = {
        name.replace("_", " "): ", ".join(value) or "none" if isinstance(value, list) else value
        for name, value in data["machine"].items()
    }
    backends = [(name, lacks or "ok") for name, lacks in data["backends"].items()]
    optional = [
        (name, found["version"] or f"not installed: {found['install']}")
        for name, found in data["optional"].items()
    ]
    versions = [(name, found or "missing") for name, found in data["versions"].items()]
    return [
        table("Versions", ("", ""), versions),
        table("\nMachine", ("", ""), machine.items()),
        table("\nBackends", ("", ""), backends),
        table("\nOptional packages", ("", ""), optional),
    ]


def _by_path(program: Program, flops: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Sum FLOPs, parameters and bytes by module path, numbered blocks together."""
    owners = {name: name.rpartition(".")[0] for name in program.tensors}
    counts: list[dict[str, int]] = [dict(flops), dict(program.cost().coded_by_path), {}]
    for name, tensor in program.tensors.items():
        owner = owners[name]
        if name in program.parameters:
            counts[1][owner] = counts[1].get(owner, 0) + tensor.numel()
        size = tensor.numel() * tensor.element_size()
        counts[2][owner] = counts[2].get(owner, 0) + size
    depth = depth_for(path for column in counts for path in column)
    sums = [grouped(column, depth) for column in counts]
    paths = dict.fromkeys(path for column in sums for path in column)
    return {
        path: {"flops": sums[0][path], "parameters": sums[1][path], "bytes": sums[2][path]}
        for path in paths
    }


def _sections(doc: str) -> dict[str, str]:
    """Split a docstring into its summary (under "") and its one-paragraph sections."""
    first, _, rest = doc.partition("\n")
    sections, title = {"": first}, None
    for line in rest.splitlines():
        head, colon, tail = line.partition(":")
        if colon and line[:1].isupper():
            title = head
            sections[title] = tail.strip()
        elif title and line.startswith(" "):
            sections[title] = f"{sections[title]} {line.strip()}".strip()
        else:
            title = None
    return sections


def _ends(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def _shape(shape: list[int | str], data: Data) -> str:
    """Return a shape with the range of each dynamic size: `[batch 1..64, 16]`."""
    texts = []
    for extent in shape:
        low, high = data["ranges"].get(extent, (None, None))
        texts.append(str(extent) if low is None else f"{extent} {low}..{high or ''}")
    return f"[{', '.join(texts)}]"


def _type(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _error(error: float | None) -> str:
    if error is None:
        return "other outputs"
    return "0" if error == 0 else f"{error:.1e}" if math.isfinite(error) else "not finite"
