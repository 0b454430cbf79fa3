"""After deployment: what lab/monitor.py makes of the conversations that chat.py has kept."""

from pathlib import Path

from lab import monitor
from lab.sections.page import Html, el, missing, said, table
from nanoalign import UserError


def section(folder: Path) -> Html:
    head, path = el("h2", "After deployment"), folder / "chats.monitor.json"
    lead = el("p", "What people asked, what the model said, and what they thought of it.", class_="lead")
    command = f"python chat.py --checkpoint {folder}/ppo.pt --log {folder}/chats.jsonl, then "
    command += f"python -m lab.monitor {folder}/chats.jsonl"
    nothing = el("section", head, lead, missing("chats.monitor.json", command), id="deployment")
    try:
        shown = monitor.section(str(path)) if path.is_file() else None
    except UserError:
        shown = None
    if not shown:
        return nothing
    rows = [[row[0], *row[1:]] for row in shown["rows"]]
    listed = table([shown["header"][0] or "metric", *shown["header"][1:]], rows, class_="stack")
    meanings = [part for name, text in shown["meaning"].items() for part in (el("dt", name), el("dd", text))]
    notes = [el("p", said(note, "span")) for note in shown["notes"]]
    words = el("dl", meanings, class_="story")
    return el("section", head, lead, el("h3", shown["title"]), notes, listed, words, id="deployment")
