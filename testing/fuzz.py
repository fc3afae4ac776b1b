"""Look for failures as long as there is time: `python -m blockwright.testing.fuzz --minutes 10`.

Every turn asks one property of one random pass with a seed of its own, which is printed. What
breaks is shrunk and saved as a JSON file that the test suite asks again from then on.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis.errors import Flaky

from ..passes import QuantizeWeights
from .case import Subject, make_subject
from .conformance import PROPERTIES, Property, search
from .corpus import LAST, save
from .pipelines import random_pass

EXAMPLES = 20  # of one turn


@dataclass
class Tally:
    """What the search did.

    Attributes:
        seconds: Wall time by property.
        turns: Turns by property.
        saved: Files of new failures.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    turns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    saved: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        """Render as a table, the slowest property first."""
        rows = sorted(self.seconds.items(), key=lambda row: -row[1])
        lines = [f"{'property':32} {'turns':>6} {'seconds':>8}"]
        return "\n".join(
            lines + [f"{name:32} {self.turns[name]:6} {spent:8.1f}" for name, spent in rows]
        )


def fuzz(
    minutes: float,
    corpus: Path,
    *,
    say: Callable[[str], None],
    seed: int | None = None,
    properties: Sequence[Property] = PROPERTIES,
) -> Tally:
    """Search until time is up.

    Args:
        minutes: Wall time; a turn that has begun is finished.
        corpus: Folder for failures.
        seed: Seed of the whole search; drawn when left out.
        say: Told of every turn.
        properties: What to ask.
    """
    draw = random.Random(seed if seed is not None else time.time_ns())
    end, tally = time.monotonic() + 60 * minutes, Tally()
    while time.monotonic() < end:
        property_, turn = draw.choice(properties), draw.randrange(2**32)
        subject = random_subject(turn)
        begin = time.monotonic()
        found = _turn(property_, subject, turn)
        tally.seconds[property_.name] += time.monotonic() - begin
        tally.turns[property_.name] += 1
        say(f"{turn:>10} {property_.name:32} {subject.pass_} {found or 'ok'}")
        if found and property_.name in LAST:
            tally.saved.append(save(corpus, property_.name, LAST[property_.name]))
            say(f"  saved {tally.saved[-1]}")
    return tally


def random_subject(seed: int) -> Subject:
    """Return a registered pass with random options."""
    pass_ = random_pass(random.Random(seed))
    if isinstance(pass_, QuantizeWeights):
        return make_subject(pass_, QuantizeWeights(bits=4), 7)
    return make_subject(pass_)


def _turn(property_: Property, subject: Subject, seed: int) -> str | None:
    """Return what broke, in one line."""
    LAST.clear()
    options = settings(settings.get_profile("fuzz"), max_examples=EXAMPLES)
    try:
        search(property_, subject, options, seed)
    except (Exception, Flaky) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when something broke."""
    parser = argparse.ArgumentParser(prog="blockwright.testing.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--corpus", type=Path, default=Path("tests/corpus"))
    given = parser.parse_args(arguments)
    tally = fuzz(given.minutes, given.corpus, seed=given.seed, say=say)
    say(f"{tally}\n{len(tally.saved)} failures")
    return 1 if tally.saved else 0


if __name__ == "__main__":
    sys.exit(main())
