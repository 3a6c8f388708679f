#!/usr/bin/env python
"""Kill `feather compress` with SIGKILL at random moments and resume it: is the output byte-identical every time?

    python benchmarks/kill_and_resume.py [MODEL] --kills 20

Each trial starts the command on the bundled reference model, kills it after a random share of the time an undisturbed
run takes, and runs the same command again to the end. Every file of the output is compared with the undisturbed run's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from featherweight.cli.demo import reference_model
from featherweight.storage.run.ownership import RECORD


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the record of the run, which has times in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=reference_model())
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--recipe", default="ptqtp-3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    randomness = random.Random(arguments.seed)
    work = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "featherweight.cli.main", "compress", str(arguments.model)]
        command += ["--recipe", arguments.recipe, "--out", str(out), "--threads", "1"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    try:
        events: list[float] = []
        begun = time.time()
        if start(work / "whole").wait():
            sys.exit("the undisturbed run failed")
        with (work / "whole.log.jsonl").open() as log:
            events = [json.loads(line)["time"] - begun for line in log]
        first, last = events[0] - 0.2, events[-1]  # from just before the first layer to the end
        expected, trials = digests(work / "whole"), []
        number = 0
        while sum(bool(trial["killed"]) for trial in trials) < arguments.kills:  # one that ended in time does not count
            number += 1
            out = work / f"killed-{number}"
            moment = first + (last - first) * randomness.random()
            process = start(out)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            killed = process.wait() == -signal.SIGKILL
            artifacts = len(list(work.glob(f"killed-{number}.feather-run/artifacts/*.safetensors")))
            identical = start(out).wait() == 0 and digests(out) == expected
            left = list(work.glob(f"killed-{number}.feather-run"))
            trials.append(
                {"moment": moment, "killed": killed, "artifacts": artifacts, "identical": identical and not left}
            )
            print(
                f"{number:3}: {'killed' if killed else 'had ended'} at {moment:.2f} s, {artifacts} layers kept: "
                f"{'identical' if trials[-1]['identical'] else 'DIFFERENT'}",
                flush=True,
            )
            shutil.rmtree(out, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    good = sum(bool(trial["identical"]) for trial in trials)
    print(f"{good} of {len(trials)} resumed outputs are byte-identical; {sum(t['killed'] for t in trials)} were killed")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(trials, indent=2) + "\n")
    sys.exit(good != len(trials))


if __name__ == "__main__":
    main()
