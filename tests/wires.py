"""What the tests of a main() share: models of a few thousand parameters, files of a few rows, spies, and the
methods once more, the long way: whole logits, one row at a time, AdamW on a copy, all in float64.

A test in tests/wiring runs a script with every flag off its default, and again by the formulas of its paper,
from the rollouts that a spy caught. What is logged and which weights come out must be the same.
"""

import copy
import importlib
import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import WORLD, interrupt, metrics, terminate

from nanoalign import UserError, training, watch
from nanoalign import run as runs_module
from nanoalign.checkpoint import load, load_policy, save
from nanoalign.model import GPT, GPTConfig
from nanoalign.pieces import micro_batches
from nanoalign.scalar import ScalarGPT

SHAPE = GPTConfig(vocab_size=WORLD.vocab_size, context=40, layers=1, width=8, heads=2, mlp_width=8)
WORDS = [
    "Yes",
    "no",
    "maybe",
    "the",
    "tea",
    "is",
    "hot",
    "and",
    "we",
    "like",
    "it",
    "so",
    "much",
    ",",
    "thank",
    "you",
    ".",
]

# ----------------------------------------------------------------------------------------------- models


def some_policy(seed: int, tied=True, lines=False) -> GPT:
    """A GPT that is far from uniform, and ends about every eighth token; with `lines` as many lines end."""
    torch.manual_seed(seed)
    policy = GPT(copy.copy(SHAPE) if tied else GPTConfig(**{**vars(SHAPE), "tied": False}))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight.mul_(1.0 if "norm" in name else 6.0)
        policy.embed.weight[:, 0] = 2.0  # a direction that all hidden states share …
        policy.head.weight[:, 0] = 2.0
        policy.head.weight[WORLD.end, 0] += 1.4  # … in which the likelier tokens lie
        policy.head.weight[WORLD.newlines[0], 0] += 1.5 * lines
        for word in WORDS:
            policy.head.weight[WORLD.encode(" " + word)[0], 0] += 0.9
    return policy


def some_scalar(seed: int, reader: int = 0) -> ScalarGPT:
    """A scalar model on one policy's trunk, with another as its reader."""
    model = ScalarGPT.from_policy(some_policy(seed), reader > 0)
    if reader:
        model.reader.load_state_dict(some_policy(reader).state_dict())
    with torch.no_grad():
        model.score.weight.mul_(2)
        model.score.bias.fill_(0.1 * seed)
    return model


def write_models(folder) -> None:
    """Checkpoints of every kind, each of its own weights."""
    torch.set_default_dtype(torch.float32)  # whoever asks first
    norm = {"normalisation": {"mean": 0.3, "std": 1.7}}
    for name, (stage, chat, model, more) in {
        "policy": ("sft", True, some_policy(1), {}),
        "reference": ("sft", True, some_policy(2), {}),
        "base": ("base", False, some_policy(3), {}),
        "untied": ("sft", True, some_policy(7, tied=False), {}),
        "rm": ("rm", False, some_scalar(4, reader=2), norm),  # the reference's
        "critic": ("rm", False, some_scalar(5, reader=5), norm),
        "prm": ("prm", False, some_scalar(6, reader=8), {}),
        "orm": ("prm", False, some_scalar(9), {}),
        "solver": ("sft", True, some_policy(8, lines=True), {}),
    }.items():
        config = training_config()
        save(
            folder / f"{name}.pt",
            model,
            tokenizer=WORLD,
            config=config,
            chat=chat,
            stage=stage,
            step=0,
            **more,
        )


def training_config():
    return importlib.import_module("train_sft").Config()


# ------------------------------------------------------------------------------------------------- files


def said(number: int, count: int) -> str:
    """A sentence of so many words that is not the next one."""
    return " ".join(WORDS[(number * 5 + i * (1 + number % 3)) % len(WORDS)] for i in range(count))


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def asked(count: int, first=0) -> list[dict]:
    """Prompt rows, of several lengths."""
    return [
        {"prompt": f"What is {'so ' * (i % 3)}{i}?", "meta": {"answer": i}}
        for i in range(first, first + count)
    ]


def prompt_of(tokens: int) -> dict:
    """A prompt row of so many tokens."""
    text = "so" + (tokens - len(WORLD.prompt(user("so")))) * " so"
    assert len(WORLD.prompt(user(text))) == tokens
    return {"prompt": text, "meta": {}}


def prompt_length(row: dict) -> int:
    return len(WORLD.prompt(user(row["prompt"])))


