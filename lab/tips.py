"""A task that a program can check: three tips, each on a line of its own that begins with a dash.

python -m lab.tips --out out/real/tips.jsonl          # prompts, for train_grpo.py, evaluate.py …
… --reward lab/tips.py:three_tips                      # 1 for an answer of just that form, else 0
"""

import re
from dataclasses import dataclass

from nanoalign import cli
from nanoalign.rows import write_rows

TOPICS = """
sleeping well; saving water; learning a language; growing tomatoes; writing a letter; packing a
suitcase; baking bread; staying calm; remembering names; reading more books; saving money; walking a
dog; washing a car; keeping a diary; making new friends; cleaning a kitchen; cooking rice; running a
first race; playing the piano; drawing a face; taking good photos; feeding birds in winter; keeping
houseplants alive; repairing a bicycle; planning a picnic; giving a speech; sharing a flat; finding
a lost key; driving in snow; camping in the rain; eating more vegetables; drinking less coffee;
choosing a present; moving house; looking after a cat; building a sandcastle; brewing tea; swimming
in the sea; sewing on a button; ironing a shirt; folding a map; telling a story; singing in a choir;
learning to juggle; organising a bookshelf; studying for an exam; taking notes; asking for help;
working from home; typing faster; waking up early; spending less time online; welcoming a guest;
riding a horse; climbing a hill; watching the stars; painting a wall; fixing a leaking tap; sorting
waste; saving electricity; buying a used car; making soup; cutting onions; peeling potatoes; carving
a pumpkin; decorating a cake; setting a table; ordering wine; catching a train; travelling with
children; finding cheap flights; visiting a museum; learning history dates; playing chess; losing
gracefully; apologising; saying no; listening well; writing a poem; making a paper plane; hanging a
picture; airing a room; treating a cold; avoiding sunburn; caring for your teeth; lifting heavy
boxes; sitting at a desk; resting your eyes; stretching in the morning; planting a tree; mowing a
lawn; composting leaves; keeping bees; fishing from a pier; rowing a boat; skating on ice; throwing
a frisbee; flying a kite; knitting a scarf
"""
ASKED = (
    "Give me three short tips for {}. Put each on its own line, beginning with a dash.",
    "How do I get better at {}? Answer with a list of three lines that begin with a dash.",
    'Write exactly three tips for {}, one a line, each line starting with "- ".',
)
TIP = re.compile(r"- \S[^\n]*")


@dataclass
class Config:
    out: str = "out/real/tips.jsonl"  # the prompts


def three_tips(rows: list[dict], texts: list[str], ended: list[bool]) -> list[float]:
    """1.0 where a response is three lines, each "- " and a text of its own, and has ended; else 0.0."""
    return [float(done and is_list(text)) for text, done in zip(texts, ended)]


def is_list(text: str) -> bool:
    lines = [line.strip() for line in text.strip().split("\n")]
    return len(set(lines)) == len(lines) == 3 and all(map(TIP.fullmatch, lines))


def prompts() -> list[dict]:
    topics = [" ".join(topic.split()) for topic in TOPICS.split(";")]
    return [{"prompt": how.format(topic), "meta": {"kind": "tips"}} for topic in topics for how in ASKED]


def main(config: Config) -> None:
    rows = prompts()
    write_rows(config.out, rows)
    print(f"{len(rows)} prompts → {config.out}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
