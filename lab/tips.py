"""A task that a program can check: three short tips, numbered, one a line, and nothing else.

python -m lab.tips --out out/real/tips.jsonl           # prompts, for train_grpo.py, evaluate.py, …
… --reward lab/tips.py:form                            # how much of that form an answer has, 0 to 1
… --reward lab/tips.py:exact                           # 1 if it has all of it, else 0
"""

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
    "Give me three short tips for {}: numbered 1. to 3., one a line, and nothing else.",
    "How do I get better at {}? Answer with three numbered lines and nothing else.",
    "Three tips for {}, please. Only a numbered list, one short line for each.",
)
WORDS = 20  # in a line, at most


@dataclass
class Config:
    out: str = "out/real/tips.jsonl"  # the prompts


def share(text: str, ended: bool) -> float:
    """A quarter for each tip that is in its place, and one for nothing beside them, the end included."""
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    right = sum(is_tip(line, number) for number, line in enumerate(lines[:3], start=1))
    alone = ended and len(lines) == right == 3 and len({line[3:] for line in lines}) == 3
    return (right + alone) / 4


def is_tip(line: str, number: int) -> bool:
    return line.startswith(f"{number}. ") and 2 <= len(line.split()) - 1 <= WORDS


def form(rows: list[dict], texts: list[str], ended: list[bool]) -> list[float]:
    return list(map(share, texts, ended))


def exact(rows: list[dict], texts: list[str], ended: list[bool]) -> list[float]:
    return [float(share(text, done) == 1) for text, done in zip(texts, ended)]


def prompts() -> list[dict]:
    topics = [" ".join(topic.split()) for topic in TOPICS.split(";")]
    return [{"prompt": how.format(topic), "meta": {"kind": "tips"}} for topic in topics for how in ASKED]


def main(config: Config) -> None:
    rows = prompts()
    write_rows(config.out, rows)
    print(f"{len(rows)} prompts → {config.out}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
