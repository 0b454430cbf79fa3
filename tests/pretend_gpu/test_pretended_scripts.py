"""What samples, scores and talks, on a pretended GPU: the same answers as on a CPU, in fp32 to rounding."""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wires
from runs import WORLD, write_lines
from wires import asked

if torch.version.cuda is None:
    pytest.skip("torch is a CPU build: make pretend-gpu installs the other", allow_module_level=True)

from pretended import CUDA, GPUTensor, pretended_gpu

import best_of_n
import chat
import collect
import critique
import evaluate
from nanoalign import generate as sampler
from nanoalign import kernels
from nanoalign.checkpoint import load_policy, load_scalar, save
from nanoalign.generate import CHECK_EVERY, generate
from nanoalign.kernels import linear_logprobs, linear_losses
from nanoalign.logprobs import token_logprobs
from nanoalign.model import GPT
from nanoalign.packing import packed_hidden
from nanoalign.rewards import make_reward, score_texts


def same(a, b) -> None:
    """Equal, numbers to rounding."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = [*a.values()], [*b.values()]
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    else:
        assert a == (pytest.approx(b, abs=1e-4, rel=1e-3, nan_ok=True) if isinstance(a, float) else b)


def number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def read(path: str):
    """A file of results: JSON, rows of it, or a table."""
    text = Path(path).read_text(encoding="utf-8").replace(path, "itself").replace('"cuda"', '"cpu"')
    if path.endswith(".csv"):
        return [[number(cell) for cell in row] for row in csv.reader(text.splitlines())]
    return json.loads(text) if path.endswith(".json") else [*map(json.loads, text.splitlines())]


def long_policy(folder) -> str:
    """A policy with room for a critique, that ends."""
    model = GPT(replace(wires.SHAPE, context=256))
    model.load_state_dict(wires.some_policy(1).state_dict())
    path = f"{folder}/long.pt"
    save(path, model, stage="sft", tokenizer=WORLD, config=wires.training_config(), step=0)
    return path


def task(name: str, tiny, folder):
    """→ the script, its Config but for device and out, and the kind of file it writes."""
    torch.manual_seed(0)
    prompts, brief = write_lines(folder / "asked.jsonl", asked(5)), {"max_new_tokens": 8, "seed": 4}
    reward = f"{tiny}/rm.pt - 0.05*length"
    if name == "collect":
        flags = {"policy": f"{tiny}/policy.pt", "annotator": f"rm:{tiny}/rm.pt", "samples": 4}
        return collect, {**flags, "prompts": prompts, **brief}, ".jsonl"
    if name == "best_of_n":
        models = {"policy": f"{tiny}/solver.pt", "prm": f"{tiny}/prm.pt", "orm": f"{tiny}/orm.pt"}
        search = {"search": ("beam", "dvts"), "width": 2, "expansions": 2, "depth": 2, "checker": ""}
        return best_of_n, {**models, **search, "samples": 4, "problems": prompts, **brief}, ".csv"
    if name == "evaluate":
        models = {"checkpoints": tuple(f"{tiny}/{x}.pt" for x in ("policy", "untied")), "samples": 3}
        models |= {"baseline": f"{tiny}/policy.pt", "reference": f"{tiny}/reference.pt", "reward": reward}
        return evaluate, {**models, "prompts": prompts, **brief}, ".json"
    constitution = folder / "constitution.txt"
    constitution.write_text("Be brief.\nBe kind.\n")
    models = {"policy": long_policy(folder), "constitution": str(constitution), "watch": "length"}
    return critique, {**models, "prompts": prompts, "rounds": 1, "max_new_tokens": 12}, ".jsonl"


@pytest.mark.parametrize("name", ["collect", "best_of_n", "evaluate", "critique"])
def test_a_script_writes_on_a_gpu_what_it_writes_on_a_cpu(name, tiny, tmp_path, monkeypatch):
    script, flags, kind = task(name, tiny, tmp_path)
    here, there = (str(tmp_path / (device + kind)) for device in ("cpu", "cuda"))
    script.main(script.Config(**flags, device="cpu", out=here))
    with pretended_gpu() as gpu, monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # fp32, to compare samples
        script.main(script.Config(**flags, device="cuda", out=there))
    assert gpu.products
    same(read(here), read(there))


@pytest.mark.parametrize("name", ["collect", "best_of_n", "evaluate", "critique"])
def test_a_script_runs_in_bf16(name, tiny, tmp_path):
    script, flags, kind = task(name, tiny, tmp_path)
    out = tmp_path / f"x{kind}"
    with pretended_gpu() as gpu:
        script.main(script.Config(**flags, device="auto", out=str(out)))
    exact = {line.split(":")[0] for dtype, line in gpu.products if dtype != torch.bfloat16}
    assert out.exists() and exact <= {"nanoalign/scalar.py"}


def test_chat_says_on_a_gpu_what_it_says_on_a_cpu(tiny, capsys):
    said, ids = [], WORLD.prompt([{"role": "user", "content": "What is tea?"}])
    config = chat.Config(max_new_tokens=12, temperature=1.0)
    for device in ("cpu", "cuda"):
        with pretended_gpu() as gpu:
            policy, tokenizer, _ = load_policy(f"{tiny}/policy.pt", device)
            for bf16 in (False, True):
                autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
                said.append(chat.say(policy, tokenizer, ids, config, 3, torch.device(device), autocast))
    assert said[0] == said[2] and said[0] and said[3] and gpu.products


# ------------------------------------------------------------------------------------------- the parts


def sampled(model, device: str, count: int = 33, end=None, **options):
    prompts = torch.arange(5 * 4).view(5, 4) + 40
    lengths = torch.tensor([4, 2, 3, 4, 1])
    return generate(model, prompts.to(device), lengths.to(device), count, end, 0, seed=1, **options)


@pytest.mark.parametrize("how", [
    {}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}, {"end": WORLD.end},
    {"stops": tuple(WORLD.newlines)}, {"of": [0, 0, 1, 2, 2, 4, 4]},
], ids=str)  # fmt: skip
def test_samples_are_those_of_a_cpu(how, tiny):
    """Drawn by rows rounded up to a power of two, and slots to a multiple of 64."""
    found, how = [], dict(how)
    if "of" in how:
        how["of"] = torch.tensor(how["of"])
    for device in ("cpu", "cuda"):
        model = load_policy(f"{tiny}/policy.pt")[0]
        with pretended_gpu():
            own = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in how.items()}
            drawn = sampled(model.to(device), device, **own)
            found.append([x.cpu() for x in (drawn.ids, drawn.mask, drawn.logp, drawn.ended)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_decoder_waits_every_sixteenth_token_and_nowhere_else(tiny):
    model = load_policy(f"{tiny}/policy.pt")[0]
    with pretended_gpu() as gpu:
        model.to("cuda")
        found = []
        for count in (1, 17, 33):
            gpu.waits.clear()
            sampled(model, "cuda", count)
            found.append(sum(n for (_, line), n in gpu.waits.items() if line != "a test"))
    assert CHECK_EVERY == 16 and found[1] - found[0] == 1 and found[2] - found[1] == 1
    assert found[0] <= 3  # what ends a row goes there, and how long the longest is comes back


def test_a_cache_is_in_the_dtype_of_autocast(tiny, monkeypatch):
    caches = wires.spy(monkeypatch, sampler, "KVCache")
    model = load_policy(f"{tiny}/policy.pt")[0]
    with pretended_gpu(), torch.autocast("cuda", torch.bfloat16):
        drawn = sampled(model.to("cuda"), "cuda")
        once = token_logprobs(model, drawn.ids, drawn.mask.cpu())
        torch.testing.assert_close(drawn.logp.cpu(), once.cpu(), atol=0.1, rtol=0.05)
    assert [call.result.k.dtype for call in caches] == [torch.bfloat16]
    assert drawn.logp.dtype == torch.float32


@pytest.mark.parametrize("expression", ["{}/rm.pt", "prm-min:{0}/prm.pt", "prm-steps:{0}/prm.pt", "length"])
def test_rewards_are_those_of_a_cpu(expression, tiny):
    rows, texts = [{"prompt": wires.user("Is it hot?")}] * 3, [" yes", " no\n maybe", " the tea is hot."]
    scores = []
    for device in ("cpu", "cuda"):
        with pretended_gpu():
            reward = make_reward(expression.format(tiny), WORLD, torch.device(device))
            scores.append(score_texts(reward, rows, texts, WORLD, 40, torch.device(device)))
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [3, 100])
def test_the_kernels_backward_on_a_gpu_is_that_of_a_cpu(dtype, chunk):
    """Called as autograd's engine would call it, with a loss of each token's probability among others."""

    def priced(logp, value):
        return value * logp.exp()

    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g).to(dtype) for shape in ((7, 16), (37, 16), (37,))]
    targets, values = torch.randint(37, (7,), generator=g), torch.randn(7, generator=g)
    found = []
    for device in ("cpu", "cuda"):
        with pretended_gpu():
            own = [x.to(device).detach().requires_grad_() for x in leaves]
            t, v = targets.to(device), values.to(device)
            logp, entropy, lse = linear_logprobs(*own[:2], t, own[2], 0.7, True, chunk, lse=True)
            mixed = (logp * v + entropy + lse).sum()
            total, again, _ = linear_losses(*own[:2], t, priced, (v,), own[2], 0.7, chunk=chunk)
            assert logp.dtype == total.dtype == torch.float32 and logp.device.type == device
            made = [grad for loss in (mixed, total) for grad in torch.autograd.grad(loss, own)]
            assert all(grad.dtype == dtype and grad.device.type == device for grad in made)
            found.append([x.detach().cpu().float() for x in (logp, entropy, lse, total, again, *made)])
    roundings = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, **roundings)


def test_the_kernels_product_of_16_bits_is_in_fp32():
    a, b = torch.full((2, 512), 1 + 2**-7).bfloat16(), torch.full((512, 2), 1 - 2**-8).bfloat16()
    with pretended_gpu():
        ours = kernels.matmul(a.to("cuda"), b.to("cuda"))
        assert ours.dtype == torch.float32 and ours.device == CUDA and isinstance(ours, GPUTensor)
        assert ours.cpu().tolist() == [[512 * (1 + 2**-7) * (1 - 2**-8)] * 2] * 2


def test_packed_rows_are_those_of_a_cpu(tiny):
    model, found = load_scalar(f"{tiny}/rm.pt")[0], []
    ids = torch.randint(100, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[1, :5], own = ids[0, :5], torch.zeros(4, 12, dtype=torch.bool)
    ids[3, :3] = ids[2, :3]
    own[:2, 5:9], own[2:, 3:] = True, True
    for device in ("cpu", "cuda"):
        with pretended_gpu(), torch.no_grad():
            hidden = packed_hidden(model.to(device), ids.to(device), own, [2, 2])
            found.append(hidden.cpu()[own])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
