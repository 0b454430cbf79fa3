"""Talk to a checkpoint: several turns, streaming. /reset forgets the conversation, /quit (or Ctrl-D) leaves.

python chat.py --checkpoint out/demo/dpo.pt --log chats.jsonl   # keeps answers; /good and /bad label the last
python chat.py --gate out/demo/rm.pt:-1.5   # what scores less is held back (docs/deployment.md)
"""

import sys
from dataclasses import dataclass

import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.deployment import Log, make_gate
from nanoalign.files import check_outputs
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
    top_p: float = 0.95  # sample from the likeliest tokens of this probability together
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …
    log: str = ""  # keep every answer here; /good and /bad label the last
    gate: str = ""  # hold back by rm.pt:THRESHOLD (what scores less) or file.py:function

    also_written = ("log",)

    def outputs(self) -> list[str]:
        return []  # none to lock: chats may share a log


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


def say(policy, tokenizer, ids, config: Config, seed: int, device, autocast) -> tuple[str, bool]:
    """An answer → its text, and whether it ended by itself; streamed to the terminal, but for a gate."""
    written, shown, ended = [], "", False
    prompt, lengths = torch.from_numpy(ids)[None].to(device), torch.tensor([len(ids)], device=device)
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "seed": seed}
    with autocast:
        tokens = stream(policy, prompt, lengths, config.max_new_tokens, tokenizer.end, **sampling)
        for _, token, _, alive in tokens:
            if ended := not alive.item() or token.item() == tokenizer.end:
                break
            written.append(token.item())
            text = tokenizer.decode_response(written)
            if not text.endswith("�"):  # a character may be spread over several tokens
                if not config.gate:
                    print(visible(text[len(shown) :]), end="", flush=True)
                shown = text
    print(end="" if config.gate else "\n")
    return shown, ended


def typed(log: Log, interactive: bool):
    """Lines and /reset, until /quit or the end."""
    while True:
        try:
            text = input("you: " if interactive else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text in ("/good", "/bad"):
            print(f"({log.rate(text == '/good')})")
        elif text[:1] == "/" and text != "/reset":
            print("(there are /good, /bad, /reset and /quit)")
        elif text:
            yield text


def main(config: Config) -> None:
    if not sys.stdin:
        raise UserError("there is nobody to talk to: standard input is closed.")
    check_outputs(config, [config.log] if config.log else [])
    device, autocast = setup(config)
    policy, tokenizer, checkpoint = load_policy(config.checkpoint, device)
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages, interactive = list(opening), sys.stdin.isatty()
    limit = (context := policy.config.context) - min(config.max_new_tokens, context // 2)
    gate = make_gate(config.gate, tokenizer, device, context)
    print(visible(f"{config.checkpoint} ({checkpoint['stage']}). /reset forgets, /quit leaves."))
    with Log(config.log, config.checkpoint) as log:
        for text in typed(log, interactive):
            if text == "/reset":
                messages = list(opening)
                log.reset()
                continue
            messages.append({"role": "user", "content": text})
            try:
                ids = fit(messages, tokenizer, not checkpoint["chat"], limit)
            except UserError as error:
                print(f"({error})", file=sys.stderr)
                messages.pop()
                continue
            print("model: " if interactive else "", end="")
            seed = derived_seed(config.seed, "turn", log.turn)
            answer, ended = say(policy, tokenizer, ids, config, seed, device, autocast)
            held = gate(messages, answer, ended)
            if config.gate:
                print(f"(held back, the question forgotten: {held})" if held else visible(answer))
            log.add(messages, answer, ended, held)
            if held:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    if sys.stdin:  # None where it is closed
        sys.stdin.reconfigure(errors="replace")  # piped text need not be UTF-8
    cli.run(main, Config, __doc__)
