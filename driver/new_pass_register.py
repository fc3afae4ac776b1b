"""Add a pass to the register: edits of `passes/__init__.py` and of the front door, as text.

Each takes the text of a module and returns it with one statement written anew, in the layout ruff
gives it. Everything else stays as it is.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from ..ir.errors import OptionError

WIDTH = 100


def with_import(text: str, module: str, name: str) -> str:
    """Return the text with `from module import name`, in alphabetical order.

    Args:
        text: A module.
        module: Relative, as `.prune_ffn` or `.passes`.
        name: What to import from it.

    Raises:
        OptionError: The text has no relative import to stand beside.
    """
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    same = next((node for node in imports if _module(node) == module), None)
    if same is not None:
        names = sorted({name, *(alias.name for alias in same.names)}, key=str.lower)
        return _replaced(text, same, _bracketed(f"from {module} import ", "()", names))
    later = next((node for node in imports if _module(node) > module), None)
    if not imports:
        raise OptionError("the register imports nothing.", remedy="add the import by hand.")
    line = f"from {module} import {name}"
    if later is not None:
        return _replaced(text, later, f"{line}\n{_source(text, later)}")
    return _replaced(text, imports[-1], f"{_source(text, imports[-1])}\n{line}")


def with_pass(text: str, name: str) -> str:
    """Return the text with a class added to the tuple `PASSES`."""
    return _extended(text, "PASSES", name, str)


def with_name(text: str, name: str) -> str:
    """Return the text with a class added to `__all__`: constants, classes, functions."""
    return _extended(text, "__all__", name, lambda n: (not n.isupper(), not n[:1].isupper(), n))


def _extended(text: str, variable: str, name: str, key: Callable[[str], object]) -> str:
    """Add a name to a tuple of names or a list of strings."""
    node = _assignment(text, variable)
    items = node.value.elts  # type: ignore[union-attr]
    strings = isinstance(node.value, ast.List)
    known = {i.value if isinstance(i, ast.Constant) else ast.unparse(i) for i in items}
    names = sorted({name, *map(str, known)}, key=key)  # type: ignore[arg-type]
    shown = [f'"{n}"' for n in names] if strings else names
    source = _source(text, node)
    head = source[: source.index("[" if strings else "(", source.index("= "))]
    return _replaced(text, node, _bracketed(head, "[]" if strings else "()", shown))


def _assignment(text: str, variable: str) -> ast.Assign | ast.AnnAssign:
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            if isinstance(node.value, ast.List | ast.Tuple):
                return node
    raise OptionError(f"the register has no {variable}.", remedy="add the pass by hand.")


def _bracketed(head: str, brackets: str, items: list[str]) -> str:
    """Lay out one item a line; an import that fits stays on its line."""
    line = head + ", ".join(items)
    if head.startswith("from") and len(line) <= WIDTH:
        return line
    return "\n".join([head + brackets[0], *(f"    {item}," for item in items), brackets[1]])


def _module(node: ast.ImportFrom) -> str:
    return "." * node.level + (node.module or "")


def _source(text: str, node: ast.stmt) -> str:
    return ast.get_source_segment(text, node) or ""


def _replaced(text: str, node: ast.stmt, new: str) -> str:
    """Put a statement in the place of another; a comment behind it moves to its first line."""
    lines = text.splitlines(keepends=True)
    start, end = node.lineno - 1, node.end_lineno or node.lineno
    _, _, comment = "".join(lines[end - 1]).rstrip("\n")[node.end_col_offset :].partition("#")
    first, newline, rest = new.partition("\n")
    if comment:
        first = f"{first}  #{comment}"
    return "".join([*lines[:start], f"{first}{newline}{rest}\n", *lines[end:]])
