#!/usr/bin/env python
"""Does an installed wheel work? Run with the Python it is installed for, anywhere outside the source.

    python scripts/check_wheel.py                  # with kernels
    python scripts/check_wheel.py --no-compiler    # one that was built without a compiler

Compresses the bundled model, loads it, writes a few words with it and verifies it, as a user would, and looks for the
native library, or for the one sentence that says why it is not there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def feather(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command; what it printed is shown where it fails."""
    command = [sys.executable, "-m", "featherweight", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-compiler", action="store_true", help="the wheel has no kernels, and has to say so")
    without = parser.parse_args().no_compiler
    import featherweight
    from featherweight.native import library

    package = Path(featherweight.__file__).parent
    found = library.get()
    if without == (found is not None):
        sys.exit(f"the native library is {'there' if found else f'missing: {library.why_not()}'}")
    print(f"featherweight {featherweight.__version__} in {package}")
    print("no native library" if found is None else f"native library {found.path.name}: {', '.join(found.isas())}")
    reference = str(package / "assets" / "reference")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        told = feather("compress", reference, "--recipe", "ptqtp", "--out", "small", folder=folder).stderr
        if told.count("runs without its native library") != int(without):
            sys.exit(f"the lack of a native library is to be said {'once' if without else 'never'}:\n{told}")
        print(feather("generate", "small", "--prompt", "Once", "--max-tokens", "8", folder=folder).stdout.strip())
        print(feather("verify", "small", folder=folder).stdout.strip())


if __name__ == "__main__":
    main()
