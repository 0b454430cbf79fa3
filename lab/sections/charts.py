"""Small line charts as SVG, coloured by the page's style. A plot lies where report.js expects it to."""

import math
from dataclasses import dataclass

from lab.sections.page import Html, el, number
from lab.sections.runs import spaced

LEFT, TOP, WIDE, HIGH = 44, 12, 288, 148
SIZE = f"0 0 {LEFT + WIDE + 10} {TOP + HIGH + 30}"
MOST = 240  # points of a line


@dataclass
class Line:
    xs: list[float]
    ys: list[float]
    kind: str = ""  # of the style: "", "second", "third", "dashed"
    name: str = ""
    dots: bool = False  # a dot a point, as of the few looks at held-out rows


@dataclass
class Band:
    xs: list[float]
    low: list[float]
    high: list[float]
    dots: bool = False  # of held-out looks: whiskers


def finite(values) -> list[float]:
    return [x for x in values if x is not None and math.isfinite(x)]


def thinned(line: Line) -> Line:
    """At most `MOST` points, the first and the last among them."""
    kept = spaced(len(line.xs), MOST)
    return Line([line.xs[i] for i in kept], [line.ys[i] for i in kept], line.kind, line.name, line.dots)


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers within [low, high], `most` at most."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * m for m in (1, 2, 2.5, 5, 10, 20) if span / (step * m) < most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    lines: list[Line],
    bands: list[Band] = (),
    x_label: str = "step",
    label: str = "",
    within: tuple[float, float] | None = None,
    x_ticks: list[float] | None = None,
) -> Html:
    """Lines over bands → an svg. label: what a screen reader says. within: what y must show at least."""
    lines = [thinned(line) for line in lines if finite(line.ys)]
    xs = finite(x for part in (*lines, *bands) for x in part.xs)
    ys = finite(y for line in lines for y in line.ys)
    ys += [y for band in bands for y in finite([*band.low, *band.high])]
    ys += within or ()
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    if high - low < 1e-9 * max(1, abs(high)):
        low, high = low - 0.5, high + 0.5
    room = 0.04 * (high - low)
    low, high, right = low - room, high + room, right if right > left else left + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * WIDE
        return round(across, 1), round(TOP + (1 - (y - low) / (high - low)) * HIGH, 1)

    parts = []
    for y in ticks(low, high):
        at = place(left, y)[1]
        parts.append(el("line", class_="grid", x1=LEFT, x2=LEFT + WIDE, y1=at, y2=at))
        parts.append(el("text", number(y), class_="tick end", x=LEFT - 5, y=at + 3))
    for x in x_ticks or ticks(left, right, 5):
        parts.append(el("text", number(x), class_="tick middle", x=place(x, low)[0], y=TOP + HIGH + 16))
    parts.append(el("text", x_label, class_="tick end", x=LEFT + WIDE, y=TOP + HIGH + 29))
    parts += [drawn_band(band, place) for band in bands]
    parts += [drawn_line(line, place) for line in lines]
    shown = {"class_": "chart", "viewBox": SIZE, "role": "img", "aria_label": label or x_label}
    return el("svg", parts, data_left=number(left, 6), **shown)


def drawn_band(band: Band, place) -> Html:
    """An area, or of single looks a whisker each."""
    rows = list(zip(band.xs, band.low, band.high))
    if band.dots:
        ends = [(place(x, low), place(x, high)) for x, low, high in rows]
        return Html(
            "".join(el("line", class_="whisker", x1=a[0], x2=b[0], y1=a[1], y2=b[1]) for a, b in ends)
        )
    edge = [place(x, high) for x, _, high in rows] + [place(x, low) for x, low, _ in reversed(rows)]
    return el("polygon", class_="band", points=" ".join(f"{x:g},{y:g}" for x, y in edge))


def drawn_line(line: Line, place) -> Html:
    points = [place(x, y) for x, y in zip(line.xs, line.ys) if y is not None and math.isfinite(y)]
    path = el(
        "polyline", class_=f"line {line.kind}".strip(), points=" ".join(f"{x:g},{y:g}" for x, y in points)
    )
    marks = [el("circle", class_=f"dot {line.kind}".strip(), cx=x, cy=y, r=2.6) for x, y in points]
    return Html(path + "".join(marks) if line.dots or len(points) == 1 else path)


def legend(lines: list[Line], band: str = "") -> Html:
    """What the lines and the band are."""
    items = [
        el("li", el("span", class_=f"key {line.kind}".strip()), line.name) for line in lines if line.name
    ]
    items += [el("li", el("span", class_="key area"), band)] if band else []
    return el("ul", items, class_="legend")
