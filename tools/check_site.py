"""Refuses a built documentation site that would load anything from elsewhere.

python tools/check_site.py build/site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

OUTSIDE = re.compile(r"(https?:)?//")
FETCHED = dict.fromkeys(("audio", "iframe", "img", "script", "source", "video"), "src") | {"link": "href"}
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")


class Assets(HTMLParser):
    """Collects what a page loads by itself; links that a reader may follow are not that."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        address = values.get(FETCHED.get(tag, ""))
        if address and OUTSIDE.match(address) and values.get("rel") not in ("canonical", "prev", "next"):
            self.outside.append(address)


def outside(path: Path) -> list[str]:
    """The addresses on other machines that a page or style sheet loads."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return IN_STYLE.findall(text)
    page = Assets()
    page.feed(text)
    return page.outside + IN_STYLE.findall(text)


def main() -> int:
    (folder,) = sys.argv[1:]
    pages = [path for path in sorted(Path(folder).rglob("*")) if path.suffix in (".html", ".css", ".svg")]
    found = [f"{path}: {address}" for path in pages for address in outside(path)]
    print("\n".join(found) or f"{len(pages)} pages and style sheets, nothing is loaded from elsewhere")
    return int(bool(found) or not pages)


if __name__ == "__main__":
    sys.exit(main())
