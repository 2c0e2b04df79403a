"""The page's script in a real browser: a click sorts a table, a mark tells about itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from plop_dist.report import write_report
from plop_dist.rundir.layout import RunDir
from tests.report.test_hostile_page import CHROMIUM
from tests.report.test_report import make_run

# Ends the page with what it finds; the page's own policy, which lets no other script run, is taken out for it.
PROBE = """<script>
const found = [], table = document.querySelector("table.modules");
const column = (index) => [...table.tBodies[0].rows].map((row) => row.cells[index].textContent).join("|");
const buttons = [...table.querySelectorAll("th button")];
for (const click of [3, 3, 0, 9]) { buttons[click].click(); found.push(column(click)); }
document.querySelector("figure rect.q0").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
found.push(document.querySelector(".tip").textContent.replaceAll("\\n", "|"));
document.documentElement.innerHTML = `<head></head><body><pre>${found.join("\\n")}</pre></body>`;
</script></body>"""


@pytest.mark.rare
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_clicks_sort_and_marks_tell(tmp_path: Path) -> None:
    text = write_report(RunDir(make_run(tmp_path / "run"))).read_text()
    page = tmp_path / "page.html"
    page.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", PROBE))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert body is not None, done.stderr[-2000:]
    up, down, names, ranks, tip = (line.split("|") for line in body[1].split("\n"))
    numbers = [float(cell) for cell in up]
    assert numbers == sorted(numbers)
    assert down == up[::-1]
    assert names == sorted(names)
    assert ranks == ["16"] * 9 + ["-"] * 12
    assert re.match(r"NFN 0\.\d{4} = gain", tip[1])
