"""A reward model's scores of the responses in a file: the last message of every chat row.

python -m lab.score --model out/demo/rm.pt --data rows.jsonl        # → rows.scored.jsonl, with "score"
"""

import math
from dataclasses import dataclass

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_scalar
from nanoalign.files import beside
from nanoalign.rewards import model_reward, score_texts
from nanoalign.rows import read_rows, write_rows
from nanoalign.training import setup


@dataclass
class Config:
    model: str = "out/demo/rm.pt"  # the reward model
    data: str = ""  # chat rows that end with an assistant's message
    seed: int = 0  # of what may be drawn; a score needs none
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output

    @property
    def out(self) -> str:
        return str(beside(self.data, ".scored.jsonl")) if self.data else ""


def main(config: Config) -> None:
    if not config.data:
        raise UserError("name the rows to score: --data rows.jsonl.")
    device, autocast = setup(config)
    model, tokenizer, _ = load_scalar(config.model, device)
    rows = read_rows(config.data, "chat", config.skip_bad_rows, config.fields)
    if any(row["messages"][-1]["role"] != "assistant" for row in rows):
        raise UserError(f"{config.data} has conversations that do not end with an assistant's message.")
    asked = [{"prompt": row["messages"][:-1], "meta": row["meta"]} for row in rows]
    texts = [row["messages"][-1]["content"] for row in rows]
    reward, context = model_reward(model), model.config.context
    with autocast:
        scores = score_texts(reward, asked, texts, tokenizer, context, device, "score")
    known = [None if math.isnan(score) else round(score, 6) for score in scores.tolist()]
    write_rows(config.out, ({**row, "score": score} for row, score in zip(rows, known)))
    print(f"scored {len(rows):,} responses, mean {scores.nanmean():.3f} → {config.out}")
    if None in known:
        print(f"{known.count(None):,} prompts leave no room in {context} tokens: score null")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
