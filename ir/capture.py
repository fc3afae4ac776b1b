"""Turn a model into a Program through `torch.export`.

`torch.export` (non-strict) gives the graph at the level where `linear` and
`scaled_dot_product_attention` are still single ops. Capture keeps the model's own parameter names
and ties, drops nodes that compute nothing, and folds repeated blocks into classes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import random
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .blueprint import named_tensors
from .errors import CaptureError
from .exported import from_exported, functional, without_unread
from .graphs import collected_later
from .inference import evaluation, parameter_names, without_cache
from .press import Press
from .program import Program
from .repeats import find_repeats
from .stamp import check_stamped, stamp

log = logging.getLogger("blockwright.capture")
ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | Tensor | None
Model = nn.Module | ExportedProgram | str | Path


def capture(
    model: Model,
    example_inputs: ExampleInputs = None,
    *,
    dynamic_shapes: Any = None,
    fold: bool = True,
) -> Program:
    """Capture a model as a Program.

    Args:
        model: An `nn.Module`; an `ExportedProgram`; or the path of a Hugging Face directory
            (`config.json` and safetensors weights; needs `transformers`).
        example_inputs: A tuple of positional or a dict of keyword arguments, or one tensor. Taken
            from the model's `example_inputs()` or `dummy_inputs` when left out.
        dynamic_shapes: As in `torch.export.export`. Sizes not named there are fixed.
        fold: Share one graph among repeated blocks.

    Returns:
        A Program over the model's own tensors; nothing is copied and the model is not changed.

    Raises:
        CaptureError: The model does not export, or the inputs do not fit it.
    """
    if isinstance(model, str | Path):
        model = load_directory(Path(model))
    if isinstance(model, ExportedProgram):
        return without_unread(from_exported(model, fold=fold))
    args, kwargs = resolve_inputs(model, example_inputs)
    with (
        collected_later(),
        evaluation(model),
        without_cache(model, kwargs) as notes,
        torch.no_grad(),
    ):
        held = dict(named_tensors(model))
        _reject_mixed_devices(held, (args, kwargs))

        def export(fold: bool, around: AbstractContextManager[None]) -> Program:
            with around:
                exported = functional(_export(model, args, kwargs, dynamic_shapes))
            return from_exported(
                exported,
                fold=fold,
                notes=tuple(notes),
                parameters=parameter_names(model.forward),
                symbols=_dim_names(model, args, kwargs, dynamic_shapes),
                held=held,
            )

        folded = _by_blocks(model, held, export) if fold else None
        return without_unread(folded or export(fold, nullcontext()))


def _by_blocks(
    model: nn.Module, held: Mapping[str, Tensor], export: Callable[..., Program]
) -> Program | None:
    """Capture a deep model one block per kind; None when it must be captured flat."""
    groups = find_repeats(model)
    while groups:
        press = Press(groups)
        try:
            program = stamp(export(False, press.open(model)), press, held)
            check_stamped(program, press, random.Random(0))
        except Exception as error:  # flat capture decides whether the model is at fault
            log.info("captured flat: %s", error)
            if not press.unfit:
                return None
            groups = [group for n, group in enumerate(groups) if n not in press.unfit]
        else:
            return program
    return None


def resolve_inputs(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments.

    Raises:
        CaptureError: None are given and the model offers none.
    """
    if example_inputs is None:
        offered = getattr(model, "example_inputs", None) or getattr(model, "dummy_inputs", None)
        example_inputs = offered() if callable(offered) else offered
    if example_inputs is None:
        raise CaptureError(
            f"{type(model).__name__} offers no example inputs.",
            remedy="pass example_inputs=(tensor, ...) or example_inputs={'name': tensor}.",
        )
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs is a {type(example_inputs).__name__}.",
        remedy="pass a tuple of positional arguments or a dict of keyword arguments.",
    )


def load_directory(path: Path) -> nn.Module:
    """Load a Hugging Face model directory, weights memory-mapped from safetensors.

    Raises:
        CaptureError: The folder is no model, or `transformers` is missing.
    """
    if not (path / "config.json").is_file():
        raise CaptureError(
            f"{path} is not a Hugging Face model directory.",
            remedy="give a folder with config.json and *.safetensors.",
        )
    try:
        import transformers
    except ImportError as error:
        raise CaptureError(
            f"reading {path} needs the package transformers.",
            remedy='pip install "blockwright[hf]"',
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        wanted = (config.architectures or [""])[0]
        factory = getattr(transformers, wanted, transformers.AutoModel)
        model = factory.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CaptureError(f"cannot load {path}: {_first_line(error)}", where=str(path)) from error
    assert isinstance(model, nn.Module)
    return model.eval()


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    try:
        with _quiet_torch():
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not export: {_first_line(error)}",
            where=_user_line(error),
            remedy="run the model on the example inputs first; replace data-dependent Python"
            " control flow by torch.where or torch.cond; see the chained error.",
        ) from error


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch from printing a failure that is raised anyway."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.ERROR))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _reject_mixed_devices(held: Mapping[str, Tensor], inputs: Any) -> None:
    """Refuse models whose tensors sit on several devices, which one graph cannot run."""
    found = {tensor.device for tensor in held.values()}
    found |= {leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)}
    if len(found) > 1:
        raise CaptureError(
            f"tensors are on several devices: {', '.join(sorted(map(str, found)))}.",
            remedy="move the model and its example inputs to one device.",
        )


def _dim_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> dict[tuple[str, int], str]:
    """Name dynamic axes as the user named them: `Dim("batch")` gives `batch`."""
    if dynamic_shapes is None:
        return {}
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if isinstance(dynamic_shapes, Mapping):
        tree: Any = {name: dynamic_shapes.get(name) for name in bound}
    else:
        tree = dict(zip(bound, dynamic_shapes, strict=False))
    found: dict[tuple[str, int], str] = {}

    def visit(path: str, shape: Any) -> None:
        if isinstance(shape, Mapping) and all(isinstance(key, int) for key in shape):
            items: Any = shape.items()
        elif isinstance(shape, list | tuple) and not any(_nested(item) for item in shape):
            items = enumerate(shape)
        else:
            children = shape.items() if isinstance(shape, Mapping) else enumerate(shape or ())
            for key, child in children:
                visit(f"{path}.{key}", child)
            return
        for axis, dim in items:
            name = getattr(dim, "__name__", None)
            if name and isinstance(dim, torch.export.Dim):
                found[path, axis] = name

    names = list(bound)
    for name, shape in tree.items():
        root = name if name in kwargs else f"#{names.index(name)}"
        visit(root, shape)
    return found


def _nested(item: Any) -> bool:
    return isinstance(item, Mapping | list | tuple)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


def _user_line(error: BaseException) -> str | None:
    """Return the innermost source line that is neither torch's nor ours."""
    ours = (str(Path(__file__).parent), str(Path(__file__).resolve().parent), "<")
    frames: list[tuple[str, int]] = []
    cause: BaseException | None = error
    while cause is not None:
        frames += [(f.filename, f.lineno or 0) for f in traceback.extract_tb(cause.__traceback__)]
        cause = cause.__cause__ or cause.__context__
    frames += [(m[1], int(m[2])) for m in re.finditer(r'File "([^"]+)", line (\d+)', str(error))]
    users = [f for f in frames if "/torch/" not in f[0] and not f[0].startswith(ours)]
    outside = [f for f in users if "/concurrent/" not in f[0] and "contextlib" not in f[0]]
    return f"{outside[-1][0]}, line {outside[-1][1]}" if outside else None
