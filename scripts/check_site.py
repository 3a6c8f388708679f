#!/usr/bin/env python
"""Check a built site: every link inside it leads somewhere, and no page needs anything from another server.

    python scripts/check_site.py build/site

Links to other servers are for people to follow; what a page loads by itself (scripts, styles, pictures, fonts)
has to be in the folder. Needs the standard library alone.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Anchors of a page, what it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") != "canonical" and "href" in found:
            self.loads.append(found["href"])
        elif "src" in found:
            self.loads.append(found["src"])


def faults_of(site: Path) -> list[str]:
    """A line for each link or load that leads nowhere, or elsewhere."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        if path.name == "404.html":  # served at any address, so its paths are those of a server's root
            continue
        here = path.relative_to(site)
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loads and parts.scheme != "data":
                    faults.append(f"{here} loads {address} from elsewhere")
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if not target.exists():
                faults.append(f"{here}: {address} leads to no file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                faults.append(f"{here}: {address} leads to no heading")
    for style in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:@import|url\()\s*[\"']?(https?:[^\"')]+)", style.read_text("utf-8")):
            faults.append(f"{style.relative_to(site)} loads {address} from elsewhere")
    return faults


def main() -> None:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "build/site").resolve()
    if not (site / "index.html").is_file():
        sys.exit(f"{site} holds no site: make it with make docs-site")
    faults = faults_of(site)
    print("\n".join(faults))
    if faults:
        sys.exit(f"{len(faults)} links lead nowhere, or loads elsewhere")
    print(
        f"{len(list(site.rglob('*.html')))} pages, every link inside leads somewhere, nothing is loaded from elsewhere"
    )


if __name__ == "__main__":
    main()
