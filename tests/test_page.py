"""The page of a comparison: what it says, that it loads nothing, and that it runs in a browser."""

import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from kdecore.accuracy.metrics import Errors
from kdecore.compare import comparison, picture, timing
from kdecore.compare.cases import Case
from kdecore.compare.machine import this_machine
from kdecore.compare.page import comparison_html, figure
from kdecore.compare.verdict import BOUND, verdict

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PIXEL = b"\x89PNG stand-in"
HOSTILE = """<script>alert("x")</script>&'"""


@pytest.fixture(scope="module")
def measured():
    """A case whose name is markup, and what was measured of it; one row is named so too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SETTLE_SECONDS", 1e-4)
        q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 8)).astype(np.float32)
        case = Case(f"{HOSTILE}.npz", q, k, v, 0.1, note=f"scale: {HOSTILE}")
        exact, *rows = comparison.measure(case, ["treecode", "hyper"], [16, 32], [0], repeats=1)
    # Times and the winner's error are not left to chance.
    rows = [replace(row, milliseconds=25.0 + 5 * i, speedup=100 / (25.0 + 5 * i)) for i, row in enumerate(rows)]
    rows[0] = replace(rows[0], errors=Errors(0.005, 0.013, 0.1))
    return case, [replace(exact, milliseconds=100.0), *rows, replace(rows[1], method=HOSTILE, ran=HOSTILE)]


@pytest.fixture(scope="module")
def page(measured):
    case, rows = measured
    found = verdict(case, rows, BOUND)
    return comparison_html(case, rows, this_machine(), f"numpy {HOSTILE}", 1, found, PIXEL).decode()


class Elements(HTMLParser):
    """Elements with their attributes, and text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found[-1:] and self.found[-1][0] not in ("script", "style"):
            self.text.append(data)


def said(page):
    return " ".join(" ".join(Elements(page).text).split())


def test_the_page_says_what_was_found(measured, page):
    case, rows = measured
    found = verdict(case, rows, BOUND)
    assert found.row is rows[1]
    text = said(page)
    assert text.index(found.sentence) < text.index(found.reason) < text.index("Error against time")
    assert f'<pre id="call">{html.escape(found.call, quote=False)}</pre>' in page.replace("&#34;", '"')
    for row in rows:
        assert row.setting in text
    assert re.search(r"\d % \d\S* % (yes|no) \d", text), "certified, true, within, exact rows"
    looked_at = found.looked_at
    assert f"The worst rows of {looked_at.setting}" in text
    for row in looked_at.worst_rows:
        assert f"{row.place[1]:,} of head {row.place[0]} " in text


def test_all_text_is_escaped(page):
    """Names come from files; outside of its own scripts the page has none of them as markup."""
    assert "<script>alert" not in page
    assert said(page).count(HOSTILE) >= 5
    assert [tag for tag, _ in Elements(page).found].count("script") <= 3


def test_the_page_loads_nothing(page):
    elements = Elements(page).found
    for tag, attributes in elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    (policy,) = (one["content"] for tag, one in elements if tag == "meta" and "http-equiv" in one)
    assert policy.startswith(
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    )
    assert "@import" not in "".join(re.findall(r"<style>.*?</style>", page, re.DOTALL))
    assert page.count("url(http") == 0


def test_the_curve_is_that_of_the_picture(measured):
    case, rows = measured
    found = verdict(case, rows, BOUND)
    shown = {trace.name: trace for trace in figure(rows, found).data}
    assert shown["hyper"].line.color == picture.looks(["hyper"])["hyper"][0]
    assert list(shown["hyper"].y) == [row.errors.frobenius for row in rows if row.method == "hyper"]
    assert list(shown["hyper"].x) == [row.milliseconds / 1e3 for row in rows if row.method == "hyper"]
    assert html.escape(HOSTILE) in shown
    assert rows[0].label in shown


def test_a_page_without_estimates(measured):
    case, rows = measured
    found = verdict(case, rows[:1], BOUND)
    text = said(comparison_html(case, rows[:1], this_machine(), "numpy", 1, found, PIXEL).decode())
    assert "nothing else was run" in text
    assert "worst rows" not in text


def test_a_method_keeps_its_looks_alone():
    together = picture.looks(["treecode", "sortlsh", "hyper", "kdeformer", "auto"])
    assert len(set(together.values())) == 5
    for name, look in together.items():
        assert picture.looks([name]) == {name: look}
    assert [look[0] for look in together.values()][:3] == ["#0072B2", "#D55E00", "#009E73"]


def test_a_baseline_keeps_its_looks_alone():
    pytest.importorskip("torch")
    together = picture.looks(["uniform", "treecode", "monarch"])
    assert len(set(together.values())) == 3
    assert picture.looks(["monarch"])["monarch"] == together["monarch"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.004, 0.5, ["0.005 s", "0.01 s", "0.02 s", "0.05 s", "0.1 s", "0.2 s", "0.5 s"]),
        (1e-5, 20.0, ["0.00001 s", "0.0001 s", "0.001 s", "0.01 s", "0.1 s", "1 s", "10 s"]),
        (0.1, 0.25, ["0.1 s", "0.11 s", "0.12 s", "0.13 s", "0.14 s", "0.16 s", "0.18 s", "0.2 s", "0.25 s"]),
    ],
)
def test_ticks_are_seconds(low, high, expected):
    assert [picture.seconds(tick) for tick in picture.ticks(low, high) if low * 0.999 <= tick <= high] == expected


PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement, curve = document.getElementById("curve").getBoundingClientRect();
  const boxes = [...document.querySelectorAll("#interactive .xtick text")].map(one => one.getBoundingClientRect());
  boxes.sort((a, b) => a.left - b.left);
  const level = boxes.every(box => box.width > box.height);
  parent.postMessage([
    root.clientWidth,
    root.scrollWidth - root.clientWidth,
    document.querySelectorAll("#curve .scatterlayer .trace").length,
    performance.getEntriesByType("resource").length,
    Math.max(0, curve.right - root.clientWidth),
    boxes.length,
    level ? boxes.slice(1).filter((box, i) => box.left < boxes[i].right).length : 0,
  ].map(Math.round).join(" "), "*");
}, 300));</script>"""
"""Tells its frame the width, overflow, curves, resources loaded, how far the plot stands out, numbers and overlaps."""
FRAME = """<body><iframe src="page.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe>
<script>addEventListener("message", event => { document.body.dataset.seen = event.data; });</script></body>"""
"""A window without a screen is at least 500 pixels wide; a frame can be narrower."""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_runs_the_page(tmp_path, measured, page, width):
    _, rows = measured
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=5000",
               "--dump-dom", (tmp_path / "frame.html").as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    seen = re.search(r'data-seen="([^"]*)"', dom)
    assert seen is not None
    found, overflow, curves, loaded, outside, numbers, overlaps = map(int, seen[1].split())
    assert width - 20 <= found <= width  # a bar to scroll may stand beside
    assert curves == len({row.method for row in rows}) + 2  # the bound, and the ring about the verdict
    assert (overflow, loaded, outside, overlaps) == (0, 0, 0, 0)
    assert numbers >= 2
