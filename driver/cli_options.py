"""Arguments and options that several commands share.

Help texts are rich markup: a bracket that means itself takes a backslash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory; file.py:factory or package.module:factory, something that"
        " is or returns a torch module; or a saved engine.",
    ),
]
ArtefactArgument = Annotated[Path, typer.Argument(metavar="ARTEFACT", help="A saved engine.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=TYPE[SIZES]",
        help="An example input: ids=int64\\[2,16]. A named size is dynamic:"
        " ids=int64\\[batch=2,seq=16]. Repeatable. Default: what the model offers.",
    ),
]
DynamicSizes = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        metavar="TEXT",
        help="Names axes of inputs: ids:0=batch,1=seq (*:0=batch for all). Limits named sizes:"
        " batch=1..64,seq=2... Repeatable.",
    ),
]
Vocab = Annotated[
    int | None, typer.Option(min=1, help="Random integers stay below. Default: asks the model.")
]
Seed = Annotated[int, typer.Option(help="Seed of random inputs.")]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--pass", metavar="TEXT", help='Passes, in order: "quantize-weights{bits=4}". Repeatable.'
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="TOML recipe; runs before --pass.")
]
Backend = Annotated[str, typer.Option(help="Where it runs; `blockwright doctor` lists them.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")]
Sizes = Annotated[
    str | None, typer.Option("--size", metavar="TEXT", help="Dynamic sizes: batch=8,seq=128.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load compiled code from the artefact, not only data.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
