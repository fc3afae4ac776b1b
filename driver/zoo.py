"""Published models by name, at their published sizes.

A preset is a configuration of an architecture in `models/` and the sizes of one call of it, the
setting in which its cost is published. Without weights it takes no memory, so counting parameters
and FLOPs of the largest takes seconds. There are no trained weights here; drawn ones are random.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.report import count
from ..ir.errors import OptionError
from ..models import (
    algoformer,
    bert,
    dit,
    dit3d,
    flux,
    gpt,
    lego,
    llama,
    memoryformer,
    pixart,
    pt_dit,
    qwen_image,
    sd3,
    styleswin,
    swin,
    vit,
    wan,
    widenet,
)

DRAWN_LIMIT = 1_000_000_000  # most parameters that are drawn; 4 GB in fp32
DRAWN_STD = 0.02  # of every matrix, as BERT and GPT-2 start


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        name: As on the command line.
        architecture: Class in `models/`.
        config: Its sizes.
        sizes: Keyword arguments of the model's `example_inputs` in the published setting.
    """

    name: str
    architecture: Any
    config: Any
    sizes: Mapping[str, int] = field(default_factory=dict)

    def sketch(self) -> nn.Module:
        """Return the model on the meta device: shapes without weights."""
        with torch.device("meta"):
            model: nn.Module = self.architecture(self.config)
        return model.eval()

    def draw(self, seed: int = 0) -> nn.Module:
        """Return the model with random weights; no matrix is zero.

        Raises:
            OptionError: It has more than `DRAWN_LIMIT` parameters.
        """
        if self.parameters > DRAWN_LIMIT:
            raise OptionError(
                f"{self.name} has {count(self.parameters)} parameters; random weights are drawn for"
                f" {count(DRAWN_LIMIT)} at most.",
                remedy="inspect it, give a smaller preset, or a checkpoint as directory.",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = self.architecture(self.config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=DRAWN_STD)
        return model.eval()

    def example_inputs(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Return inputs of the published sizes."""
        offered: Any = model.example_inputs
        inputs: tuple[Tensor, ...] = offered(**self.sizes)
        return inputs

    @cached_property
    def parameters(self) -> int:
        """Count parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.sketch().parameters())


def _one(**sizes: int) -> dict[str, int]:
    return {"batch": 1, **sizes}


_SQUARE = _one(rows=64, columns=64, words=512)  # 1024 x 1024 pixels
_VIDEO = _one(frames=21, height=60, width=104, words=512)  # latent of 81 frames, 480 x 832 pixels

PRESETS = (
    Preset("gpt2", gpt.GPT, gpt.GPT2_SMALL, _one(seq=1024)),
    Preset("gpt2-medium", gpt.GPT, gpt.GPT2_MEDIUM, _one(seq=1024)),
    Preset("gpt2-large", gpt.GPT, gpt.GPT2_LARGE, _one(seq=1024)),
    Preset("gpt2-xl", gpt.GPT, gpt.GPT2_XL, _one(seq=1024)),
    Preset("llama-2-7b", llama.Llama, llama.LLAMA_2_7B, _one(seq=4096)),
    Preset("llama-3.1-8b", llama.Llama, llama.LLAMA_3_1_8B, _one(seq=4096)),
    Preset("qwen3-0.6b", llama.Llama, llama.QWEN3_0_6B, _one(seq=4096)),
    Preset("qwen3-8b", llama.Llama, llama.QWEN3_8B, _one(seq=4096)),
    Preset("bert-base", bert.Bert, bert.BERT_BASE, _one(seq=512)),
    Preset("bert-large", bert.Bert, bert.BERT_LARGE, _one(seq=512)),
    Preset("minilm-l6", bert.Bert, bert.MINILM_L6, _one(seq=128)),
    Preset("vit-ti/16", vit.ViT, vit.VIT_TI16, _one()),
    Preset("vit-s/16", vit.ViT, vit.DEIT_S16, _one()),
    Preset("vit-b/16", vit.ViT, vit.VIT_B16, _one()),
    Preset("vit-l/16", vit.ViT, vit.VIT_L16, _one()),
    Preset("deit-s/16", vit.ViT, vit.DEIT_S16, _one()),
    Preset("swin-t", swin.Swin, swin.SWIN_T, _one()),
    Preset("swin-s", swin.Swin, swin.SWIN_S, _one()),
    Preset("swin-b", swin.Swin, swin.SWIN_B, _one()),
    Preset("dit-s/2", dit.DiT, dit.DIT_S2, _one()),
    Preset("dit-b/2", dit.DiT, dit.DIT_B2, _one()),
    Preset("dit-l/2", dit.DiT, dit.DIT_L2, _one()),
    Preset("dit-xl/2", dit.DiT, dit.DIT_XL2, _one()),
    Preset("pixart-alpha", pixart.PixArt, pixart.PIXART_ALPHA_1024, _one(words=120)),
    Preset("pixart-alpha-512", pixart.PixArt, pixart.PIXART_ALPHA_512, _one(words=120)),
    Preset("pt-dit-b", pt_dit.PTDiT, pt_dit.PT_DIT_B, _one(words=120)),
    Preset("pt-dit-l", pt_dit.PTDiT, pt_dit.PT_DIT_L, _one(words=120)),
    Preset("pt-dit-xl", pt_dit.PTDiT, pt_dit.PT_DIT_XL, _one(words=120)),
    Preset("pt-dit-h", pt_dit.PTDiT, pt_dit.PT_DIT_H, _one(words=120)),
    Preset("sd3-medium", sd3.SD3, sd3.SD3_MEDIUM, _one(words=154)),
    Preset("flux.1-dev", flux.Flux, flux.FLUX_1_DEV, _SQUARE),
    Preset("flux.1-schnell", flux.Flux, flux.FLUX_1_SCHNELL, _SQUARE | {"words": 256}),
    Preset("qwen-image", qwen_image.QwenImage, qwen_image.QWEN_IMAGE,
           _one(height=128, width=128, words=512)),
    Preset("wan2.1-1.3b", wan.Wan, wan.WAN_2_1_1_3B, _VIDEO),
    Preset("wan2.1-14b", wan.Wan, wan.WAN_2_1_14B, _VIDEO),
    Preset("widenet-b", widenet.WideViT, widenet.WIDENET_B, _one()),
    Preset("widenet-l", widenet.WideViT, widenet.WIDENET_L, _one()),
    Preset("widenet-h", widenet.WideViT, widenet.WIDENET_H, _one()),
    Preset("algoformer", algoformer.AlgoFormer, algoformer.ALGOFORMER, _one(seq=82)),
    Preset("memoryformer-tiny", memoryformer.MemoryFormer, memoryformer.MEMORYFORMER_TINY,
           _one(seq=2048)),
    Preset("memoryformer-small", memoryformer.MemoryFormer, memoryformer.MEMORYFORMER_SMALL,
           _one(seq=2048)),
    Preset("memoryformer-base", memoryformer.MemoryFormer, memoryformer.MEMORYFORMER_BASE,
           _one(seq=2048)),
    Preset("lego-s-pg-64", lego.Lego, lego.S_PG_64, _one()),
    Preset("lego-l-pg-64", lego.Lego, lego.L_PG_64, _one()),
    Preset("lego-l-pr-64", lego.Lego, lego.L_PR_64, _one()),
    Preset("lego-xl-pg-32", lego.Lego, lego.XL_PG_32, _one()),
    Preset("lego-xl-pr-32", lego.Lego, lego.XL_PR_32, _one()),
    Preset("lego-xl-u-32", lego.Lego, lego.XL_U_32, _one()),
    Preset("lego-xl-pg-64", lego.Lego, lego.XL_PG_64, _one()),
    Preset("dit3d-s/4", dit3d.DiT3D, dit3d.DIT3D_S4, _one(points=2048)),
    Preset("dit3d-b/4", dit3d.DiT3D, dit3d.DIT3D_B4, _one(points=2048)),
    Preset("dit3d-l/4", dit3d.DiT3D, dit3d.DIT3D_L4, _one(points=2048)),
    Preset("dit3d-xl/4", dit3d.DiT3D, dit3d.DIT3D_XL4, _one(points=2048)),
    Preset("styleswin-256", styleswin.StyleSwin, styleswin.STYLESWIN_256, _one()),
    Preset("styleswin-512", styleswin.StyleSwin, styleswin.STYLESWIN_512, _one()),
    Preset("styleswin-1024", styleswin.StyleSwin, styleswin.STYLESWIN_1024, _one()),
)  # fmt: skip


def find_preset(text: str) -> Preset | None:
    """Return the preset of a name; case and punctuation do not matter."""
    return {_plain(preset.name): preset for preset in PRESETS}.get(_plain(text))


def near_presets(text: str) -> list[str]:
    """Name up to three presets that are spelled alike."""
    names = {_plain(preset.name): preset.name for preset in PRESETS}
    return [names[key] for key in difflib.get_close_matches(_plain(text), names, n=3)]


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
