"""What Chromium finds wrong with built pages: ``python docs/check_pages.py docs/_build/html``.

A page must not be wider than its window, at each of `WIDTHS`; every picture must be there and have a text.
"""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (400, 800, 1400)  # pixels: a phone, a tablet, a desk
SECONDS = 300  # for all pages
CHECK = """<!doctype html><script>
async function check() {
  const found = [];
  for (const width of WIDTHS) for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style.width = width + "px";
    frame.style.height = "900px";
    frame.src = "/" + page;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    const seen = frame.contentDocument;
    const wide = seen.documentElement.scrollWidth - seen.documentElement.clientWidth;
    if (wide > 0) found.push(`${page}: ${wide} pixels wider than a window of ${width}`);
    for (const picture of width == WIDTHS[0] ? seen.images : []) {
      await picture.decode().catch(() => {});
      const name = picture.getAttribute("src").slice(0, 80);
      if (!picture.naturalWidth) found.push(`${page}: there is no picture ${name}`);
      if (!picture.alt.trim()) found.push(`${page}: the picture ${name} has no text`);
    }
    frame.remove();
  }
  await fetch("/found", { method: "POST", body: JSON.stringify(found) });
}
</script><body onload="check()">"""


class Pages(http.server.SimpleHTTPRequestHandler):
    """Serves the pages, and the page ``/check`` that looks at them and sends what it found."""

    def do_GET(self) -> None:
        """Answer with a file, or with what checks them."""
        if self.path != "/check":
            return super().do_GET()
        root = Path(self.directory)
        pages = sorted(str(page.relative_to(root)) for page in root.rglob("*.html"))
        pages = [page for page in pages if not page.startswith("_")]
        body = CHECK.replace("WIDTHS", json.dumps(WIDTHS)).replace("PAGES", json.dumps(pages)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Keep what was found."""
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_) -> None:
        """Say nothing of each request."""


def check_pages(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder, a line each.

    Raises:
      FileNotFoundError: no browser.
      TimeoutError: the browser did not come to the end.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"there is no browser here: none of {', '.join(BROWSERS)}")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Pages, directory=str(folder))
    )
    server.done = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}")
        address = f"http://127.0.0.1:{server.server_port}/check"
        command = [browser, *flags, "--remote-debugging-port=0", address]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not server.done.wait(SECONDS):
                raise TimeoutError(f"the browser did not come to the end of {folder} in {SECONDS} s")
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    return server.found


if __name__ == "__main__":
    found = check_pages(Path(sys.argv[1]))
    print("\n".join(found) or "nothing is wrong with these pages")
    sys.exit(bool(found))
