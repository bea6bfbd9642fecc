"""Remakes the README's pictures of the studio from the embedded checkpoint: assets/gallery/studio-*.webp.

python assets/make_studio_pictures.py      # needs the test requirements and Chromium
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from playwright.sync_api import sync_playwright

from common.files import PROJECT_ROOT
from common.pictures import encode_image
from models.checkpoints import EMBEDDED_CHECKPOINT

OUT = Path(__file__).with_name("gallery")
PROMPTS = ("a woman in a yellow dress", "a man in a red hoodie and blue jeans")
SIZES = {"1440": (1440, 900), "390": (390, 844)}
GRAPHICS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
LONGEST = 600_000  # milliseconds that a texture may take
WORN = "count => document.querySelectorAll('#gallery li').length === count && !document.querySelector('#make').disabled"


def main():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "studio.py", "--checkpoint", EMBEDDED_CHECKPOINT, "--port", "0", "--out", folder]
        with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as studio:
            try:
                with sync_playwright() as driver:
                    take_pictures(driver, studio.stdout.readline().split()[0])
            finally:
                studio.terminate()
                studio.communicate()  # its last words, or it would find nobody there


def take_pictures(driver, address: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    page = driver.chromium.launch(executable_path=chromium, args=GRAPHICS).new_page()
    page.set_default_timeout(LONGEST)
    page.goto(address)
    page.check("input[value=same]")
    for number, prompt in enumerate(PROMPTS, 1):
        page.fill("#prompt", prompt)
        page.click("#make")
        page.wait_for_function(WORN, arg=number)
        page.wait_for_function("() => document.querySelector('#body').dataset.shows")
    page.wait_for_timeout(2000)  # the body wears it
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("scrollTo(0, 0)" if name == "1440" else "document.querySelector('#stage').scrollIntoView()")
        page.wait_for_timeout(500)
        with Image.open(io.BytesIO(page.screenshot())) as picture:
            (OUT / f"studio-{name}.webp").write_bytes(encode_image(picture, format="WEBP", quality=85))


if __name__ == "__main__":
    main()
