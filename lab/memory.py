"""draft"""
import json, os, subprocess, sys, tempfile
from pathlib import Path
import torch
from nanoalign.model import GPT, GPTConfig
from nanoalign.scalar import ScalarGPT
from nanoalign.checkpoint import save
from nanoalign.tokenizer import get_tokenizer

WORDS = "the tea is hot and we like it so much".split()
LLAMA = GPTConfig(context=512, layers=4, width=512, heads=8)
SLIM = GPTConfig(context=1024, layers=8, width=256, heads=4, kv_heads=2)
GPT2 = GPTConfig(context=512, layers=6, width=512, heads=8, norm="layernorm", positions="learned", mlp="gelu", bias=True)
WIDE = GPTConfig(vocab_size=50257, context=512, layers=2, width=320, heads=5)
SHAPES = {"llama": LLAMA, "slim": SLIM, "gpt2": GPT2, "wide": WIDE}

CASES = {  # name: script, shape, flags
    "pretrain llama": ("pretrain", "llama", "--context 256 --batch-size 16"),
    "sft llama micro": ("sft", "llama", "--batch-size 32 --micro-batch 8 --max-length 256"),
    "sft slim": ("sft", "slim", "--batch-size 16 --max-length 512"),
    "sft slim ckpt": ("sft", "slim", "--batch-size 16 --max-length 512 --checkpointing"),
    "sft gpt2": ("sft", "gpt2", "--batch-size 16 --max-length 256"),
    "sft wide": ("sft", "wide", "--batch-size 8 --max-length 256"),
    "rm llama": ("rm", "llama", "--batch-size 8 --max-length 256"),
    "rm slim noreader": ("rm", "slim", "--batch-size 8 --max-length 512 --no-reader"),
    "dpo llama": ("dpo", "llama", "--batch-size 8 --max-length 256 --max-new-tokens 16"),
    "dpo slim micro": ("dpo", "slim", "--batch-size 16 --micro-batch 4 --max-length 512 --max-new-tokens 16"),
    "dpo wide": ("dpo", "wide", "--batch-size 8 --max-length 256 --max-new-tokens 16"),
    "kto gpt2": ("kto", "gpt2", "--batch-size 16 --max-length 256"),
    "orpo slim": ("orpo", "slim", "--batch-size 8 --max-length 512"),
    "ppo llama": ("ppo", "llama", "--batch-size 32 --minibatch 16 --max-new-tokens 64"),
    "ppo slim micro": ("ppo", "slim", "--batch-size 32 --minibatch 16 --micro-batch 8 --max-new-tokens 64 --shared-critic"),
    "grpo gpt2": ("grpo", "gpt2", "--batch-size 32 --minibatch 16 --group-size 8 --max-new-tokens 64"),
    "grpo wide": ("grpo", "wide", "--batch-size 32 --minibatch 16 --group-size 8 --max-new-tokens 32"),
    "prm llama": ("prm", "llama", "--batch-size 16 --max-length 256"),
}

def said(number, count):
    return " ".join(WORDS[(number * 7 + i * (1 + number % 3)) % 10] for i in range(count))

def write(folder):
    def lines(name, rows): Path(folder, name).write_text("\n".join(map(json.dumps, rows)))
    n = 64
    p = lambda i: said(i, 100 + 10 * (i % 4))
    lines("chats.jsonl", [{"prompt": p(i), "completion": said(i + 1, 100)} for i in range(n)])
    lines("texts.jsonl", [{"text": said(i, 600)} for i in range(n)])
    lines("pairs.jsonl", [{"prompt": p(i), "chosen": said(i + 1, 100), "rejected": said(i + 2, 90)} for i in range(n)])
    lines("labelled.jsonl", [{"prompt": p(i), "completion": said(i + 1, 100), "label": i % 2 == 0} for i in range(n)])
    lines("prompts.jsonl", [{"prompt": p(i), "meta": {}} for i in range(n)])
    lines("steps.jsonl", [{"prompt": p(i), "completions": [said(i + k, 30) for k in range(3)], "labels": [1, 1, i % 2], "label": i % 2 == 1} for i in range(n)])

def models(folder, name):
    import train_sft
    torch.manual_seed(0)
    shape = SHAPES[name]
    tok = get_tokenizer("r50k_base" if shape.vocab_size > 5000 else "world")
    from dataclasses import replace
    policy = GPT(replace(shape, vocab_size=tok.vocab_size))
    save(f"{folder}/{name}.pt", policy, tokenizer=tok, config=train_sft.Config(), stage="sft", step=0)
    rm = ScalarGPT.from_policy(policy, name != "gpt2")
    save(f"{folder}/{name}-rm.pt", rm, tokenizer=tok, config=train_sft.Config(), chat=False, stage="rm", step=0, normalisation={"mean": 0.0, "std": 1.0})

DATA = {"pretrain": "texts", "sft": "chats", "rm": "pairs", "dpo": "pairs", "orpo": "pairs", "kto": "labelled", "prm": "steps"}
WATCHED = """
import atexit, runpy, sys
atexit.register(lambda: print("peak_kb", [l.split()[1] for l in open("/proc/self/status") if l[:5] == "VmHWM"][0]))
sys.argv.pop(0)
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
def command(folder, script, shape, flags):
    c = [f"train_{script}.py", "--out", f"{folder}/out-{script}.pt", "--steps", "2", "--warmup", "1", "--eval-every", "1000", "--device", "cpu", *flags.split()]
    if script == "pretrain":
        c += ["--data", f"{folder}/texts.jsonl"]
    elif script in ("ppo", "grpo"):
        c += ["--init", f"{folder}/{shape}.pt", "--reward", f"{folder}/{shape}-rm.pt", "--prompts", f"{folder}/prompts.jsonl", "--eval-prompts", "4", "--doctor", ""]
    else:
        c += ["--init", f"{folder}/{shape}.pt", "--data", f"{folder}/{DATA[script]}.jsonl"]
    if script=="pretrain": c += ["--model", "world-large"]
    return c

def run(command):
    done = subprocess.run([sys.executable, "-c", WATCHED, *command], capture_output=True, text=True)
    if done.returncode: print(done.stdout[-2000:], done.stderr[-2000:]); return 0, ""
    peak = [int(l.split()[1]) / 1024 for l in done.stdout.splitlines() if l.startswith("peak_kb")][0]
    return peak, done.stdout

if __name__ == "__main__":
    import time
    folder = "/tmp/me/mem/w"
    if not os.path.exists(folder + "/wide-rm.pt"):
        write(folder)
        for name in SHAPES: models(folder, name)
    for name, (script, shape, flags) in CASES.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name: continue
        t=time.time()
        peak, out = run(command(folder, script, shape, flags))
        said_ = [l for l in out.splitlines() if l.startswith("memory")]
        print(f"{name:20} peak {peak:.0f}  ({time.time()-t:.0f} s)", *said_, flush=True)
