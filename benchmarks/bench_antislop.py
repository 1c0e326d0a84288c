"""What a token costs the monitors of Antislop, early and late in a long text, without a model.

python benchmarks/bench_antislop.py
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from bench_loop import phrases
from common import heading, report

from tokenry.decode import NGramBan, PhraseBan, RegexBan, SequenceState
from tokenry.decode.generation.monitor import Monitor, held_tokens

EARLY, LATE, WIDTH = 250, 6000, 200  # tokens at which the cost is measured, and over how many
VOCABULARY = [
    "the sea had gone",
    " and she could see",
    " a light",
    ". Then",
    " nothing",
    " was the old tower",
    " of it",
]


class Pieces:
    """A tokenizer whose tokens are pieces of text."""

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(VOCABULARY[i] for i in ids)


def seconds_per_token(make: Callable[[], Monitor]) -> tuple[float, float]:
    """Median seconds of one token around `EARLY` and around `LATE`."""
    rng, row, monitor, took = random.Random(0), SequenceState(0, [], Pieces()), make(), []
    for _ in range(LATE + WIDTH):
        row.append(rng.randrange(len(VOCABULARY)))
        start = time.perf_counter()
        monitor.check(row)
        row.checked = len(row.text)
        held_tokens(row, [monitor], row.settled)
        took.append(time.perf_counter() - start)
    early, late = took[EARLY - WIDTH // 2 : EARLY + WIDTH // 2], took[LATE : LATE + WIDTH]
    return statistics.median(early), statistics.median(late)


def main() -> None:
    heading(f"monitors, median seconds of a token at {LATE} / at {EARLY} tokens")
    monitors: dict[str, Callable[[], Monitor]] = {
        "8000 phrases": lambda: PhraseBan(phrases(8000)),
        "8000 n-grams": lambda: NGramBan(phrases(8000)),
        "a regular expression without a span": lambda: RegexBan([r"\bnot [^.]{1,40}, but\b"]),
        "a regular expression with a span": lambda: RegexBan([r"\bnot [^.]{1,40}, but\b"], max_span=60),
    }
    for name, make in monitors.items():
        early, late = seconds_per_token(make)
        report(
            f"{name} ({1e6 * early:.0f} and {1e6 * late:.0f} microseconds)", late / early, "<= 1.5", late <= 1.5 * early
        )


if __name__ == "__main__":
    main()
