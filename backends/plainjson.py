"""JSON with one reading and one spelling: what artefacts are written in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ..ir.errors import ArtefactError

LARGEST = 64 * 2**20


def dumps(data: Any) -> bytes:
    """Return the one spelling of `data`: keys sorted, ASCII, no NaN, a newline at the end.

    Raises:
        ArtefactError: It holds something that JSON has no word for.
    """
    try:
        text = json.dumps(data, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtefactError(f"cannot be written as JSON: {error}.") from error
    return f"{text}\n".encode("ascii")


def read(path: Path) -> Any:
    """Read a JSON file; see `loads`."""
    return loads(path.read_bytes(), path.name)


def loads(content: bytes, where: str) -> Any:
    """Read JSON from a file that may be damaged or made to harm.

    Args:
        content: The file.
        where: Its name, for the error.

    Raises:
        ArtefactError: It is no JSON, too large or too deep, repeats a key, or holds NaN, infinity
            or a number outside the range of a double.
    """
    try:
        if len(content) > LARGEST:
            raise ValueError(f"{len(content)} bytes are more than {LARGEST}")
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_float,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ArtefactError(
            f"{where} is not valid JSON: {reason}.",
            where=where,
            remedy="the file is damaged; save or download the artefact again.",
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")