# ------------------------------------------------------------------------------------------------ spies


def spy(monkeypatch, owner, name: str, keep=None) -> list[SimpleNamespace]:
    """Every call of owner.name from now on: its arguments by their parameters' names, its result, and kept,
    what keep(arguments) makes of them before the call."""
    original, calls = getattr(owner, name), []
    signature = inspect.signature(original)

    def called(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments, args=args, kept=keep and keep(bound.arguments))
        calls.append(call)
        call.result = original(*args, **options)
        return call.result

    monkeypatch.setattr(owner, name, called)
    return calls


def spy_on_batches(monkeypatch) -> list[list]:
    """The pieces of every optimiser step of an on-policy run, as arrays of indices."""
    original, drawn = runs_module.Run.minibatches, []

    def minibatches(self, lengths, group=1):
        drawn.append(SimpleNamespace(lengths=lengths, group=group, steps=[]))
        for step, pieces in original(self, lengths, group):
            drawn[-1].steps.append(pieces := list(pieces))
            yield step, pieces

    monkeypatch.setattr(runs_module.Run, "minibatches", minibatches)
    return drawn


class Stopped(Exception):
    pass


# -------------------------------------------------------------------------------------- the long way round


def policy_at(path) -> GPT:
    return load_policy(path)[0]


def logprobs(model, ids, mask, temperature=1.0):
    """log π of each token of mask (B, T), 0 elsewhere, from all logits."""
    logits = model(ids)[:, :-1] / temperature
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return F.pad(logp, (1, 0)) * mask


def entropies(model, ids, mask, temperature=1.0):
    logp = (model(ids)[:, :-1] / temperature).log_softmax(-1)
    return F.pad(-(logp.exp() * logp).sum(-1), (1, 0)) * mask


def clustered(values, groups) -> float:
    """The standard error of a mean of values, those of one group not independent of each other."""
    off = {}
    for value, group in zip((values - values.mean()).tolist(), groups):
        off[group] = off.get(group, 0) + value
    C = len(off)
    return math.sqrt(sum(x * x for x in off.values()) * C / (C - 1)) / len(values) if C > 1 else math.nan


def padded(examples):
    """[(ids, mask)] → (B, T) each."""
    T = max(len(ids) for ids, _ in examples)
    ids, mask = torch.full((len(examples), T), WORLD.pad), torch.zeros(len(examples), T, dtype=torch.bool)
    for row, (own, scored) in enumerate(examples):
        ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), torch.tensor(scored)
    return ids, mask


def example(prompt: list[dict], response: str, max_length=10**6):
    """Prompt and response → ids and mask, cut."""
    asked, said = WORLD.prompt(prompt).tolist(), WORLD.response(response).tolist()
    return (asked + said)[:max_length], ([False] * len(asked) + [True] * len(said))[:max_length]


def schedule(step: int, config, steps: int) -> float:
    """Linear warm-up, then half a cosine from --lr to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / (steps - config.warmup)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * done))


class Trainer:
    """AdamW, β 0.9 and 0.95, decay on matrices, after clipping the norm of all gradients; by hand."""

    def __init__(self, model, config, eps):
        self.weights = [w for w in model.parameters() if w.requires_grad]
        self.config, self.eps, self.count = config, eps, 0
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]

    def step(self, loss, lr) -> float:
        """Descend → the gradient's norm before clipping."""
        grads = torch.autograd.grad(loss, self.weights, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, self.weights)]
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        shrink = min(1.0, self.config.clip / (norm + 1e-6))
        self.count += 1
        with torch.no_grad():
            for w, g, m, v in zip(self.weights, grads, self.m, self.v):
                g = g * shrink
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                w.mul_(1 - lr * self.config.weight_decay * (w.dim() >= 2))
                w.sub_(lr * (m / (1 - 0.9**self.count)) / ((v / (1 - 0.95**self.count)).sqrt() + self.eps))
        return norm


def assert_close(found: dict, expected: dict, rel=2e-5, abs=2e-6):
    """Values that were logged, to six digits, and what they must be."""
    for name, value in expected.items():
        value = value.item() if isinstance(value, torch.Tensor) else value
        assert found[name] == pytest.approx(value, rel=rel, abs=abs), name


def assert_on(device, *calls):
    """All that could be told where to be was told."""
    told = [call.device for some in calls for call in some if hasattr(call, "device")]
    assert told and all(str(given) == device for given in told)


