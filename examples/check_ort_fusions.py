"""Check what onnxscript's `optimize_for_ort` makes of small random Hugging Face decoders.

    python examples/check_ort_fusions.py              every family, about five minutes
    python examples/check_ort_fusions.py mistral phi  some

Each decoder is exported by `torch.onnx.export`, batch, sequence and cache dynamic, and fused. Both
files are verified against the model. Masks and rotary tables are spelled as transformers 4 spelled
them, which is what the fusion into GroupQueryAttention looks for; with `--native` as the installed
transformers spells them.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
import transformers
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache

import blockwright as bw
from blockwright.driver.verify_foreign import ForeignVerification

WINDOW, PAST, SEQ = 4, 6, 12
SHAPES = [{"batch": batch, "seq": SEQ, "past": PAST, "total": PAST + SEQ} for batch in (1, 2)]
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
WINDOWED = {**GROUPED, "sliding_window": WINDOW}
HEADS = {"head_dim": 16}
GEMMA = {**WINDOWED, **HEADS, "query_pre_attn_scalar": 32}
GRANITE = {
    **GROUPED, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    "embedding_multiplier": 3.0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, **HEADS}),
    "mistral": ("Mistral", WINDOWED),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "granite": ("Granite", GRANITE),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", WINDOWED),
    "stablelm": ("StableLm", {}),
    "olmo2": ("Olmo2", GROUPED),
    "cohere": ("Cohere", GROUPED),
    "gptneox": ("GPTNeoX", {}),
    "starcoder2": ("Starcoder2", WINDOWED),
    "smollm3": ("SmolLM3", GROUPED),
    "falcon": ("Falcon", {"new_decoder_architecture": False}),
}


class Decoder(nn.Module):
    """A Hugging Face decoder with flat inputs and outputs, its cache among them."""

    def __init__(self, model: Any, native: bool) -> None:
        super().__init__()
        self.model, self.native = model, native

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Sequence[Tensor]],
    ) -> tuple[Tensor, ...]:
        mask = attention_mask if self.native else self._masks(input_ids, attention_mask, past)
        result = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=DynamicCache([tuple(layer) for layer in past]),
            use_cache=True,
        )
        layers = result.past_key_values.layers
        return (result.logits, *(t for layer in layers for t in (layer.keys, layer.values)))

    def _masks(self, ids: Tensor, padding: Tensor, past: Sequence[Sequence[Tensor]]) -> Any:
        window = getattr(self.model.config, "sliding_window", None)
        made = {
            "full_attention": _mask(ids, padding, past, None),
            "sliding_attention": _mask(ids, padding, past, window),
        }
        source = inspect.getsource(inspect.getmodule(self.model))  # type: ignore[arg-type]
        by_layer = "attention_mask, dict)" in source
        return made if by_layer else made["sliding_attention" if window else "full_attention"]


def _mask(
    ids: Tensor, padding: Tensor, past: Sequence[Sequence[Tensor]], window: int | None
) -> Tensor:
    """Return what is added to the scores, computed as by transformers 4: [batch, 1, seq, total]."""
    before, seq = past[0][0].shape[2], ids.shape[1]
    total, lowest = before + seq, torch.finfo(torch.float32).min
    query = torch.arange(before, total).reshape(-1, 1)
    hidden = torch.arange(total) > query
    mask = torch.full((seq, total), lowest)
    if window:
        hidden = hidden | (torch.arange(total) <= query - window)
    else:
        mask = torch.triu(mask, diagonal=1)
    mask = (mask * hidden)[None, None].expand(ids.shape[0], 1, -1, -1)
    return mask.masked_fill(mask + padding[:, None, None, :].to(mask.dtype) == 0, lowest)


def _rotate(self: Any, x: Tensor, position_ids: Tensor, layer_type: str = "") -> tuple[Any, Any]:
    """Return cosines and sines, computed as by transformers 4."""
    prefix = f"{layer_type}_" if layer_type else ""
    inverse, scale = getattr(self, f"{prefix}inv_freq"), getattr(self, f"{prefix}attention_scaling")
    columns = inverse[None, :, None].float().expand(position_ids.shape[0], -1, 1)
    angles = (columns @ position_ids[:, None, :].float()).transpose(1, 2)
    angles = torch.cat((angles, angles), dim=-1)
    found = angles.cos(), angles.sin()
    return found if scale == 1 else (found[0] * scale, found[1] * scale)


@dataclass(frozen=True)
class Checked:
    """A family before and after the fusions."""

    family: str
    fusions: dict[str, int]
    before: ForeignVerification
    after: ForeignVerification


def decoder(family: str, native: bool) -> Decoder:
    """Return a small random decoder."""
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    for part in model.modules() if not native else ():
        rotary = type(part).__name__.endswith("RotaryEmbedding")
        if rotary and "torch.cat((freqs, freqs)" in inspect.getsource(type(part)):
            part.forward = types.MethodType(_rotate, part)
    return Decoder(model, native).eval()


def example(model: Decoder) -> dict[str, Any]:
    """Return a call with a filled cache, at batch 2."""
    config, generator = model.model.config, torch.Generator().manual_seed(1)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 1 if config.model_type == "falcon" else getattr(config, "num_key_value_heads", heads)
    shape = (2, kept, PAST, width)
    return {
        "input_ids": torch.randint(1, 64, (2, SEQ), generator=generator),
        "attention_mask": torch.ones(2, PAST + SEQ, dtype=torch.long),
        "position_ids": torch.arange(PAST, PAST + SEQ).expand(2, SEQ).contiguous(),
        "past": [
            [torch.randn(shape, generator=generator) for _ in range(2)]
            for _ in range(config.num_hidden_layers)
        ],
    }


def export(model: Decoder, path: Path) -> None:
    """Write an ONNX file in which batch, sequence and cache are dynamic."""
    call = example(model)
    sizes: dict[str, Any] = {
        "input_ids": {0: "batch", 1: "seq"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "seq"},
        "past": [[{0: "batch", 2: "past"}] * 2 for _ in call["past"]],
    }
    program = torch.onnx.export(
        model, (), kwargs=call, dynamo=True, dynamic_shapes=sizes, verbose=False, opset_version=18
    )
    assert program is not None
    program.save(path)


def check(family: str, folder: Path, *, native: bool = False) -> Checked:
    """Export, fuse and verify one family."""
    model = decoder(family, native)
    plain, fused = folder / f"{family}.onnx", folder / f"{family}_fused.onnx"
    export(model, plain)
    graph, fusions = optimize_for_ort(onnx_ir.load(plain))
    onnx_ir.save(graph, fused)
    before, after = (
        bw.verify(model, path, example(model), sizes=SHAPES) for path in (plain, fused)
    )
    return Checked(family, {name: n for name, n in fusions.items() if n}, before, after)


def row(checked: Checked) -> Iterator[str]:
    """Yield the cells of a family."""
    yield checked.family
    for finding in (checked.before, checked.after):
        for shape in finding.shapes:
            errors = [error.new or 0.0 for error in shape.outputs.values()]
            yield "does not run" if shape.failure else f"{max(errors):.1e}"
    yield "\n".join(map(str, checked.after.suspects))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--native", action="store_true", help="as transformers writes it now")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table = Table("family", "exported, batch 1", "batch 2", "fused, batch 1", "batch 2", "found")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families or FAMILIES:
            try:
                checked = check(family, Path(folder), native=options.native)
                table.add_row(*row(checked))
                console.print(family, checked.fusions, list(row(checked))[1:])
            except torch.onnx.OnnxExporterError as error:
                table.add_row(family, "not exported", "", "", "", str(error.__cause__)[:80])
    console.print(table)


if __name__ == "__main__":
    main()
