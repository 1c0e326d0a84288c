"""The curve of a probe over the tokens of a text, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .curve import Cliff

__all__ = ["curve_picture"]

STEP, HEIGHT, EDGE, NAMES = 16, 160, 34, 96  # pixels: a token's width, the curve, the left edge, room for the tokens
FILLS = {"prompt": "#f3f3f3", "think": "#fff6da", "mark": "#e2e8f5", "answer": "#e6f4e6"}


def curve_picture(rows: Sequence[Mapping[str, Any]], found: Cliff) -> str:
    """Scores of rows of token, role and refusal; bands for the roles, the plateau dashed, numbers on hover."""
    width = EDGE + STEP * len(rows) + 10

    def place(index: int, score: float) -> tuple[float, float]:
        return EDGE + STEP * (index + 0.5), 10 + HEIGHT * (1 - score)

    bands = [
        f'<rect x="{EDGE + STEP * i}" y="10" width="{STEP}" height="{HEIGHT}" fill="{FILLS[row["role"]]}"/>'
        for i, row in enumerate(rows)
    ]
    line = " ".join("{:.1f},{:.1f}".format(*place(i, row["refusal"])) for i, row in enumerate(rows))
    level = place(0, found.plateau)[1]
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + NAMES}" font-size="11" '
            'font-family="sans-serif" role="img" aria-label="probability of a refusal along the tokens">',
            *bands,
            *(f'<text x="4" y="{place(0, v)[1] + 4:.1f}">{v:g}</text>' for v in (0, 0.5, 1)),
            f'<line x1="{EDGE}" x2="{width - 10}" y1="{level:.1f}" y2="{level:.1f}" stroke="#888" '
            'stroke-dasharray="4 3"/>',
            f'<polyline points="{line}" fill="none" stroke="#b3261e" stroke-width="2"/>',
            *(_point(*place(i, row["refusal"]), row) for i, row in enumerate(rows)),
            "</svg>",
        ]
    )


def _point(x: float, y: float, row: Mapping[str, Any]) -> str:
    token = row["token"].strip() or "␣"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#b3261e">'
        f"<title>{escape(repr(row['token']))} {row['refusal']:.3f}</title></circle>"
        f'<text transform="translate({x + 4:.1f},{HEIGHT + 18}) rotate(60)">{escape(token[:12])}</text>'
    )
