"""Give each scene of a video its own text in joint attention.

    [text_1 .. text_S ; video_1 .. video_S]        text_s sees text_s and video_s
                                                   video_s sees text_s and all videos

So a model for one text makes videos of several scenes that go together. Masks are between segments,
and what a segment sees is a few stretches of the sequence: there is no mask, but an attention for
each run of segments that see the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.recognize import Attention
from .base import Pass, Plan, Promise, Skip, require_choice, selected
from .shared.cores import with_core
from .shared.plain_core import not_plain, options_of, tokens_of
from .shared.segments import PRESETS, SegmentedAttention, Segments, scene_rows


@dataclass(frozen=True, kw_only=True)
class SceneMaskAttention(Pass[Attention, Segments]):
    """Let scenes of a video see their own text and each other.

    The program is one of the whole sequence: its example inputs hold the texts of all scenes, one
    after the other, and the videos of all scenes.

    Attributes:
        scenes: Scenes S.
        mask: Who sees whom: `mask2dit`, as above; `causal`, the same but for later videos;
            `diagonal`, each scene itself alone; `none`, everybody everybody.
        text: Tokens of all texts together. By default what the first stream of a joint attention
            brings; attention in one stream, as in FLUX's single blocks, must be told.
        text_lengths: Tokens of each text; equal shares by default.
        video_lengths: Tokens of each video; equal shares by default.
        rows: Instead of `mask`: for each text, then each video, `1` for each text and each video it
            sees and `0` for the others.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range, or two do not go together.

    Source: Qi et al., Mask2DiT, 2025, arXiv:2503.19881 (symmetric binary mask).
    Differs: `causal` and `diagonal` are ours; so are scenes of different lengths. Keys of all
        videos are not repeated for every scene. Modulating some scenes as at time 0, to go on
        from given ones, is left to the caller.
    Exact when: there is one scene, or every segment sees every segment; such attentions are left
        as they are.
    """

    name: ClassVar[str] = "scene-mask-attention"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"scenes": 2},)
    scenes: int = 3
    mask: str = "mask2dit"
    text: int = 0
    text_lengths: tuple[int, ...] = ()
    video_lengths: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "mask", self.mask, tuple(PRESETS))
        lengths = (*self.text_lengths, *self.video_lengths)
        if self.scenes < 1 or self.text < 0 or min(lengths, default=1) < 1:
            raise OptionError(
                f"{self.name}: scenes={self.scenes}, text={self.text}, text_lengths="
                f"{list(self.text_lengths)}, video_lengths={list(self.video_lengths)}.",
                remedy="use 1 scene or more, and lengths of 1 token or more.",
            )
        if any(len(n) not in (0, self.scenes) for n in (self.text_lengths, self.video_lengths)):
            raise OptionError(
                f"{self.name}: there are not as many lengths as scenes={self.scenes}.",
                remedy="give one length for each scene, or none for equal shares.",
            )
        if self.text and self.text_lengths and sum(self.text_lengths) != self.text:
            raise OptionError(
                f"{self.name}: text_lengths={list(self.text_lengths)} do not add up to"
                f" text={self.text}.",
                remedy="leave one of them out.",
            )
        if self.rows and not _is_table(self.rows, 2 * self.scenes):
            raise OptionError(
                f"{self.name}: rows={list(self.rows)} do not say what each of {2 * self.scenes}"
                " segments sees.",
                remedy='give as many rows of as many "0" and "1", with a "1" in each.',
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def decide(self, attention: Attention) -> Segments | Skip:
        if not selected(attention.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=attention)
        reason = not_plain(attention)
        if reason:
            return Skip(reason, at=attention)
        tokens, text = tokens_of(attention), self._text(attention)
        if not 0 < text < tokens:
            return Skip(f"has {tokens} tokens, {text} of them known to be text; say text=...",
                        at=attention)  # fmt: skip
        texts = self._shares(text, self.text_lengths)
        videos = self._shares(tokens - text, self.video_lengths)
        if not texts or not videos:
            return Skip(
                f"has {text} tokens of text and {tokens - text} others, which are not those of"
                f" {self.scenes} scenes",
                at=attention,
            )
        segments = Segments([*texts, *videos], self._rows())
        if segments.density == 1:
            return Skip("lets every segment see every segment", at=attention)
        return segments

    def replace(self, attention: Attention, decision: Segments) -> nn.Module:
        return with_core(attention, "scenes", SegmentedAttention(decision, options_of(attention)))

    def statistics(self, plan: Plan[Segments]) -> Mapping[str, int]:
        left_out = [1e6 * (1 - segments.density) for segments in plan.decisions.values()]
        return {"pairs left out, per million": round(sum(left_out) / max(1, len(left_out)))}

    def _text(self, attention: Attention) -> int:
        """Return how many tokens are text; 0 when that is not known."""
        if self.text or self.text_lengths:
            return self.text or sum(self.text_lengths)
        first = attention.streams[0].x_q.meta["val"]
        return int(first.shape[-2]) if attention.source == "joint" else 0

    def _shares(self, tokens: int, lengths: tuple[int, ...]) -> list[int]:
        """Return the tokens of each scene; none when they do not add up."""
        if lengths:
            return list(lengths) if sum(lengths) == tokens else []
        return [] if tokens % self.scenes else [tokens // self.scenes] * self.scenes

    def _rows(self) -> list[str]:
        return list(self.rows) or scene_rows(self.mask, self.scenes)


def _is_table(rows: Sequence[str], count: int) -> bool:
    """Whether there are so many rows of so many flags, none without a `1`."""
    whole = len(rows) == count and all(len(row) == count for row in rows)
    return whole and all("1" in row and set(row) <= {"0", "1"} for row in rows)
