"""Talk to a checkpoint: several turns, streaming. /reset forgets the conversation, /quit (or Ctrl-D) leaves.

python chat.py --checkpoint out/demo/dpo.pt
echo "What is the capital of Japan?" | python chat.py
"""

import sys
from dataclasses import dataclass

import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.generate import stream
from nanoalign.seeds import derived_seed
from nanoalign.terminal import visible
from nanoalign.training import setup


@dataclass
class Config:
    checkpoint: str = "out/demo/dpo.pt"  # whom to talk to; a base checkpoint continues your text
    system: str = ""  # a system message to open with
    max_new_tokens: int = 128  # length limit of an answer
    temperature: float = 0.7  # of sampling; 0: greedy
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 0.95  # sample from the likeliest tokens that together have this probability
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …


def fit(messages: list[dict], tokenizer, plain: bool, limit: int):
    """Prompt ids of at most `limit` tokens; forgets the oldest exchanges, no system message, to fit."""
    alone = [m for m in messages[:-1] if m["role"] == "system"] + messages[-1:]
    if (length := len(tokenizer.prompt(alone, plain))) > limit:
        raise UserError(f"that message is {length} tokens; at most {limit} fit. Say it shorter.")
    while len(ids := tokenizer.prompt(messages, plain)) > limit:
        first = next(i for i, m in enumerate(messages) if m["role"] != "system")
        print("(forgetting the oldest exchange: the context is full)", file=sys.stderr)
        del messages[first : first + 2]
    return ids


def say(policy, tokenizer, ids, config: Config, seed: int, device, autocast) -> str:
    """Stream an answer to the terminal → its text."""
    written, shown = [], ""
    prompt, lengths = torch.from_numpy(ids)[None].to(device), torch.tensor([len(ids)], device=device)
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "seed": seed}
    with autocast:
        for _, token, _, alive in stream(
            policy, prompt, lengths, config.max_new_tokens, tokenizer.end, **sampling
        ):
            if not alive.item() or token.item() == tokenizer.end:
                break
            written.append(token.item())
            text = tokenizer.decode_response(written)
            if not text.endswith("�"):  # a character may be spread over several tokens
                print(visible(text[len(shown) :]), end="", flush=True)
                shown = text
    print()
    return shown


def main(config: Config) -> None:
    if not sys.stdin:
        raise UserError("there is nobody to talk to: standard input is closed.")
    device, autocast = setup(config)
    policy, tokenizer, checkpoint = load_policy(config.checkpoint, device)
    plain = not checkpoint["chat"]
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages, turn, interactive = list(opening), 0, sys.stdin.isatty()
    limit = policy.config.context - min(config.max_new_tokens, policy.config.context // 2)
    print(visible(f"{config.checkpoint} ({checkpoint['stage']}). /reset forgets, /quit leaves."))
    while True:
        try:
            text = input("you: " if interactive else "").strip()
        except EOFError:
            break
        if text == "/quit":
            break
        if text == "/reset":
            messages = list(opening)
        if text in ("/reset", ""):
            continue
        messages.append({"role": "user", "content": text})
        try:
            ids = fit(messages, tokenizer, plain, limit)
        except UserError as error:
            print(f"({error})", file=sys.stderr)
            messages.pop()
            continue
        print(f"{'model: ' if interactive else ''}", end="")
        answer = say(
            policy, tokenizer, ids, config, derived_seed(config.seed, "turn", turn), device, autocast
        )
        messages.append({"role": "assistant", "content": answer})
        turn += 1


if __name__ == "__main__":
    if sys.stdin:  # None where it is closed
        sys.stdin.reconfigure(errors="replace")  # piped text need not be UTF-8
    cli.run(main, Config, __doc__)
