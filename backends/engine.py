"""Something to call: a program, lowered.

An engine is called like the model. If the program keeps state from call to call (a cache, a
counter), a session holds it: sessions share weights and nothing else.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ..ir.errors import ArtefactError, OptionError
from ..ir.program import Program, StateSlot
from .base import Lowered
from .disk import replace_file
from .report import Report
from .weights import chunks, read


class Engine:
    """A lowered program. Calls are thread-safe.

    Attributes:
        program: What was lowered.
        lowered: What runs.
        backend: Name of the backend.
        record: What was done and measured on the way here, as plain JSON; see `report`.
        options: Options the backend was given.
    """

    training = False

    def __init__(
        self,
        program: Program,
        lowered: Lowered,
        backend_name: str,
        record: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.program, self.lowered, self.backend = program, lowered, backend_name
        self.record, self.options = dict(record), dict(options or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            OptionError: The arguments do not fit, or the program keeps state.
        """
        if self.program.state:
            names = ", ".join(slot.name for slot in self.program.state)
            raise OptionError(
                f"this model keeps state from call to call ({names}).",
                remedy="call session = engine.session() once, then session(...).",
            )
        result, _ = self._run(args, kwargs, {})
        return result

    def session(self) -> Session:
        """Return a caller of its own: its state starts afresh and is shared with nobody."""
        return Session(self)

    @property
    def report(self) -> Report:
        """What the compiler did: prints as text, `html()` gives a page."""
        return Report(self.record)

    def save(self, path: str | Path) -> None:
        """Save as an artefact: a folder, or one file if the path ends in `.zip`.

        Raises:
            ArtefactError: It cannot be written; what was at `path` is unchanged.
        """
        from .artefact import save

        save(self, path)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by all their names, tied ones under each."""
        tensors = self.program.tensors
        return {**tensors, **{alias: tensors[name] for alias, name in self.program.aliases.items()}}

    def eval(self) -> Self:
        """Return the engine, which is always in evaluation mode."""
        return self

    def __repr__(self) -> str:
        names = ", ".join(argument.name for argument in self.program.signature.arguments)
        return f"Engine({names}) on {self.backend}"

    def _run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return the result of a call and the next state."""
        program = self.program
        inputs = program.arranged(program.signature.bind(args, kwargs), state)
        outputs = self.lowered.run(inputs)
        positions = {slot.output: slot.name for slot in program.state}
        results = [value for i, value in enumerate(outputs) if i not in positions]
        following = {name: outputs[i] for i, name in positions.items()}
        return program.signature.pack(results), _owned(following, [*inputs, *results])


class Session:
    """A caller of an engine, with state of its own. Calls wait for each other.

    Attributes:
        engine: What runs.
    """

    training = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._state: dict[str, Tensor] = {}
        self.reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and keep its state for the next call. A failed call changes no state.

        Raises:
            OptionError: The arguments do not fit, or the model says that its state does not.
        """
        with self._lock:
            result, following = self.engine._run(args, kwargs, self._state)
            _listen(self.engine.program.state, following)
            self._state = following
        return result

    def reset(self) -> None:
        """Start afresh: the next call gives what a first call gives."""
        with self._lock:
            self._state = self.engine.program.initial_state()

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state by name."""
        with self._lock:
            return {name: tensor.clone() for name, tensor in self._state.items()}

    def save(self, path: str | Path) -> None:
        """Save the state as a safetensors file.

        Raises:
            ArtefactError: It cannot be written; what was at `path` is unchanged.
        """
        replace_file(Path(path), chunks(self.state_dict()))

    def load(self, path: str | Path) -> Self:
        """Continue from a saved state; return the session.

        Raises:
            ArtefactError: The file is damaged or holds the state of another model.
        """
        found = read(Path(path))
        with self._lock:
            if _types(found) != _types(self._state):
                names = ", ".join(self._state) or "nothing"
                raise ArtefactError(
                    f"{path} holds the state of another model; this one keeps {names}.",
                    where=str(path),
                    remedy="load a state that a session of this model saved.",
                )
            self._state = {name: found[name].to(old.device) for name, old in self._state.items()}
        return self

    def eval(self) -> Self:
        """Return the session, which is always in evaluation mode."""
        return self


def _listen(slots: Iterable[StateSlot], state: Mapping[str, Tensor]) -> None:
    """Say what the next state tells of: warn, or raise before it is kept."""
    for slot in slots:
        told = state[slot.name].item() if slot.faults or slot.warning else 0
        if told and slot.faults:
            raise OptionError(
                slot.faults[min(int(told), len(slot.faults)) - 1],
                remedy="call session.reset() to start afresh; the state is as before this call.",
            )
        if told:
            warnings.warn(f"{slot.warning}: {told:.3g}", stacklevel=3)


def _owned(state: dict[str, Tensor], others: Iterable[Tensor]) -> dict[str, Tensor]:
    """Copy state that shares memory with what a caller holds and may write into."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in others}
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        for name, tensor in state.items()
    }


def _types(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