def assert_same_weights(state: dict, model, moved_from=None):
    """A state dict, saved in fp32, holds this model's weights; and all have moved from another's."""
    ours = {name: weight.double() for name, weight in state.items()}
    assert ours.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ours[name], weight.double(), atol=2e-6, rtol=1e-5, msg=name)
    if moved_from is not None:
        before = {n: w for n, w in moved_from.named_parameters() if w.requires_grad}
        assert all((ours[name] - weight.double()).abs().max() > 1e-5 for name, weight in before.items())


def assert_unmoved(model, original):
    """A model in memory still has the weights it was loaded with, and takes no gradient."""
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters()):
        assert torch.equal(ours, theirs) and not ours.requires_grad and ours.grad is None, name


def assert_reads(model: ScalarGPT, policy: GPT | None):
    """The scalar model's reader is this policy, and takes no gradient; None: it has none."""
    if policy is None:
        assert model.reader is None and model.read_in is None
    else:
        assert_unmoved(model.reader, policy)
        assert model.read_in.weight.requires_grad and model.reader.config == policy.config


def looks(out) -> list[dict]:
    """The held-out evaluations of a run."""
    return [row for row in metrics(out) if any(name.startswith("eval_") for name in row)]


# ------------------------------------------------------------------------------------- on-policy runs


def watch_all(monkeypatch, script):
    """Spies on the sampler, on minibatches, the reward, the models and the order."""
    names = "rollout", "load_policy", "load_reference", "load_critic", "BatchOrder"
    seen = {name: spy(monkeypatch, script, name) for name in names if hasattr(script, name)}
    seen["batches"], seen["scored"] = spy_on_batches(monkeypatch), []
    seen["made"] = spy(monkeypatch, script, "make_reward")
    original = script.make_reward

    def make_reward(*args):
        inner = original(*args)

        def reward(rows, rollout):
            found = inner(rows, rollout)
            seen["scored"].append((rows, rollout, found))
            return found

        reward.files, reward.models, reward.held = inner.files, inner.models, inner.held
        return reward

    monkeypatch.setattr(script, "make_reward", make_reward)
    return seen


def assert_sampled(config, seen):
    """The policy answered whole batches of prompts, by the flags of sampling, on another seed each time; the
    reward was shown those answers beside their prompts."""
    loads = "load_policy", "load_reference", "load_critic"
    assert_on(config.device, seen["made"], *(seen[name] for name in loads if name in seen))
    policy = seen["load_policy"][0].result[0]
    sampled = [x for call in seen["rollout"] for x in seen["scored"] if x[1] is call.result]
    assert len(sampled) == len(seen["rollout"]) == config.steps
    for call, (rows, drawn, _) in zip(seen["rollout"], sampled):
        assert call.model is policy and call.result.rows.tolist() == [*range(len(drawn.ids))]
        assert call.max_new_tokens == config.max_new_tokens
        assert drawn.size == config.micro_batch
        group = {"group": config.group_size} if hasattr(config, "group_size") else {}
        assert call.sampling == {"temperature": config.temperature, "size": drawn.size, **group}
        for row, ids, mask in zip(rows, drawn.ids, drawn.mask):
            prompt = WORLD.prompt(row["prompt"])
            assert ids[: len(prompt)].tolist() == prompt.tolist() and mask.nonzero()[0] == len(prompt)
        assert len({json.dumps(row["prompt"]) for row in rows}) * getattr(config, "group_size", 1) == len(
            rows
        )
    seeds = [call.seed for call in seen["rollout"]]
    assert len({*seeds, config.seed}) == len(seeds) + 1
    return [call.result for call in seen["rollout"]], [found for *_, found in sampled]


def assert_batches(config, seen, group=1):
    """Every epoch is a pass over the iteration's responses, in minibatches, in pieces of --micro-batch."""
    for call, batch in zip(seen["rollout"], seen["batches"]):
        ids, mask = call.result.ids, call.result.mask
        assert batch.lengths.tolist() == [row.nonzero().max() + 1 for row in mask] and batch.group == group
        sizes = [sum(map(len, pieces)) for pieces in batch.steps]
        once = [min(config.minibatch, len(ids) - at) for at in range(0, len(ids), config.minibatch)]
        assert sizes == config.epochs * once
        assert all(len(piece) <= config.micro_batch for pieces in batch.steps for piece in pieces)


