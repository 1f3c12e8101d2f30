"""The pages in a real browser: nothing fetched, nothing complained of, nothing too wide, films that play."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from typing import Any

import pytest
from kept_run import W2, kept_run
from waiting import HANG_S

from qsam2.report.compare import render_comparison
from qsam2.report.page import render

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--no-first-run", "--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom",
)  # fmt: skip
WIDTHS = {"desktop": 1280, "phone": 390}

# Shows each page in a frame of each width and, once all have loaded, writes down what became of them.
PROBE = """<!doctype html><title>probe</title><style>iframe { border: 0 }</style><pre id="found"></pre>FRAMES
<script>
window.onload = () => {
  const seen = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const inner = frame.contentDocument, root = inner.documentElement;
    seen[frame.id] = {
      title: inner.title,
      width: root.clientWidth,
      needed: root.scrollWidth,
      resources: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      tables: [...inner.querySelectorAll("main > section > .wide")].map(
        table => [table.getAttribute("aria-label"), table.scrollWidth - table.clientWidth]),
      charts: [...inner.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height),
      pictures: [...inner.querySelectorAll("main figure > img")].map(image => image.naturalWidth),
      films: [...inner.querySelectorAll("video")].map(
        film => ({error: film.error && film.error.message, seconds: film.duration, width: film.videoWidth})),
      plays: inner.createElement("video").canPlayType('video/mp4; codecs="avc1.42E01E"'),
      textSizes: [...new Set([...inner.querySelectorAll("p, td, th, figcaption")].map(
        element => parseFloat(getComputedStyle(element).fontSize)))],
    };
  }
  document.getElementById("found").textContent = JSON.stringify(seen);
};
</script>"""
W8 = {"quantize": {part: {"method": "minmax", "bits": 8, "range": "mse"} for part in ("weights", "activations")}}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Measurements of each page at each width in the browser, and the browser's log."""
    if not BROWSER:
        pytest.skip("no chromium or google-chrome is installed: pages are not opened in a browser")
    folder = tmp_path_factory.mktemp("browser")
    qat, ptq = kept_run(folder / "qat"), kept_run(folder / "ptq", W2)
    third = kept_run(folder / "nano_w8a8_least_error", W8)
    pages = {"run": render(qat), "comparison": render_comparison([qat, ptq, third])}
    frames = []
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
        frames += [
            f'<iframe id="{name}-{device}" src="{name}.html" style="width: {width}px; height: 900px"></iframe>'
            for device, width in WIDTHS.items()
        ]
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("FRAMES", "".join(frames)), encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", probe.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    found = re.search(r'<pre id="found">(.+?)</pre>', ran.stdout, re.DOTALL)
    assert found, ran.stderr[-3000:]
    return json.loads(html.unescape(found[1])), ran.stderr


def test_nothing_is_fetched_or_complained_of(seen: tuple[dict[str, Any], str]) -> None:
    pages, log = seen
    assert len(pages) == 4
    assert {name: page["resources"] for name, page in pages.items()} == {name: [] for name in pages}
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []


def test_pages_fit_the_screen_and_show_charts_and_pictures(seen: tuple[dict[str, Any], str]) -> None:
    pages = seen[0]
    for name, page in pages.items():
        assert page["needed"] <= page["width"] <= WIDTHS[name.split("-")[1]], name
    assert len(pages["run-phone"]["charts"]) == 7 and len(pages["comparison-desktop"]["charts"]) == 2
    for page in pages.values():  # no table needs to be scrolled
        assert page["tables"] and all(beyond <= 0 for _, beyond in page["tables"]), page["tables"]
    assert all(height > 100 for page in pages.values() for height in page["charts"])
    assert pages["run-desktop"]["pictures"] == [640] * 2
    assert all(size >= 12 for page in pages.values() for size in page["textSizes"])


def test_films_play(seen: tuple[dict[str, Any], str]) -> None:
    page = seen[0]["run-desktop"]
    if not page["plays"]:
        pytest.skip("this browser plays no H.264")
    assert page["films"] == [{"error": None, "seconds": pytest.approx(0.8, abs=0.2), "width": 640}]
