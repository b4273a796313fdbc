"""A page in a real browser, without network: how wide it is, and what its own script counts."""

import re
import subprocess
from pathlib import Path


def measured(html: str, width: int, folder: Path) -> tuple[int, str]:
    """Draw a page in a frame and read back through the title of a page around it.

    Headless chromium prints that page's DOM.

    Args:
        html: the page; it has an element ``count``.
        width: of the frame, CSS pixels.
        folder: for the files of both pages and the browser's profile.

    Returns:
        The width that the page would scroll to, and the text of ``count``.
    """
    framed = folder / "framed.html"
    measure = (
        "onload = () => { const page = frames[0].document;"
        " document.title = [page.documentElement.scrollWidth,"
        " page.getElementById('count').textContent].join('|'); }"
    )
    (folder / "inner.html").write_text(html, encoding="utf-8")
    framed.write_text(
        f'<body><iframe src="inner.html" style="border:0;width:{width}px;height:900px"></iframe>'
        f"<script>{measure}</script>"
    )
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={folder / 'chromium'}",
        "--window-size=1400,1000", "--dump-dom", framed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    scroll_width, count = title.split("|")
    return int(scroll_width), count
