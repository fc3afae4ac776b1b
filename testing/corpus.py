"""Cases that once broke a property, as small JSON files that are asked again before anything else.

{"property": "is_idempotent", "pass": "canonicalize", "config": {...}, "inputs": {...}}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..driver.recipe import resolve
from .case import Case, make_subject
from .configs import InputSpec, ModelConfig, from_json, to_json

LAST: dict[str, Case] = {}
"""The case that broke a property last, which after shrinking is the smallest one."""


@contextlib.contextmanager
def remember(property_: str, case: Case) -> Iterator[None]:
    """Note a case that breaks a property, and add it to the error."""
    try:
        yield
    except Exception as error:
        LAST[property_] = case
        error.add_note(reproduction(property_, case))
        raise


def reproduction(property_: str, case: Case) -> str:
    """Return a short program that breaks the property again."""
    return "\n".join(
        (
            "from blockwright.testing import replay",
            f"replay({json.dumps(describe(property_, case))})",
        )
    )


def describe(property_: str, case: Case) -> dict[str, Any]:
    """Return a case as plain data."""
    subject = case.subject
    data: dict[str, Any] = {
        "property": property_,
        "pass": str(case.pass_),
        "config": to_json(case.config),
        "inputs": to_json(case.inputs),
    }
    if subject.exact is not None and subject.exact != subject.pass_:
        data |= {"exact": str(subject.exact), "levels": subject.levels}
    return data


def read(data: Mapping[str, Any]) -> Case:
    """Return the case that plain data stands for."""
    (pass_,) = resolve(data["pass"])
    (exact,) = resolve(data["exact"]) if "exact" in data else (None,)
    subject = make_subject(pass_, exact=exact, levels=data.get("levels"))
    config = from_json(ModelConfig, data["config"])
    return Case(subject, config, from_json(InputSpec, data["inputs"]))


def save(folder: Path, property_: str, case: Case) -> Path:
    """Write a case to a file named after the property and what is in it."""
    text = json.dumps(describe(property_, case), indent=2, sort_keys=True) + "\n"
    name = f"{property_}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name
