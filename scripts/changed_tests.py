#!/usr/bin/env python
"""Print the tests of what has changed, for `make check`: paths for pytest, nearest first.

Changed is what differs from a revision (the commit that this branch left `origin/main` or `main` at; on it, the last
commit), and what git does not know yet. A changed test is its own test; of a changed module these are tests: files
named after it, and files that import it. A change of the native sources stands for tests of the library, of its
products and of the decoder.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/featherweight")
NATIVE = ("tests/native/test_library.py", "tests/products", "tests/decoder/test_compressed.py")
ALWAYS = ("tests/test_docs.py",)


def git(*arguments: str) -> list[str]:
    """Lines that git prints; none where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def base_revision() -> str:
    """Where this branch begins; on the main branch itself the commit before the last."""
    head = git("rev-parse", "HEAD")
    for branch in ("origin/main", "main"):
        base = git("merge-base", "HEAD", branch)
        if base and base != head:
            return base[0]
    return "HEAD~1"


def changed_files(base: str) -> list[Path]:
    names = [*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")]
    return [Path(name) for name in dict.fromkeys(names)]


def tests_of(changed: list[Path], tests: dict[Path, str]) -> list[str]:
    """Paths of tests, those named after what changed before those that only import it. `tests`: text of each file."""
    named: dict[str, None] = {}
    importing: dict[str, None] = {}
    for path in changed:
        if path in tests:
            named[str(path)] = None
        elif path.suffix in (".cpp", ".h") and PACKAGE in path.parents:
            importing |= dict.fromkeys(NATIVE)
        elif path.suffix == ".py" and PACKAGE in path.parents:
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            module = ".".join(("featherweight", *parts)).removesuffix(".__init__")
            imports = re.compile(rf"(from|import) {re.escape(module)}\b(?!\.)")
            for test, text in tests.items():
                if test.stem.endswith(f"_{path.stem}"):
                    named[str(test)] = None
                elif imports.search(text):
                    importing[str(test)] = None
    return list(dict.fromkeys((*named, *importing, *ALWAYS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="revision to compare with")
    base = parser.parse_args().base or base_revision()
    tests = {path.relative_to(ROOT): path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    print("\n".join(tests_of(changed_files(base), tests)))


if __name__ == "__main__":
    main()
