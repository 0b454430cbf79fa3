"""The report's pictures in docs/report/, by a headless browser (make browser brings one).

    python -m lab.screenshots --report out/demo/report.html

pipeline.png and pipeline-dark.png, which README shows; summary, curves, samples, tokens, hacking and
explorers, in light or dark; and phone.png, at 360 pixels. Of each the 256 commonest colours are kept: a
picture of lines and letters is half as large then, or less.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.browser import Browser
from nanoalign import UserError, cli
from nanoalign.files import writing

# name: (width, dark, from this element, to the end of this one)
PICTURES = {
    "pipeline": (1200, False, "#pipeline", "#pipeline"),
    "pipeline-dark": (1200, True, "#pipeline", "#pipeline"),
    "summary": (1200, False, "header.top", "#summary"),
    "curves": (1200, False, "#run-ppo", "#run-ppo > .grid"),
    "samples": (1200, True, "#answers", "#answers .sample:not([hidden])"),
    "tokens": (1200, False, "#tokens", "#tokens-dpo"),
    "hacking": (1200, True, "#hacking", "#hacking"),
    "explorers": (1200, False, "#explore-dpo", "#explore-dpo"),
    "phone": (360, False, "#run-dpo", "#run-dpo > .grid > figure:nth-child(2)"),
}
CLIP = """(() => {
  const [first, last] = %r.map((name) => document.querySelector(name).getBoundingClientRect());
  const y = Math.floor(first.top + scrollY);
  return { x: 0, y, width: %d, height: Math.ceil(last.bottom + scrollY) - y + 16 };
})()"""


def palette(pixels: np.ndarray) -> bytes:
    """Pixels (height, width, 3) → a PNG file of their 256 commonest colours; others become the nearest."""
    flat = pixels.reshape(-1, 3).astype(np.int64)
    codes, inverse, counts = np.unique(flat @ (65536, 256, 1), return_inverse=True, return_counts=True)
    colours = np.stack((codes >> 16, codes >> 8 & 255, codes & 255), 1)
    kept = colours[np.argsort(-counts)[:256]]
    nearest = [((kept - colour) ** 2).sum(1).argmin() for colour in colours]
    index = np.array(nearest, np.uint8)[inverse].reshape(pixels.shape[:2])
    rows = np.concatenate((np.zeros((len(index), 1), np.uint8), index), 1).tobytes()  # filter 0 before each
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    parts = {
        b"IHDR": head,
        b"PLTE": kept.astype(np.uint8).tobytes(),
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@dataclass
class Config:
    report: str = "out/demo/report.html"  # the page
    folder: str = "docs/report"  # where the pictures go


def main(config: Config) -> None:
    if not Path(config.report).is_file():
        raise UserError(f"there is no {config.report}; make report writes it.")
    browser = Browser()
    try:
        for name, (width, dark, first, last) in PICTURES.items():
            browser.open(config.report, width, 900, dark, still=True)
            clip = browser.run(CLIP % ([first, last], width))
            path = Path(config.folder) / f"{name}.png"
            with writing(path, "wb") as file:
                file.write(palette(browser.pixels(browser.picture(clip))))
            print(f"{path}: {width} × {clip['height']}, {path.stat().st_size / 1000:.0f} kB")
    finally:
        browser.close()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
