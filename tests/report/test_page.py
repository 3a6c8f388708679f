"""The report is one file that needs nothing else, says what it was given, and survives gaps."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import OutputError
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform
from featherweight.tasks.analyse.levels import histogram_of
from featherweight.tasks.report import plots
from featherweight.tasks.report.page import write_report
from featherweight.tasks.report.variants import Page as Variants
from featherweight.tasks.report.variants import Variant, findings

VOID = {"meta", "br", "hr", "img", "link", "input"}
LOADING = {"src", "srcset", "data", "action", "poster", "background", "cite"}


class Page(HTMLParser):
    """Checks nesting, and collects texts, tags and whatever could make a browser load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in LOADING or k.endswith("href")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def trit_planes(weight: torch.Tensor, planes: int = 2, tied: bool = False, group_size: int = 32) -> TritPlanes:
    generator = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (planes, *weight.shape), generator=generator, dtype=torch.int8)
    groups = weight.shape[1] // group_size
    scales = torch.rand(weight.shape[0], groups, *(() if tied else (planes,)), generator=generator)
    return TritPlanes.encode(trits, scales, group_size, tied=tied)


def variants() -> list[dict[str, Any]]:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    layers = [
        {"name": f"model.layers.{block}.{role}", "relative_error": 0.1 + 0.01 * block}
        for block in range(3)
        for role in ("self_attn.q_proj", "mlp.down_proj")
    ]
    found: list[dict[str, Any]] = [
        {"name": "original", "original": True, "evaluation": {"perplexity": 20.0, "tokens": 999, "bytes": 22_000_000}}
    ]
    for name, bits, perplexity in (("RTN 3", 3.2, 31.5), ("PTQTP K=2", 3.45, 25.25), ("PTQTP K=1", 1.85, 4321.0)):
        evaluation = {
            "perplexity": perplexity,
            "perplexity_against": 20.0,
            "bits_per_weight": {"linear": bits, "model": bits + 2},
            "bytes": 7_000_000,
            "kl": 0.1234,
            "top1_agreement": 0.87,
            "log_ratio": math.log(perplexity / 20),
            "log_ratio_standard_error": 0.001,
            "description": "Token perplexity, protocol own: all of it.",
        }
        found.append(
            {
                "name": name,
                "evaluation": evaluation,
                "compression": {"seconds": 1.5, "peak_memory_bytes": 4e8, "layers": layers},
                "sample": f"A text by {name}.",
                "recipe": {"name": "ptqtp", "grid": {"planes": 2}},
                "histograms": [histogram_of(weight, trit_planes(weight), "model.layers.0.self_attn.q_proj")],
                "command": "feather compress model --recipe ptqtp",
            }
        )
    return found


def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    html = write_report(tmp_path / "report.html", variants(), model="small", commands=["make demo"]).read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "img", "object", "embed", "image", "base"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.findall(r"(?:https?:)?//[\w.-]+|@import", re.sub(r"<text.*?</text>", "", html))
    assert not [target for target in re.findall(r"url\(([^)]*)\)", html) if not target.startswith("#")]
    defined = set(re.findall(r'id="([^"]+)"', html))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", html)) <= defined
    assert page.tags.count("svg") == 2 + 3 + 3


def test_every_colour_of_a_figure_follows_the_theme(tmp_path: Path) -> None:
    html = write_report(tmp_path / "report.html", variants()).read_text()
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert used <= defined
    figures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    greys = [c for c in re.findall(r"#[0-9a-f]{6}", figures) if c[1:3] == c[3:5] == c[5:7] or c.startswith("#0")]
    assert greys == []


