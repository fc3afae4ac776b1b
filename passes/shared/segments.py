"""Attention among segments of a sequence: which see which, segment by segment.

    rows[i][j] = "1"        every token of segment i sees every token of segment j

What a segment sees is a few stretches of the sequence, so nothing is masked: each run of segments
that see the same attends once, to these keys alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_NONE: Mapping[str, Any] = MappingProxyType({})
Stretch = tuple[int, int]  # first token, number of tokens


@dataclass(frozen=True)
class Segments:
    """Segments of a sequence, and which of them see which.

    Attributes:
        lengths: Tokens of each segment, in the order of the sequence.
        rows: For each segment, `1` for each it sees and `0` for the others.
    """

    lengths: list[int]
    rows: list[str]

    @property
    def density(self) -> float:
        """Fraction of the pairs of tokens that see each other."""
        seen = sum(n * m for n, row in zip(self.lengths, self.rows, strict=True)
                   for m, flag in zip(self.lengths, row, strict=True) if flag == "1")  # fmt: skip
        return seen / sum(self.lengths) ** 2

    def runs(self) -> list[tuple[Stretch, list[Stretch]]]:
        """Return stretches of queries, each with the stretches of keys it sees."""
        starts = [0, *accumulate(self.lengths)]
        found = []
        for row, run in groupby(range(len(self.rows)), key=lambda i: self.rows[i]):
            known = list(run)
            queries = starts[known[0]], starts[known[-1] + 1] - starts[known[0]]
            seen = groupby(range(len(row)), key=lambda j: row[j])
            ranges = [list(same) for flag, same in seen if flag == "1"]
            keys = [(starts[r[0]], starts[r[-1] + 1] - starts[r[0]]) for r in ranges]
            found.append((queries, keys))
        return found

    def mask(self) -> Bool[Tensor, "seq seq"]:
        """Return which token sees which; for comparison only."""
        of = torch.tensor(self.lengths)
        table = torch.tensor([[flag == "1" for flag in row] for row in self.rows])
        return table.repeat_interleave(of, 0).repeat_interleave(of, 1)


def scene_rows(preset: str, scenes: int) -> list[str]:
    """Return which segments see which in [text_1 .. text_S ; video_1 .. video_S].

    Args:
        preset: One of `PRESETS`.
        scenes: S.
    """
    meet = PRESETS[preset]
    order = [(kind, scene) for kind in ("text", "video") for scene in range(scenes)]
    return ["".join("01"[meet(*query, *key)] for key in order) for query in order]


def _mask2dit(kind: str, scene: int, other: str, of: int) -> bool:
    """A text and its video see each other, and all videos do."""
    return scene == of or kind == other == "video"


def _diagonal(kind: str, scene: int, other: str, of: int) -> bool:
    """Scenes do not see each other."""
    return scene == of


def _causal(kind: str, scene: int, other: str, of: int) -> bool:
    """As `mask2dit`, but no video sees a later one."""
    return scene == of or (kind == other == "video" and of < scene)


def _all(kind: str, scene: int, other: str, of: int) -> bool:
    return True


PRESETS: Mapping[str, Callable[[str, int, str, int], bool]] = {
    "mask2dit": _mask2dit, "none": _all, "diagonal": _diagonal, "causal": _causal,
}  # fmt: skip


class SegmentedAttention(nn.Module):
    """Attention in which segments see some segments.

    Args:
        segments: Which see which.
        options: Of `scaled_dot_product_attention`: `scale`, `enable_gqa`.
    """

    def __init__(self, segments: Segments, options: Mapping[str, Any] = _NONE) -> None:
        super().__init__()
        self.runs, self.options = segments.runs(), dict(options)

    def forward(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq value_dim"],
    ) -> Float[Tensor, "batch heads seq value_dim"]:
        parts = [
            F.scaled_dot_product_attention(
                query.narrow(2, *queries), joined(key, keys), joined(value, keys), **self.options
            )
            for queries, keys in self.runs
        ]
        return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def joined(x: Float[Tensor, "batch heads seq dim"], stretches: Sequence[Stretch]) -> Tensor:
    """Return stretches of a sequence side by side; one alone is a view."""
    parts = [x.narrow(2, *stretch) for stretch in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
