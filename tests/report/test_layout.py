"""The report in a browser: nothing has to be scrolled sideways, on a phone or a wide screen, and no labels overlap."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from test_page import variants

from featherweight.tasks.report.page import write_report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SCRIPT = """
<script>
const wide = [...document.querySelectorAll("*")].filter(e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1
  && getComputedStyle(e).overflowX !== "visible").map(e => e.className || e.tagName);
const crossing = [];
for (const svg of document.querySelectorAll("svg")) {
  if (!svg.getClientRects().length) continue;
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  texts.forEach(([a, p], i) => {
    if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.top < frame.top - 1 || p.bottom > frame.bottom + 1)
      crossing.push(a + " leaves the figure");
    texts.slice(i + 1).forEach(([b, q]) => {
      const w = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const h = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (w > 1 && h > 4) crossing.push(a + " / " + b);  // boxes of text are higher than its letters
    });
  });
}
const page = document.documentElement;
const [scroll, client] = [page.scrollWidth, page.clientWidth];
parent.document.title = JSON.stringify({width: innerWidth, scroll, client, wide, crossing});
</script>
"""


def crowded() -> list[dict[str, Any]]:
    """Runs with all that a page can show, long names, and points close to each other."""
    found = variants()
    record = {
        "recipe": "trit-2-blockwise",
        "source": "A-Model-With-A-Long-Name-135M-Instruct",
        "finished": "2026-01-02T03:04:05+00:00",
        "featherweight": "0.1.0",
        "seconds": 12345.6,
        "peak_memory_bytes": 4_000_000_000,
        "resident_at_start_bytes": 250_000_000,
        "resumed": 7,
        "threads": 2,
        "device": "cpu",
        "machine": {
            "processor": "A Processor With Many Words In Its Name (R) 9999X 64-Core @ 3.50 GHz",
            "processors": 64,
            "memory_bytes": 512_000_000_000,
            "system": "Linux x86_64",
            "torch": "2.13.0+cpu",
        },
    }
    speed = {"decode_tokens_per_second": 445.1, "prefill_tokens_per_second": 1784.0, "engine": "native", "threads": 2}
    layers = [
        {"name": f"model.layers.{block}.{role}", "role": role.rpartition(".")[2], "block": block, "nbytes": 90_000,
         "code": f"hadamard 256 of {2 + block % 2} tied trit-planes g32", "spec": {"shape": [512, 512]},
         "relative_error": 0.1 + 0.01 * block}
        for block in range(12) for role in ("self_attn.q_proj", "mlp.experts.down_proj")
    ]  # fmt: skip
    model = found[1]
    for number in range(9):
        evaluation = {
            **model["evaluation"],
            "perplexity": 25.0 + 0.05 * number,
            "bits_per_weight": {"linear": 3.2 + 0.02 * (number % 3), "model": 4.1},
            "warnings": ["5000 tokens in 2 windows leave the perplexity uncertain by 9 %: score more tokens"],
        }
        found.append(
            {
                **model,
                "name": f"experiments/a-long-name-of-a-run-{number}",
                "evaluation": evaluation,
                "compression": {"layers": layers},
                "record": record,
                "speed": {**speed, "context_tokens": 512},
                "missing": ["Its speed was not measured: `feather bench a/folder/with/a/long/name` records it."],
            }
        )
    return found


def look(page: Path, width: int, tmp_path: Path) -> dict[str, Any]:
    """What a script in the page measures at this width of the window."""
    assert CHROMIUM is not None
    probed = tmp_path / "probed.html"
    inner = escape(page.read_text().replace("</body>", SCRIPT + "</body>"))
    # In a frame of this width: windows are at least 500 pixels wide.
    probed.write_text(
        f'<title></title><iframe srcdoc="{inner}" style="width:{width}px;height:2000px;border:0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 40},2100", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(title[1]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_is_scrolled_sideways_and_labels_are_apart(width: int, tmp_path: Path) -> None:
    page = write_report(tmp_path / "r.html", crowded(), model="A-Model-With-A-Long-Name-135M", commands=["x" * 200])
    seen = look(page, width, tmp_path)
    assert seen["width"] == width
    assert seen["scroll"] <= seen["client"]
    assert seen["wide"] == []
    assert seen["crossing"] == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_what_is_too_wide_is_noticed(tmp_path: Path) -> None:
    """The look above finds what it is for."""
    page = tmp_path / "wide.html"
    page.write_text(
        '<!DOCTYPE html><html><head><title></title></head><body><div style="width:900px">a</div>'
        '<svg width="200" height="40"><text x="5" y="20">one</text><text x="12" y="22">two</text></svg></body></html>'
    )
    seen = look(page, 360, tmp_path)
    assert seen["scroll"] > seen["client"]
    assert "one / two" in seen["crossing"]
