"""Continue a killed compile after the last certified pass.

    checkpoint.json        what is being compiled: hashes of model, inputs, settings; versions
    steps/KEY.json         a pass: program, plan, receipt, certificate; written last
    blobs/SHA256           a tensor that is none of the model's own

KEY hashes everything the result of a pass depends on: the model, the inputs, and all passes so far
with options, plans and source. Every file appears under its name complete or not at all, so
whatever kills a compile leaves only steps that can be trusted, and they are hash-checked anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ..backends import disk, plainjson, weights
from ..backends.plainjson import dumps, loads
from ..ir.errors import ArtefactError, BlockwrightError, OptionError
from ..ir.program import Program
from ..ir.serialize import from_json, to_json
from ..passes.base import Pass, Plan
from .casefile import data_hash, graph_hash, tensor_hash, versions
from .recipe import to_text
from .steps import Step

AnyPass = Pass[Any, Any]
HEAD, STEPS, BLOBS = "checkpoint.json", "steps", "blobs"
_HASH = re.compile(r"[0-9a-f]{64}")


class Checkpoint:
    """A directory that remembers passes already done; a context manager, as it is locked.

    Attributes:
        folder: The directory.
        notes: What was continued, or why nothing was, in words.
    """

    def __init__(
        self,
        folder: Path,
        program: Program,
        passes: Sequence[AnyPass],
        plans: Sequence[Plan[Any] | None],
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self.notes = folder, list[str]()
        self._passes = passes
        self._written: dict[int, tuple[Tensor, str]] = {}
        _require_weights(program)
        self._own = {id(tensor): name for name, tensor in program.tensors.items()}
        hashes = [tensor_hash(tensor) for tensor in program.tensors.values()]
        self._about = {
            "model": data_hash([graph_hash(program), *hashes]),
            "versions": versions(),
            **settings,
        }
        self._start = program
        self._keys = _keys(self._about, passes, plans)
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            for name in (STEPS, BLOBS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(disk.locked(self.folder))
            self._forget_others()
        except OSError as error:
            self._lock.close()
            raise disk.cannot_write(self.folder, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            if kind is None:
                self._sweep(set(self._keys))
        self._lock.close()

    def restore(self) -> tuple[Program, list[Step]]:
        """Return the program after the last pass that is known, and the steps up to it."""
        files: list[tuple[Path, dict[str, Any]]] = []
        steps: list[Step] = []
        for key, pass_ in zip(self._keys, self._passes, strict=True):
            path = self.folder / STEPS / f"{key}.json"
            if not path.exists():
                break
            with self._distrust(path, pass_):
                data = _checked(path)
                steps.append(Step.from_json(json.loads(data["step"]), pass_))
                files.append((path, data))
            if not path.exists():
                break
        while files:
            path, data = files.pop()
            with self._distrust(path, steps[-1].pass_):
                program = from_json(data["graph"], self._tensors(data["tensors"]))
                done = ", ".join(step.pass_.name for step in steps)
                self.notes.append(f"continued after {done}")
                return program, steps
            steps.pop()
        return self._start, []

    def save(self, index: int, program: Program, step: Step) -> None:
        """Keep the result of a pass.

        Raises:
            ArtefactError: The disk refuses, or the program has no form as data.
        """
        data = {
            "graph": to_json(program),
            "tensors": {name: self._keep(tensor) for name, tensor in program.tensors.items()},
            "step": json.dumps(step.to_json()),  # as text: in the order it has
        }
        content = dumps({**data, "digest": data_hash(data)})
        disk.replace_file(self.folder / STEPS / f"{self._keys[index]}.json", [content])

    @contextlib.contextmanager
    def _distrust(self, path: Path, pass_: AnyPass) -> Iterator[None]:
        """Forget a step whose files are not as they were saved."""
        try:
            yield
        except (BlockwrightError, OSError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            self.notes.append(f"{pass_.name} is run again, its files are damaged: {reason}")
            path.unlink(missing_ok=True)

    def _keep(self, tensor: Tensor) -> list[str]:
        """Write a tensor that is new, and say where it is.

        A tensor of the model's is known by its name and not by its bytes: two that are equal
        stay two.
        """
        if id(tensor) in self._own:
            return ["model", self._own[id(tensor)]]
        if id(tensor) not in self._written:
            sha256 = tensor_hash(tensor)
            path = self.folder / BLOBS / sha256
            if not path.exists():
                disk.replace_file(path, weights.chunks({"tensor": tensor}))
            self._written[id(tensor)] = tensor, sha256
        return ["blob", self._written[id(tensor)][1]]

    def _tensors(self, places: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Return tensors by name; damaged ones are deleted, all of them, before this fails."""
        tensors: dict[str, Tensor] = {}
        damaged: list[Exception] = []
        for name, (kind, place) in places.items():
            try:
                own = kind == "model"
                tensors[name] = self._start.tensors[place] if own else self._blob(place)
            except (BlockwrightError, OSError, ValueError) as error:
                damaged.append(error)
        if damaged:
            raise damaged[0]
        return tensors

    def _blob(self, sha256: str) -> Tensor:
        path = self.folder / BLOBS / str(sha256)
        digest = hashlib.sha256()
        for chunk in disk.read_chunks(path):
            digest.update(chunk)
        if digest.hexdigest() != sha256:
            path.unlink()
            raise ValueError(f"the tensor {sha256[:16]} is not as it was saved")
        tensor = weights.read(path)["tensor"]
        self._written[id(tensor)] = tensor, sha256
        return tensor

    def _forget_others(self) -> None:
        """Start anew, and say why, when the directory is of another compile."""
        path = self.folder / HEAD
        try:
            old = loads(path.read_bytes(), HEAD) if path.exists() else None
        except ArtefactError:
            old = {}
        recipe = to_text(self._passes)
        if old is not None:
            before = {key: value for key, value in old.items() if key != "recipe"}
            differs = [name for name in {**before, **self._about}
                       if before.get(name) != self._about.get(name)]  # fmt: skip
            if differs:
                self.notes.append(f"started anew, the checkpoint has other {', '.join(differs)}")
                self._sweep(set())
            elif old.get("recipe") != recipe:
                self.notes.append("the recipe has changed; what it shares with the old one is kept")
        disk.replace_file(path, [dumps({**self._about, "recipe": recipe})])

    def _sweep(self, keys: set[str]) -> None:
        """Delete steps of other keys, tensors that no step needs, and leftovers of killed saves."""
        needed: set[str] = set()
        for path in _files(self.folder / STEPS):
            if path.stem in keys:
                places = plainjson.read(path)["tensors"].values()
                needed.update(place for _, place in places)
            elif _HASH.fullmatch(path.stem) or path.name.startswith(disk.TEMPORARY):
                path.unlink()
        for path in _files(self.folder):
            if path.name.startswith(disk.TEMPORARY):
                path.unlink()
        for path in _files(self.folder / BLOBS):
            leftover = path.name.startswith(disk.TEMPORARY)
            if leftover or (_HASH.fullmatch(path.name) and path.name not in needed):
                path.unlink()


def _keys(
    about: Mapping[str, Any], passes: Sequence[AnyPass], plans: Sequence[Plan[Any] | None]
) -> list[str]:
    """Return a key per pass; each hashes all that comes before."""
    keys: list[str] = []
    key = data_hash(about)
    for pass_, plan in zip(passes, plans, strict=True):
        given = plan.to_json() if plan else None
        key = data_hash([key, to_text([pass_]), given, _source(type(pass_))])
        keys.append(key)
    return keys


def _checked(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = plainjson.read(path)
    if data.pop("digest") != data_hash(data):
        raise ValueError(f"{path.name} is not as it was saved")
    return data


def _source(kind: type) -> str:
    """Hash the file a pass is written in: who edits a pass wants it run."""
    path = getattr(importlib.import_module(kind.__module__), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _require_weights(program: Program) -> None:
    if any(tensor.is_meta for tensor in program.tensors.values()):
        raise OptionError(
            "a checkpoint needs weights, and the program's are on the meta device.",
            remedy="leave checkpoint out; planning without weights is quick.",
        )


def _files(folder: Path) -> Iterator[Path]:
    return iter([path for path in folder.iterdir() if path.is_file()])
