"""A real browser without a window, for the tests of pages."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
NARROWEST = 500  # of chromium's windows; narrower pages are made so

# What does not lie as it should: text over text, things beyond the edge of the page, and what was fetched.
LAYOUT = """
const room = document.documentElement.getBoundingClientRect().width;
const shown = [...document.body.querySelectorAll("*")].filter(e => e.getClientRects().length);
for (const e of shown)
  if (!e.parentElement.closest(".film, .wide, svg") && e.getBoundingClientRect().right > room + 1)
    out.push("beyond the edge: " + e.tagName + " " + e.textContent.slice(0, 40));
const words = "h1,h2,p,td,th,figcaption,pre,button,text,.ends span";
const texts = shown.filter(e => e.matches(words) && e.textContent.trim());
const boxes = texts.map(e => [e, e.getBoundingClientRect()]);
for (const [i, [a, p]] of boxes.entries())
  for (const [b, q] of boxes.slice(i + 1)) {
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (x > 1 && y > 2 && !a.contains(b)) out.push(a.textContent.slice(0, 40) + " over " + b.textContent.slice(0, 40));
  }
for (const r of performance.getEntriesByType("resource"))
  if (!r.name.startsWith("data:")) out.push("fetched " + r.name);
for (const i of document.images) if (!i.naturalWidth) out.push("broken image " + i.src.slice(0, 60));
"""


def ask(page, script, folder, *, width=1400, dark=False):
    """What a script adds to the list `out` when a page is there; `folder` is the browser's own."""
    narrow = f"document.documentElement.style.width = '{width}px';" if width < NARROWEST else ""
    probe = (
        f"<script>onload = () => {{{narrow} const out = []; {script}; const e = document.createElement('pre');"
        "e.id = 'found'; e.textContent = out.join('\\n'); document.body.append(e)}</script>"
    )
    copy = page.with_name("probe.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom"),
        *(f"--window-size={width},1200", f"--blink-settings=preferredColorScheme={0 if dark else 1}"),
    ]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
    copy.unlink()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return [line for line in found[1].split("\n") if line]
