"""Continue sequences of tokens with an engine that keeps its keys and values.

engine = bw.compile(model, passes=[KVCache(length=256)], ...)
tokens = bw.generate(engine, prompt, new_tokens=100)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..backends.engine import Engine, Session
from ..ir.errors import OptionError


def generate(
    engine: Engine | Session,
    tokens: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int = 0,
    **inputs: Any,
) -> Int[Tensor, "batch seq"]:
    """Return prompts with what the model continues them with.

    Args:
        engine: A decoder compiled with `KVCache`; a session of it to go on where it stopped.
        tokens: Prompts, int64, all of one length.
        new_tokens: How many tokens to add at most, 1 or more.
        temperature: What logits are divided by before a token is drawn; 0 takes the likeliest.
        top_k: Draw from the likeliest so many tokens; None for all.
        top_p: Draw from the likeliest tokens that together have this probability, above 0.
        stop: Tokens that end a sequence; the first of them fills up rows that ended early.
        seed: Of the drawing: equal seeds give equal tokens.
        inputs: Further arguments of every call, such as `starts` of padded prompts.

    Raises:
        OptionError: The engine keeps no state, an option is out of range, or the cache is full.
    """
    if isinstance(engine, Engine) and not engine.program.state:
        raise OptionError(
            "generate needs an engine that keeps its keys and values.",
            remedy="compile with passes=[..., KVCache(length=...)].",
        )
    if new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise OptionError(
            f"generate: new_tokens={new_tokens}, temperature={temperature}, top_k={top_k},"
            f" top_p={top_p}: use 1 or more tokens, a temperature of 0 or more, top_p in (0, 1]."
        )
    session = engine.session() if isinstance(engine, Engine) else engine
    draws = torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    found = [tokens]
    for logits in _following(session, found, inputs, new_tokens):
        chosen = choose(logits, draws, temperature=temperature, top_k=top_k, top_p=top_p)
        if stop:
            chosen = torch.where(ended, stop[0], chosen)
            ended |= torch.isin(chosen, torch.tensor(list(stop)))
        found.append(chosen[:, None])
        if bool(ended.all()):
            break
    return torch.cat(found, dim=1)


def choose(
    logits: Float[Tensor, "batch vocab"],
    draws: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Tensor, " batch"]:
    """Return one token per row: the likeliest at temperature 0, else one drawn.

    Source: Fan et al., 2018, arXiv:1805.04833 (top-k); Holtzman et al., 2020, arXiv:1904.09751
        (nucleus sampling, top-p).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the likeliest token always stays
    if top_k is not None:
        p[..., top_k:] = 0.0
    drawn = p.multinomial(1, generator=draws)
    return order.gather(-1, drawn).squeeze(-1)


def _following(
    session: Session, found: Sequence[Tensor], inputs: dict[str, Any], count: int
) -> Iterator[Float[Tensor, "batch vocab"]]:
    """Yield the logits behind the last of the tokens found so far, `count` times."""
    for _ in range(count):
        result = session(found[-1], **inputs)
        yield _logits(result)[:, -1].detach().cpu()


def _logits(result: Any) -> Tensor:
    """Return the logits of what a model returns: a tensor, or something with `logits`."""
    if isinstance(result, Tensor):
        return result
    named = result.get("logits") if isinstance(result, dict) else getattr(result, "logits", None)
    if isinstance(named, Tensor):
        return named
    raise OptionError("generate: the model returns no logits.", remedy="let it return a tensor.")