def write_doctor(folder) -> str:
    """A doctor who warns once of every row that he sees."""
    source = """def diagnose(rows):
    losses = [row["loss"] for row in rows if "loss" in row]
    return [(f"doctor: seen {loss}", "a cause", "a remedy") for loss in losses]"""
    (folder / "doctor.py").write_text(source)
    return f"{folder}/doctor.py:diagnose"


def assert_counted(config, found, seen):
    """The tokens that were trained on: of each response with its prompt, once an epoch."""
    sizes = [sum(int(row.nonzero().max()) + 1 for row in call.result.mask) for call in seen["rollout"]]
    assert [row["tokens"] for row in found] == (config.epochs * np.cumsum(sizes)).tolist()


def assert_watched(monkeypatch, script, config):
    """The policy as it then is answers the held-out prompts at every look; the KL and scores are of that."""
    seen, drawn = watch_all(monkeypatch, script), []
    original = watch.rollouts

    def rollouts(model, tokenizer, prompts, *args, **options):
        for indices, rollout in original(model, tokenizer, prompts, *args, **options):
            drawn.append((model, prompts, options, rollout, copy.deepcopy(model)))
            yield indices, rollout

    monkeypatch.setattr(watch, "rollouts", rollouts)
    script.main(config)
    ref, found = policy_at(config.reference), looks(config.out)
    assert [row["step"] for row in found] == [0, 2, 3] and len(drawn) == 3
    held_out = [json.loads(line) for line in Path(config.eval_data).read_text().splitlines()]
    shown = [WORLD.prompt(user(held_out[i * len(held_out) // config.eval_prompts]["prompt"])).tolist()
             for i in range(config.eval_prompts)]  # fmt: skip
    T = config.temperature
    for row, (model, prompts, options, rollout, then) in zip(found, drawn):
        assert model is seen["load_policy"][0].result[0]
        assert [prompt.tolist() for prompt in prompts] == shown
        assert options["temperature"] == T and options["max_new_tokens"] == config.max_new_tokens
        ids, mask = rollout.ids, rollout.mask
        kl = (logprobs(then, ids, mask, T) - logprobs(ref, ids, mask, T)).sum(1).mean()
        [score] = [found for _, shown, found in seen["scored"] if shown is rollout]
        length = mask.sum(1).double().mean()
        assert_close(row, {"eval_kl": kl, "eval_length": length, "eval_reward": score.mean()})
    history = [look["kl"] for look in load(config.out)["history"]]
    assert [row["eval_kl"] for row in found] == pytest.approx(history, rel=1e-5)


# --------------------------------------------------------------------------------- what all mains must do


def made_from(monkeypatch, script, config) -> str:
    """The fingerprint of what a run would be made from; it goes no further."""
    with monkeypatch.context() as patch:

        def stop(*args, data, **more):
            raise Stopped(data)

        patch.setattr(runs_module, "resume", stop)
        with pytest.raises(Stopped) as stopped:
            script.main(config)
    return stopped.value.args[0]


def assert_made_from(monkeypatch, script, config, **others):
    """Another file in place of each of these flags' is another run to resume; the same one is not."""
    own = made_from(monkeypatch, script, copy.copy(config))
    assert made_from(monkeypatch, script, copy.copy(config)) == own
    for flag, other in others.items():
        path, content = Path(getattr(config, flag).split()[0]), Path(other).read_bytes()
        kept = path.read_bytes()
        path.write_bytes(content)
        try:
            assert made_from(monkeypatch, script, copy.copy(config)) != own, flag
        finally:
            path.write_bytes(kept)


def assert_resumes(monkeypatch, script, config, tmp_path, step=2):
    """Stopped in this optimiser step and resumed, a run is what it is in one piece."""
    whole, parted = (replaced(config, out=str(tmp_path / name)) for name in ("whole.pt", "parted.pt"))
    parted.resume = True
    script.main(whole)
    with monkeypatch.context() as patch:
        interrupt(patch, step, terminate)
        with pytest.raises(SystemExit):
            script.main(copy.copy(parted))
    script.main(copy.copy(parted))
    a, b = load(whole.out), load(parted.out)
    assert all(torch.equal(weight, b["model"][name]) for name, weight in a["model"].items())
    assert a.get("history") == b.get("history") and a.get("normalisation") == b.get("normalisation")
    clock = ("tokens_per_s", "elapsed", "peak_mb", "generation_s", "scoring_s", "update_s")
    first, second = (
        [{k: v for k, v in row.items() if k not in clock} for row in metrics(out) if "event" not in row]
        for out in (whole.out, parted.out)
    )
    assert first == second
    stat = Path(parted.out).stat()
    script.main(copy.copy(parted))  # it is finished
    assert Path(parted.out).stat().st_mtime_ns == stat.st_mtime_ns


def replaced(config, **changes):
    return type(config)(**{**vars(config), **changes})


def assert_prepared(monkeypatch, script, config, *classes):
    """--compile reaches these kinds of model, in this order, and so does --checkpointing."""
    compiled = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "compile_hidden", compiled.append)
        made_from(patch, script, replaced(config, compile=True, checkpointing=True))
    assert [type(model).__name__ for model in compiled] == list(classes)
    assert all(model.checkpointing for model in compiled)
    assert len({id(model) for model in compiled}) == len(compiled)


def copied(config, folder, *flags):
    """The config with the files of these flags copied into a folder, each under a name of its own."""
    changes = {}
    for flag in flags:
        path, *rest = getattr(config, flag).split(" ", 1)
        mine = folder / f"{flag}{Path(path).suffix}"
        mine.write_bytes(Path(path).read_bytes())
        changes[flag] = " ".join((str(mine), *rest))
    return replaced(config, **changes)


# ------------------------------------------------------------------------------------------ offline runs


def descend(model, config, order, measure, look, sizes, eps=1e-8):
    """Train a model on the rows that an order says: measure(rows) → {"loss": …, what else is logged}; look()
    → what an evaluation finds → what was logged of steps and of looks. sizes: the tokens of each example."""
    trainer, logged, seen, tokens = Trainer(model, config, eps), [], [], 0
    for step in range(config.steps):
        found = measure(order[step])
        row = {name: torch.as_tensor(value).item() for name, value in found.items()}
        tokens += int(sum(sizes[i] for i in order[step]))
        row |= {"lr": schedule(step, config, config.steps), "tokens": tokens}
        row["grad_norm"] = trainer.step(found["loss"], row["lr"])
        logged.append(row)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            with torch.no_grad():
                seen.append({"step": step + 1, **{f"eval_{name}": value for name, value in look().items()}})
    return logged, seen


def assert_logged(config, logged, seen):
    """The run's metrics are these."""
    found, due = [row for row in metrics(config.out) if "loss" in row], looks(config.out)
    assert len(found) == len(logged) == config.steps and len(due) == len(seen)
    for row, expected in zip([*found, *due], [*logged, *seen]):
        assert_close(row, expected)


def spy_on_pieces(monkeypatch) -> list[list]:
    """The indices of every piece that a run hands to its script."""
    original, drawn = runs_module.Run.pieces, []

    def pieces(self, *args):
        for batch, where in original(self, *args):
            drawn.append(where.tolist())
            yield batch, where

    monkeypatch.setattr(runs_module.Run, "pieces", pieces)
    return drawn


def assert_pieces(config, order, pieces, costs):
    """A step's rows come in as few pieces as --micro-tokens allows, an example at these costs."""
    costs = np.asarray(costs)
    steps = (order[step] for step in range(config.steps))
    due = [micro for rows in steps for micro in micro_batches(rows, 0, costs[rows], config.micro_tokens)]
    assert pieces == [rows.tolist() for rows in due] and len(due) > config.steps


def assert_split(calls, kind, most=10**9):
    """Rows of this kind were read, and so many held out at most."""
    assert [(call.kind, call.most) for call in calls] == [(kind, most)]


def assert_shown(out, calls, prompts):
    """At every look each prompt stands beside its answer, and nothing else."""
    due = []
    for call in calls:
        due += [f"  {prompt[:80]!r} → {text!r}" for prompt, text in zip(prompts, call.result[0])]
    assert [line for line in out.splitlines() if " → " in line] == due and due


def assert_answered(calls, model, prompts, seed, tokens):
    """Held-out prompts, in full, were answered by the model in training, with a seed of the run's."""
    for call in calls:
        assert call.model is model and call.seed == seed
        assert [list(p) for p in call.prompts] == [list(p) for p in prompts]
        assert call.max_new_tokens == tokens


def assert_refused(monkeypatch, script, config, *cases: tuple[str, dict]):
    """Flags like these end in a sentence with this word before anything is done; "": they are fine."""
    for word, changes in cases:
        given = replaced(config, **changes)
        if word:
            with pytest.raises(UserError, match=word):
                made_from(monkeypatch, script, given)
        else:
            made_from(monkeypatch, script, given)
