"""Markup, in which text that did not come from this code is text and nothing else.

`el` escapes every part that is not markup already, so that an unescaped text shows as a visible mistake in
the page, never as a script in it. What a model or a row says goes through `said`.
"""

import html
import json

from nanoalign.terminal import visible

VOID = {"input", "meta", "br"}


class Html(str):
    """What is markup already."""

    __slots__ = ()


def el(name: str, /, *parts, **attributes) -> Html:
    """An element. Parts: markup, text (which is escaped), lists of them, or None. Of the attributes class_
    and for_ lose their end, others have - for _; those that are None or False are left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{html.escape(visible(value))}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in VOID else f"{opened}{joined(parts)}</{name}>")


def joined(parts) -> Html:
    """Parts, nested or not → markup."""
    if parts is None:
        return Html()
    if isinstance(parts, Html):
        return parts
    if isinstance(parts, (list, tuple)):
        return Html("".join(map(joined, parts)))
    return Html(html.escape(visible(parts)))


def said(text: str, name: str = "bdi", /, **attributes) -> Html:
    """What a model or a row says: escaped, its controls visible, its direction kept to itself."""
    return el(name, str(text), **{"dir": "auto", "class_": "said", **attributes})


def data(value) -> Html:
    """A value for the page's script to read, which no text in it can end."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return el("script", Html(text), type="application/json")


def missing(what: str, command: str) -> Html:
    """A line in the place of what this folder does not hold."""
    return el("p", f"{what}: not in this folder; ", el("code", command), " makes it.", class_="missing")


def figure(*parts, caption=None, **attributes) -> Html:
    return el("figure", parts, el("figcaption", caption) if caption else None, **attributes)


def table(names: list, rows: list[list], caption: str | None = None, **attributes) -> Html:
    """A table whose first column names its rows. It scrolls by itself where it is too wide."""
    head = el("tr", [el("th", name, scope="col") for name in names])
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            [el("td", cell, data_label=name) for name, cell in zip(names[1:], row[1:])],
        )
        for row in rows
    ]
    parts = el("caption", caption) if caption else None, el("thead", head), el("tbody", body)
    inside = el("table", *parts, **attributes)
    return el("div", inside, class_="wide", tabindex="0", role="region", aria_label=caption or names[0])


def number(x: float | None, digits: int = 3) -> str:
    """So many significant digits, a minus sign, thousands apart; a dash for none."""
    if x is None or x != x:
        return "–"
    if x and abs(x) < 10 ** -(digits + 1):
        return f"{x:.1e}".replace("-", "−")
    if abs(x) >= 1000:
        return f"{x:,.0f}".replace("-", "−")
    return f"{x:.{digits}g}".replace("-", "−")


def decimals(x: float | None) -> str:
    """Two decimals, a minus sign where there is anything below 0 to show; a dash for none."""
    return "–" if x is None else f"{round(x, 2) + 0.0:.2f}".replace("-", "−")


def share(x: float | None) -> str:
    return "–" if x is None or x != x else f"{x:.0%}"


def count(n: int) -> str:
    """1,377,408 → 1.38 M"""
    return f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n:,}"
