"""Write a decoder in experts as a Hugging Face directory that `transformers` loads and runs.

    dense    LlamaForCausalLM and its like: grouped heads, rotary positions, gated networks
    written  GraniteMoeSharedForCausalLM: the same attention, a shared expert beside routed ones,
             gates that are the softmax of the chosen logits

The directory is only left there if the model read from it gives the program's logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import LoweringError
from ..ir.program import Program
from ..ir.recognize import Experts
from ..ir.run import run

TOLERANCE = 1e-4  # of the largest logit
_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "attention_bias",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def export_huggingface(
    program: Program, config: Any, directory: str | Path, example_inputs: Sequence[Tensor]
) -> Path:
    """Write a program made of a LLaMA-like Hugging Face model by a pass that makes experts.

    Args:
        program: The captured model, all of its networks in experts.
        config: Configuration of the dense model.
        directory: Where to; it must not exist yet.
        example_inputs: Token ids [batch, seq] as the model was captured for, to compare logits on.

    Returns:
        The directory.

    Raises:
        LoweringError: The layout does not fit, the logits differ, or `transformers` is missing.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.models.granitemoeshared import modeling_granitemoeshared as granite
    except ImportError as error:
        raise LoweringError(
            "writing a Hugging Face directory needs the package `transformers`.",
            remedy='install it: pip install "blockwright[hf]".',
        ) from error
    path = Path(directory)
    if path.exists():
        raise LoweringError("the directory is there already.", where=str(path),
                            remedy="give another, or remove it.")  # fmt: skip
    experts = program.regions(Experts)
    model: Any = granite.GraniteMoeSharedForCausalLM(_config(granite, config, experts))
    model = model.to(config.dtype or torch.float32)
    _load(model, _weights(program, experts))
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        model.save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            found = read(*example_inputs).logits
        _require_same(found, run(program, list(example_inputs))[0])
        Path(folder).rename(path)
        Path(folder).mkdir()  # for the context to remove
    return path


def _config(granite: Any, dense: Any, experts: Sequence[Experts]) -> Any:
    """Return the configuration of the model in experts."""
    shapes = {repr(region.constants()) for region in experts}
    first = experts[0] if experts else None
    same = len(shapes) == 1 and len(experts) == dense.num_hidden_layers
    if first is None or not same or first.active is None:
        raise _misfit(f"{len(experts)} of {dense.num_hidden_layers} networks are in experts, of"
                      f" {len(shapes)} kinds")  # fmt: skip
    if not (first.is_gated and first.activation == "silu"):
        raise _misfit("its experts are not gated by silu")
    kept = {name: getattr(dense, name) for name in _KEPT if getattr(dense, name, None) is not None}
    head_dim = kept.get("head_dim") or dense.hidden_size // dense.num_attention_heads
    return granite.GraniteMoeSharedConfig(
        **kept,
        intermediate_size=first.ffn_dim,
        shared_intermediate_size=first.shared_ffn_dim,
        num_local_experts=first.experts,
        num_experts_per_tok=first.active,
        attention_multiplier=head_dim**-0.5,
    )


def _weights(program: Program, experts: Sequence[Experts]) -> dict[str, Tensor]:
    """Return the program's weights under the names of the written model."""
    known = {**program.tensors, **{a: program.tensors[n] for a, n in program.aliases.items()}}
    for number, region in enumerate(experts):
        layer, own = f"model.layers.{number}", region.weights()
        gate, up, down = region.shared_gate, region.shared_up, region.shared_down
        layers = (*region.layers, *filter(None, (region.router,)))
        dense = region.is_dense and all(layer.is_dense for layer in layers)
        biased = region.bias is not None or any("bias" in name for name in own)
        if not (region.router and gate and up and down and dense) or biased:
            raise _misfit(f"{region.label} has biases, packed weights or no shared expert")
        known |= {
            f"{layer}.block_sparse_moe.router.weight": region.router.weight,
            f"{layer}.block_sparse_moe.experts.gate_up_proj": torch.cat(
                (own["gate"], own["up"]), 1
            ),
            f"{layer}.block_sparse_moe.experts.down_proj": own["down"],
            f"{layer}.shared_mlp.input_linear.weight": torch.cat((gate.weight, up.weight)),
            f"{layer}.shared_mlp.output_linear.weight": down.weight,
        }
    return known


def _load(model: Any, known: Mapping[str, Tensor]) -> None:
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in known]
    if missing:
        raise _misfit(f"it has no weight {missing[0]!r}")
    model.load_state_dict({name: known[name].contiguous() for name in wanted})


def _require_same(found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise _misfit(f"its logits are {list(expected.shape)}, theirs {list(found.shape)}")
    apart = (found - expected).abs().max() / expected.abs().max()
    if not apart <= TOLERANCE:
        raise _misfit(f"its logits differ from the program's by {apart:.1e} of the largest")


def _misfit(reason: str) -> LoweringError:
    return LoweringError(
        f"the program does not fit GraniteMoeShared: {reason}.",
        remedy="convert all networks of a LLaMA-like model with a shared expert, score=softmax,"
        " renormalise=true, and leave other weights as they are.",
    )