def test_it_says_what_it_was_given(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path / "r.html", variants(), model="small", parameters=11_000_000).read_text()).text
    for part in ("small", "11 million", "PTQTP K=2", "25.250", "+26.25", "0.1234", "87.0", "3.45", "7 MB"):
        assert part in text
    for part in ("A text by RTN 3.", "planes: 2", "protocol own: all of it", "q_proj", "feather compress", "4,321"):
        assert part in text
    assert text.count("Token perplexity, protocol own") == 1


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    html = write_report(tmp_path / "r.html", variants()).read_text()
    marked = re.findall(r'<td class="best"[^>]*><span class="value"><b>([^<]*)</b>', html)
    assert marked == ["25.250", "+26.25", "1.85", "3.85"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(tmp_path / "a.html", variants()).read_bytes()
    assert write_report(tmp_path / "b.html", variants()).read_bytes() == first


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    given = variants()
    evil = "<script>alert(1)</script> & $x_1$ \"quoted\" 'too'"
    for variant in given:
        variant.update(name=evil, sample=evil, command=evil, recipe={evil: evil}, family=evil)
        variant["evaluation"]["description"] = evil
        for histogram in variant.get("histograms", ()):
            histogram["layer"] = evil
        for layer in variant.get("compression", {}).get("layers", ()):
            layer["name"] = f"model.layers.0.{evil}"
    page = Page(write_report(tmp_path / "r.html", given, model=evil, prompt=evil, commands=[evil]).read_text())
    assert "script" not in page.tags
    assert "$x_1$" in page.text


FIELDS = ("evaluation", "compression", "sample", "recipe", "histograms", "command", "original")


def _bad(value: Any) -> Any:
    return math.nan if isinstance(value, float | int) else type(value)()


@given(st.lists(st.sets(st.sampled_from(FIELDS)), max_size=4), st.randoms())
@settings(max_examples=8, deadline=None)
def test_gaps_are_survived(tmp_path_factory: pytest.TempPathFactory, missing: list[set[str]], random: Any) -> None:
    given = []
    for variant, gaps in zip(variants(), missing, strict=False):
        kept = {k: v for k, v in variant.items() if k not in gaps}
        for key in ("evaluation", "compression"):
            if key in kept:
                kept[key] = {k: random.choice([v, v, None, _bad(v)]) for k, v in kept[key].items()}
        given.append(kept)
    Page(write_report(tmp_path_factory.mktemp("report") / "r.html", given).read_text())


def test_odd_variants_are_survived(tmp_path: Path) -> None:
    alone = {"name": "", "evaluation": {"perplexity": 20.0, "bits_per_weight": {"linear": 3.0}}}
    better = {**alone, "name": "b", "evaluation": {**alone["evaluation"], "perplexity_against": 25.0}}  # type: ignore[dict-item]
    awful = {**alone, "name": "c", "evaluation": {"perplexity": 1e30, "bits_per_weight": {"linear": 3.0}}}
    for several in ([], [alone], [better], [alone, better, awful], [Variant("x")], [{}]):
        Page(write_report(tmp_path / "r.html", several).read_text())


def test_a_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", variants())
    before = path.read_bytes()
    with pytest.raises(OutputError, match="cannot write"):
        write_report(path / "below" / "r.html", variants())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_the_smallest_is_the_smallest_file() -> None:
    """At equal bits of the linear layers an embedding that is compressed makes the smaller file."""

    def variant(name: str, perplexity: float, nbytes: int | None) -> dict[str, Any]:
        facts = {"perplexity": perplexity, "perplexity_against": 20.0, "bits_per_weight": {"linear": 3.45}}
        return {"name": name, "evaluation": facts | ({} if nbytes is None else {"bytes": nbytes})}

    page = Variants.of(map(Variant.of, [variant("kept", 21.9, 4_850_000), variant("coded", 20.5, 3_570_000)]))
    assert [f[1:] for f in findings(page) if "mallest" in f[0] or "losest" in f[0]] == [("coded", "+2.50 %, 3.57 MB")]
    page = Variants.of(map(Variant.of, [variant("kept", 21.9, None), variant("coded", 20.5, 3_570_000)]))
    assert ("Closest to it", "coded", "+2.50 % at 3.45 bits") in findings(page)


def test_embeddings_stand_beside_the_map() -> None:
    layers = [{"name": f"model.layers.{i}.mlp.up_proj", "relative_error": 0.2} for i in range(3)]
    ends = [{"name": "model.embed_tokens", "relative_error": 0.02}, {"name": "lm_head", "relative_error": 0.03}]
    grid = plots.error_grid([*layers, *ends])
    assert grid is not None
    assert (grid.roles, grid.errors.shape, grid.outside) == (
        ("up_proj",),
        (1, 3),
        (("embed_tokens", 0.02), ("lm_head", 0.03)),
    )
    assert grid.mean == pytest.approx(0.2)
    alone = plots.error_grid(ends)
    assert alone is not None
    assert alone.roles == ("embed_tokens", "lm_head")


def test_frontier_by_hand() -> None:
    points = [plots.Point(*p, 0) for p in (("a", 2, 50), ("b", 3, 60), ("c", 3, 30), ("d", 4, 30), ("e", 5, 20))]
    assert [p.name for p in plots.frontier(points)] == ["a", "c", "e"]


def test_labels_do_not_cover_each_other_or_points(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plots._box
    chosen: list[Any] = []
    free = plots._free_place

    def choose(place: Any, width: float, height: float, taken: list[Any], frame: Any) -> Any:
        offset = free(place, width, height, taken, frame)
        box = real(place, offset, width, height)
        assert sum(plots._overlap(box, other) for other in taken) == 0
        chosen.append(box)
        return offset

    monkeypatch.setattr(plots, "_free_place", choose)
    names = ["RTN 3-bit", "RTN 3-bit MSE", "PTQTP K=2", "PTQTP K=2 tied", "RTN 4-bit", "RTN 4-bit MSE"]
    points = [plots.Point(n, 3 + 0.1 * (i % 2), 30 + 0.3 * i, 0) for i, n in enumerate(names)]
    plots.tradeoff(points, 24.0)
    assert len(chosen) == 6


def test_error_grid_sorts_layers_into_blocks_and_roles() -> None:
    layers = [
        {"name": "model.layers.0.self_attn.q_proj", "relative_error": 0.1},
        {"name": "model.layers.1.self_attn.q_proj", "relative_error": 0.2},
        {"name": "model.layers.1.mlp.experts.0.w1", "relative_error": 0.3},
        {"name": "model.layers.1.mlp.experts.1.w1", "relative_error": 0.5},
        {"name": "model.layers.0.mlp.down[3]", "relative_error": 0.7},
        {"name": "lm_head", "relative_error": None},
    ]
    grid = plots.error_grid(layers)
    assert grid is not None
    assert grid.roles == ("q_proj", "w1", "down")
    np.testing.assert_allclose(grid.errors, [[0.1, 0.2], [np.nan, 0.4], [0.7, np.nan]])
    assert plots.error_grid([]) is None


def test_levels_are_all_that_a_code_can_say() -> None:
    weight = torch.randn(4, 64)
    free = trit_planes(weight, 2)
    a, b = (float(s) for s in free.scales[1, 1])
    expected = sorted({i * a + j * b for i in (-1, 0, 1) for j in (-1, 0, 1)})
    assert free.group_levels(1, 1) == pytest.approx(expected)
    tied = trit_planes(weight, 3, tied=True)
    step = float(tied.scales[2, 0])
    assert tied.group_levels(2, 0) == pytest.approx([step * n for n in range(-13, 14)])
    codes = torch.randint(8, (4, 64), dtype=torch.int32)
    uniform = Uniform.encode(codes, torch.rand(4, 2), torch.full((4, 2), 3), 3, 32)
    scale = float(uniform.scales[0, 1])
    assert uniform.group_levels(0, 1) == pytest.approx([scale * (q - 3) for q in range(8)])


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_decoded_weights_are_levels(planes: int, tied: bool) -> None:
    weight = torch.randn(4, 64)
    code = trit_planes(weight, planes, tied)
    levels = torch.tensor(code.group_levels(3, 1))
    decoded = code.decode()[3, 32:64]
    assert float((decoded[:, None] - levels).abs().min(1).values.max()) < 1e-6


def test_histogram_shows_the_group_of_median_error() -> None:
    weight = torch.ones(3, 32)
    weight[2] = 0  # a group of zeros is not typical
    decoded = weight.clone()
    decoded[0] *= 0.5
    decoded[1] *= 0.75
    data = histogram_of(weight, Dense(decoded), "layer")
    assert (data["row"], data["first_column"]) in {(0, 0), (1, 0)}
    assert data["relative_error"] == pytest.approx(0.5)
    assert sum(data["counts"]) == weight.numel()
    assert len(data["edges"]) == len(data["counts"]) + 1
    assert histogram_of(torch.zeros(2, 8), Dense(torch.zeros(2, 8)))["relative_error"] == 0


def test_short_last_group() -> None:
    weight = torch.randn(2, 40)
    trits = torch.ones(1, 2, 40, dtype=torch.int8)
    code = TritPlanes.encode(trits, torch.rand(2, 2, 1), 32)
    data = histogram_of(weight, code)
    assert len(data["weights"]) == (32 if data["first_column"] == 0 else 8)
