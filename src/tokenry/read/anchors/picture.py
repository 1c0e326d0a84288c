"""A reading of thought anchors as a picture: the sentences below each other, with arcs to those they matter for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from ..contract import Reading

__all__ = ["AnchorReading"]

LINE, LEFT, SHOWN = 26, 220, 110  # pixels between sentences and left of them; characters of a sentence


@dataclass(frozen=True)
class AnchorReading(Reading):
    """Rows of sentences, and what they matter for.

    Attributes:
        arcs: (from, to, effect) of sentences, the strongest first.
    """

    arcs: list[tuple[int, int, float]] = field(default_factory=list)

    def picture(self) -> str:
        """Inline SVG; numbers appear on hover."""
        parts = [_arc(first, second, effect, self.arcs[0][2]) for first, second, effect in reversed(self.arcs)]
        most = max((row["suppression"] or 0 for row in self.rows), default=0)
        parts += [_line(row, most) for row in self.rows]
        height = LINE * (len(self.rows) + 1)
        body = Markup("").join(parts)
        return Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" width="100%" viewBox="0 0 1100 {h}" role="img" '
            'font-family="sans-serif" font-size="14">{body}</svg>'
        ).format(h=height, body=body)


def _line(row: dict[str, Any], most: float) -> Markup:
    numbers = "\n".join(f"{name}: {_number(value)}" for name, value in row.items() if name != "text")
    text = row["text"] if len(row["text"]) <= SHOWN else row["text"][:SHOWN] + "..."
    strength = max(0.0, (row["suppression"] or 0) / most) if most > 0 else 0.0
    return Markup(
        '<g><title>{text}\n{numbers}</title><circle cx="{x}" cy="{y}" r="{r:.1f}" fill="#b5541c"/>'
        '<text x="{t}" y="{base}" fill="currentColor">{number} {shown}</text></g>'
    ).format(
        text=row["text"],
        numbers=numbers,
        x=LEFT,
        y=_y(row["sentence"]),
        r=3 + 6 * strength,
        t=LEFT + 14,
        base=_y(row["sentence"]) + 5,
        number=row["sentence"],
        shown=text,
    )


def _arc(first: int, second: int, effect: float, most: float) -> Markup:
    bend = min(LEFT - 10, 20 + 12 * (second - first))
    return Markup(
        '<path d="M {x} {a} C {c} {a}, {c} {b}, {x} {b}" fill="none" stroke="#2a6f97" stroke-width="{w:.1f}" '
        'stroke-opacity="{o:.2f}"><title>{first} to {second}: {effect:+.2f} ln nats</title></path>'
    ).format(
        x=LEFT,
        a=_y(first),
        b=_y(second),
        c=LEFT - bend,
        w=1 + 3 * effect / most,
        o=0.25 + 0.7 * effect / most,
        first=first,
        second=second,
        effect=effect,
    )


def _y(sentence: int) -> int:
    return LINE * (sentence + 1)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
