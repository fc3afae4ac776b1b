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
        " is or returns a torch module; a saved engine; or a preset, see `blockwright models`.",
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
Order = Annotated[
    str,
    typer.Option(
        metavar="given|auto", help="auto: solve the order of passes from what they need and end."
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="Carry out this plan: a plan.json, perhaps edited, or a saved engine."
    ),
]
IrBefore = Annotated[
    list[str] | None,
    typer.Option("--print-ir-before", metavar="PASS", help="Print the graph before it runs."),
]
IrBeforeAll = Annotated[bool, typer.Option("--print-ir-before-all", help="... before every pass.")]
IrAfter = Annotated[
    list[str] | None,
    typer.Option("--print-ir-after", metavar="PASS", help="Print the graph after it ran."),
]
IrAfterAll = Annotated[bool, typer.Option("--print-ir-after-all", help="... after every pass.")]
IrAfterChange = Annotated[
    bool, typer.Option("--print-ir-after-change", help="... only after passes that change it.")
]
IrAfterFailure = Annotated[
    bool, typer.Option("--print-ir-after-failure", help="Print the graph a failing pass was given.")
]
Timing = Annotated[bool, typer.Option("--timing", help="Show the time of every pass by stage.")]
Statistics = Annotated[
    bool, typer.Option("--pass-statistics", help="Show the counters of every pass.")
]
CrashReproducer = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="If a pass fails, write a replayable case there."),
]
CheckpointFolder = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", metavar="DIR", help="Remember passes done; continue after them if killed."
    ),
]
MeasureSpeed = Annotated[
    bool, typer.Option("--measure-speed", help="Take back what makes its block slower.")
]
NoRecover = Annotated[
    bool, typer.Option("--no-recover", help="Do not train back what passes have changed.")
]
RecoverSteps = Annotated[
    int | None,
    typer.Option(
        "--recover-steps", min=1, help="Steps of each training. Default: as the pass says."
    ),
]
RecoverWeights = Annotated[
    Path | None,
    typer.Option(
        "--recover-weights",
        metavar="PATH",
        help="Take trained weights from an engine or a safetensors file instead of training.",
    ),
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
