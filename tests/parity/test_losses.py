"""Losses and weight gradients of every method against trl: its own trainers, on the same weights and rows.

A peer runs whole: a real trainer with a real tokenizer (a word is a token) takes an optimiser step, its data
preparation, padding and gradient accumulation included; the gradient is read off just before the optimiser.
Where a peer means something else by a name, the test says what, and shows the exact relation.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_models import CONTEXT, V, from_llama, llama_untied

import train_dpo
import train_grpo
import train_kto
import train_orpo
import train_ppo
import train_rm
from nanoalign.data import collate, join
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.model import GPT
from nanoalign.pieces import micro_batches
from nanoalign.scalar import ScalarGPT

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
utils = pytest.importorskip("trl.trainer.utils")
HOME = {kind: pytest.importorskip(f"trl.experimental.{kind.lower()}") for kind in ("CPO", "ORPO")}
HOME |= dict.fromkeys(("SFT", "Reward", "DPO", "KTO", "GRPO", "RLOO"), trl)
TRAINERS = {kind: [getattr(home, kind + x) for x in ("Config", "Trainer")] for kind, home in HOME.items()}
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

N, END, PAD = 8, V - 2, V - 1  # N rows make an optimiser step
WORDS = [*(f"w{i}" for i in range(END)), "<end>", "<pad>"]
TOKENIZER, CPU = SimpleNamespace(pad=PAD), torch.device("cpu")  # all that nanoalign's functions ask of one

# ----------------------------------------------------------------------- the same weights, the same rows


@pytest.fixture
def pair(double, monkeypatch):
    """pair(seed) → (transformers' Llama, nanoalign's GPT) with the same random weights, in float64.

    transformers takes norms and angles in fp32 whatever the model's dtype, trl the output head: whoever asks
    for fp32 here gets float64, so that rounding cannot hide a difference.
    """

    def build(seed: int, kind=transformers.LlamaForCausalLM, twin=GPT):
        torch.manual_seed(seed)
        llama, config = llama_untied()
        llama.config.num_labels = 1
        theirs = kind(llama.config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter += 0.15 * torch.randn_like(parameter)
        return theirs, mirror(twin(config), theirs)

    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setenv("CI", "1")  # trl's trainers then do not call home
    datasets.disable_progress_bars()
    return build


def mirror(ours, theirs):
    missing, unexpected = ours.load_state_dict(renamed(theirs.state_dict()), strict=False)
    assert not unexpected and set(missing) <= {"score.bias", "gpt.head.weight"}  # a reward model's own
    return ours


def renamed(theirs: dict) -> dict:
    """Weights or gradients by transformers' names → by nanoalign's."""
    trunk = from_llama({k.removeprefix("model."): x for k, x in theirs.items() if k.startswith("model.")})
    if "score.weight" in theirs:
        return {f"gpt.{k}": x for k, x in trunk.items()} | {"score.weight": theirs["score.weight"]}
    return trunk | {"head.weight": theirs["lm_head.weight"]}


def draw(responses: int, rows: int = N) -> list[tuple]:
    """→ rows of a prompt and that many responses, of 2 to 9 and 1 to 10 tokens, the end token included."""
    rng = np.random.default_rng(0)

    def ids(least, most):
        return rng.integers(END, size=rng.integers(least, most))

    return [(ids(2, 10), *(np.append(ids(0, 10), END) for _ in range(responses))) for _ in range(rows)]


def examples(rows: list[tuple], side: int = 1) -> list:
    return [join(row[0], row[side], CONTEXT) for row in rows]


def pairs_of(rows: list[tuple]) -> list[tuple]:
    return list(zip(examples(rows, 1), examples(rows, 2)))


def text(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


def table(rows: list[tuple], *names: str):
    """The rows as texts, for a trainer's own tokenizer to find the same ids in."""
    columns = [[text(ids) for ids in column] for column in zip(*rows)]
    columns[0] = [prompt + " " for prompt in columns[0]]
    return datasets.Dataset.from_dict(dict(zip(names, columns)))


def picked(values, indices) -> list:
    return [values[i] for i in indices]


# ----------------------------------------------------------------------------------------- the two steps


def make_trainer(kind: str, model, data, folder, micro=4, accumulate=2, lr=0.0, given=None, **options):
    """trl's trainer. Its steps are of accumulate × micro rows; only the first has a learning rate."""
    config, trainer = TRAINERS[kind]
    args = config(**{
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_steps": 1,
        "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, **options,
    })  # fmt: skip
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    sgd = torch.optim.SGD(model.parameters(), lr)
    optimizers = sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: float(step == 0))
    given = {"processing_class": words, "optimizers": optimizers, **(given or {})}
    return trainer(model=model, args=args, train_dataset=data, **given)


def train(trainer) -> tuple[float, dict]:
    """trainer.train() → the loss and the gradients of its last optimiser step, by nanoalign's names."""
    losses, grads, training_step = [], {}, trainer.training_step

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            grads.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.training_step = lambda *args: losses.append(training_step(*args)) or losses[-1]
    trainer.add_callback(Look())
    trainer.train()
    return sum(losses[-trainer.args.gradient_accumulation_steps :]).item(), renamed(grads)


def agree(theirs: tuple[float, dict], model, share, rows: int = N):
    """share(indices) → those rows' part of the step's loss. The whole batch at once, and micro-batches of
    three rows, must both add up to the peer's loss and to its gradient of every weight."""
    loss, grads = theirs
    assert abs(loss) > 1e-3 and all(grad.abs().max() > 1e-5 for grad in grads.values())
    for micro in (0, 3):
        model.zero_grad()
        total = sum(share(indices) for indices in micro_batches(np.arange(rows), micro))
        total.backward()
        assert total.item() == pytest.approx(loss, rel=1e-9)
        for name, expected in grads.items():
            off = (model.get_parameter(name).grad - expected).abs().max()
            assert off <= 1e-9 * expected.abs().max(), name


# ------------------------------------------------------------------------------- log-probs, SFT, rewards


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_equal_those_of_transformers_and_trl_whatever_side_is_padded(pair, temperature):
    theirs, ours = pair(0)
    batch = examples(draw(1))
    ids, mask = collate(batch, PAD)
    expected = token_logprobs(ours, ids, mask, temperature)[:, 1:]
    pads = [ids.shape[1] - len(row) for row, _ in batch]
    attend = torch.arange(ids.shape[1]) < ids.shape[1] - torch.tensor(pads)[:, None]
    logits = theirs(ids, attention_mask=attend).logits[:, :-1]
    found = [
        (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1),
        utils.selective_log_softmax(logits, ids[:, 1:], temperature),
    ]
    utils.add_fused_lm_head(theirs, temperature)
    fused = {"input_ids": ids, "attention_mask": attend, "labels": ids.masked_fill(~mask, -100)}
    found.append(theirs(**fused, fused_lm_head=True).log_probs)
    left = {k: torch.stack([row.roll(pad) for row, pad in zip(x, pads)]) for k, x in fused.items()}
    left = theirs(**left, fused_lm_head=True).log_probs
    found.append(torch.stack([row.roll(-pad) for row, pad in zip(left, pads)]))
    assert ((expected < 0) == mask[:, 1:]).all() and min(pads) < max(pads)
    for logp in found:
        torch.testing.assert_close(expected, logp.masked_fill(~mask[:, 1:], 0), rtol=0, atol=1e-11)


def test_the_sft_loss_and_gradient_equal_trls(pair, tmp_path):
    """SFTTrainer, too, divides by the response tokens of the whole optimiser step."""
    theirs, ours = pair(0)
    rows = draw(1)
    trainer = make_trainer("SFT", theirs, table(rows, "prompt", "completion"), tmp_path)
    scored = sum(len(response) for _, response in rows)

    def share(at):
        ids, mask = collate(picked(examples(rows), at), PAD)
        return -masked_sum(token_logprobs(ours, ids, mask), mask).sum() / scored

    agree(train(trainer), ours, share)


@pytest.mark.parametrize("shared", [0, 2])
def test_the_reward_model_loss_and_gradient_equal_trls(pair, tmp_path, shared):
    """RewardTrainer weighs every pair alike; here a prompt weighs 1 however many pairs it has. With one pair
    each that is the same; where two prompts have two, nanoalign's weights times their pairs are trl's."""
    theirs, ours = pair(0, transformers.LlamaForSequenceClassification, ScalarGPT)
    rows, margins = draw(2), [0.25 * i for i in range(N)]
    for i in range(shared):
        rows[-1 - i] = *rows[i][:2], rows[-1 - i][2]
    data = table(rows, "prompt", "chosen", "rejected").add_column("margin", margins)
    trainer = make_trainer("Reward", theirs, data, tmp_path, center_rewards_coefficient=0.03)
    prompts = train_rm.by_prompt(pairs_of(rows), [{"margin": margin} for margin in margins])
    assert len(prompts) == N - shared

    def share(at):
        batch = picked(prompts, at)
        chosen, rejected, weight = train_rm.pair_scores(ours, batch, TOKENIZER, CPU)
        margin = torch.tensor([row["margin"] for prompt in batch for row in prompt.rows])
        loss = train_rm.bradley_terry_loss(chosen, rejected, margin, centering=0.03)
        counts = torch.tensor([len(prompt.rows) for prompt in batch for _ in prompt.rows])
        return (weight * counts * loss).sum() / N

    agree(train(trainer), ours, share, rows=len(prompts))


# ------------------------------------------------------------------------------------- preference losses

EQUALLY = torch.full((N,), 1 / N, dtype=torch.float64)


def by_tokens(lengths: list[int]) -> torch.Tensor:
    """What rows weigh (N,) where trl averages over the tokens of each of two micro-batches, then the two."""
    lengths = torch.tensor(lengths, dtype=torch.float64).view(2, -1)
    return (lengths / lengths.sum(1, keepdim=True)).flatten() / 2


def preference_share(policy, ref, rows, weight=EQUALLY, sft=EQUALLY, **config):
    """The part of some pairs in the loss of train_dpo.py, where rows weigh 1/N. ref None: no reference."""
    config = train_dpo.Config(**config)
    plain = replace(config, sft_weight=0.0)  # that part has weights of its own

    def share(at):
        batch = picked(pairs_of(rows), at)
        logps, tokens = train_dpo.pair_logprobs(policy, batch, TOKENIZER, CPU)
        ref_logps = torch.zeros_like(logps)
        if ref:
            ref_logps = train_dpo.pair_logprobs(ref, batch, TOKENIZER, CPU)[0].detach()
        found = train_dpo.preference_loss(plain, logps, ref_logps, tokens, torch.ones(len(batch)))
        return (weight[at] * found["loss"]).sum() - config.sft_weight * (sft[at] * logps[0] / tokens[0]).sum()

    return share


def dpo_trainer(pair, tmp_path, rows, **options):
    (theirs, ours), (their_ref, our_ref) = pair(0), pair(1)
    data, given = table(rows, "prompt", "chosen", "rejected"), {"ref_model": their_ref}
    return make_trainer("DPO", theirs, data, tmp_path, given=given, beta=0.3, **options), ours, our_ref


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "robust", "cdpo"])
def test_dpo_loss_and_weight_gradients_equal_trls(pair, tmp_path, loss):
    """trl's robust is Chowdhury's, its ipo takes per-token means as well. Its sigmoid has no label smoothing,
    but aot on batches of one pair, where there is nothing to sort, is conservative DPO."""
    rows, options = draw(2), {"loss_type": loss}
    if loss == "cdpo":
        options = {"loss_type": "aot", "micro": 1, "accumulate": N}
    trainer, ours, ref = dpo_trainer(pair, tmp_path, rows, label_smoothing=0.2, **options)
    name = "dpo" if loss == "sigmoid" else loss
    agree(train(trainer), ours, preference_share(ours, ref, rows, loss=name, beta=0.3, label_smoothing=0.2))


def test_where_micro_batches_differ_in_rows_trl_weighs_the_rows_differently(pair, tmp_path):
    """Except for SFT and dapo, trl averages the means of the micro-batches: of 5 and 3 rows, those of the
    smaller count for more. nanoalign divides by the rows of the whole step."""
    rows = draw(2)
    trainer, ours, ref = dpo_trainer(pair, tmp_path, rows, micro=5)
    weight = torch.tensor(5 * [1 / 2 / 5] + 3 * [1 / 2 / 3])
    agree(train(trainer), ours, preference_share(ours, ref, rows, weight, beta=0.3))


def test_the_sft_term_of_dpo_is_trls_weighted_by_tokens(pair, tmp_path):
    """In trl it is the mean over all chosen tokens of a micro-batch, here the mean of the rows' means (RPO:
    Pang et al. 2024): a row of n tokens weighs n times as much there."""
    rows, options = draw(2), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    trainer, ours, ref = dpo_trainer(pair, tmp_path, rows, **options)
    weight = by_tokens([len(chosen) for _, chosen, _ in rows])
    share = preference_share(ours, ref, rows, sft=weight, beta=0.3, sft_weight=0.5)
    agree(train(trainer), ours, share)


def test_simpo_loss_and_weight_gradients_equal_trls(pair, tmp_path):
    """CPOTrainer writes β (Δ − γ/β): its simpo_gamma is γ, not the ratio γ/β that the paper tunes."""
    (theirs, ours), rows = pair(0), draw(2)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 1.5, "simpo_gamma": 0.7}
    trainer = make_trainer("CPO", theirs, table(rows, "prompt", "chosen", "rejected"), tmp_path, **options)
    agree(train(trainer), ours, preference_share(ours, None, rows, loss="simpo", beta=1.5, gamma=0.7))


@pytest.mark.parametrize("lengths", ["equal", "unequal"])
def test_orpo_loss_and_weight_gradients_equal_trls(pair, tmp_path, lengths):
    """trl calls λ beta. Its NLL is the mean over all prompt and chosen tokens of a micro-batch, here the mean
    of the rows' means: the same where all rows are of one length, else a row weighs as its tokens there."""
    (theirs, ours), rows, config = pair(0), draw(2), train_orpo.Config()
    if lengths == "equal":
        rows = [(x, np.append(np.resize(x, 13 - len(x)), END), y) for x, _, y in rows]
    trainer = make_trainer("ORPO", theirs, table(rows, "prompt", "chosen", "rejected"), tmp_path, beta=0.4)
    weight = by_tokens([len(x) + len(y) - 1 for x, y, _ in rows])  # nothing predicts the first token

    def share(at):
        nll, *means = train_orpo.pair_logprobs(ours, picked(pairs_of(rows), at), TOKENIZER, config, CPU)
        nll = nll if lengths == "equal" else nll * weight[at] * N
        return train_orpo.orpo_loss(nll, *means, lam=0.4).sum() / N

    agree(train(trainer), ours, share)


@pytest.mark.parametrize("micro", [N, N // 2])
def test_kto_loss_and_weight_gradients_equal_trls(pair, tmp_path, micro):
    """trl joins x_i to y_{i−1}, here to y_{i+1}: the same pairs where the batch stands in reverse. It takes z
    of each micro-batch, nanoalign of the whole optimiser step: with accumulation, nanoalign's loss with trl's
    z's. Its weights are 1 and 1 unless given, never by the paper's rule."""
    (theirs, ours), (their_ref, our_ref), rows = pair(0), pair(4), draw(1)
    up, given = [True, False, True, True, False, True, True, False], {"ref_model": their_ref}
    options = {"beta": 0.05, "desirable_weight": 1.1, "undesirable_weight": 0.7}
    data = table(rows, "prompt", "completion").add_column("label", up)
    trainer = make_trainer("KTO", theirs, data, tmp_path, micro, N // micro, given=given, **options)
    batch = examples(rows)
    rest = TOKENIZER, SimpleNamespace(micro_batch=0, micro_tokens=0), CONTEXT, CPU
    parts = [batch[i : i + micro][::-1] for i in range(0, N, micro)]
    point = [train_kto.reference_point(ours, our_ref, part, *rest) for part in parts]
    assert min(point) > 0.1

    def share(at):
        part, models = picked(batch, at), (ours, our_ref)
        logp, ref = (train_kto.sequence_logprobs(model, part, TOKENIZER, CPU) for model in models)
        z, desirable = torch.stack(point)[at // micro], torch.tensor(up)[at]
        return train_kto.kto_loss(logp - ref.detach(), desirable, z, 0.05, 1.1, 0.7).sum() / N

    agree(train(trainer), ours, share)


# -------------------------------------------------------------------------------------- policy gradients

GROUP, L_MAX, LOW, BETA = 4, 12, 0.2, 0.3


@pytest.mark.parametrize("kind, corrected", [*((kind, False) for kind in train_grpo.KINDS), ("grpo", True)])
def test_policy_gradient_loss_and_weight_gradients_equal_trls(pair, tmp_path, kind, corrected):
    """The second of two steps on one rollout: ratios are off 1 and clipped, the reference is a third model.
    trl's std, too, is the unbiased one plus 1e-4, its dapo divides by the tokens of the whole optimiser step,
    its KL is k3 in the loss (RLOO: k1 off the reward), all at the sampling temperature. Its defaults are
    others: k3 is multiplied by the ratio (use_bias_correction_kl, the case "True"), loss_type dr_grpo leaves
    the std in (scale_rewards), dapo takes ε_low for ε_high."""
    (theirs, ours), (their_ref, our_ref), rows = pair(0), pair(1), draw(GROUP, 3)
    rows[0] = *rows[0][:-1], np.array([3, 1, 4])  # a response without an end token
    scores, high = np.random.default_rng(1).normal(size=(3, GROUP)), 0.28 if kind == "dapo" else LOW
    answers = {tuple(x): [y.tolist() for y in ys] for x, *ys in rows}
    known = {(text(x) + " ", *y): s for (x, *ys), r in zip(rows, scores) for y, s in zip(ys, r)}

    def reward(prompts, completion_ids, **_):
        return [known[(prompt, *ids)] for prompt, ids in zip(prompts, completion_ids)]

    def generate(prompts, *_):  # the sampler puts a prompt's G responses next to each other
        ids = [answers[tuple(prompt)][i % GROUP] for i, prompt in enumerate(prompts)]
        return ids if kind == "rloo" else (ids, None)

    options = {
        "num_generations": GROUP, "max_completion_length": L_MAX, "num_iterations": 2, "max_steps": 2,
        "micro": 6, "temperature": 0.8, "epsilon": LOW, "epsilon_high": high, "lr": 0.06, "beta": 0.0,
    }  # fmt: skip
    if kind != "rloo":
        options |= {"loss_type": kind, "use_bias_correction_kl": corrected}
        options |= {"scale_rewards": "none" if kind == "dr_grpo" else "group"}
    name, data = "RLOO" if kind == "rloo" else "GRPO", table([row[:1] for row in rows], "prompt")
    trainer = make_trainer(name, theirs, data, tmp_path, given={"reward_funcs": reward}, **options)
    trainer._generate_single_turn = generate
    trainer.beta, trainer.ref_model = BETA, their_ref  # the constructor takes a reference by its path only
    utils.add_fused_lm_head(their_ref, 0.8)

    ids, mask = collate([join(x, y, CONTEXT) for x, *ys in rows for y in ys], PAD)
    with torch.no_grad():
        old, ref = (token_logprobs(model, ids, mask, 0.8) for model in (ours, our_ref))
    step = train(trainer)
    mirror(ours, theirs)  # the weights after the first step
    price = BETA * masked_sum(old - ref, mask) if kind == "rloo" else None
    advantages = train_grpo.group_advantages(torch.from_numpy(scores).flatten(), GROUP, kind, price)
    weights, beyond = train_grpo.token_weights(mask, kind, L_MAX), []

    def share(at):
        logp = token_logprobs(ours, ids[at], mask[at], 0.8)
        loss, ratio = train_grpo.policy_loss(logp, old[at], advantages[at], mask[at], kind, LOW, high)
        beyond.append((ratio - ratio.clamp(1 - LOW, 1 + high)) * advantages[at, None])
        if kind != "rloo":
            kl = train_grpo.kl_estimate(logp, ref[at], "k3")
            loss = loss + BETA * (kl * ratio if corrected else kl)
        return masked_sum(loss * weights[at], mask[at]).sum()

    agree(step, ours, share, rows=3 * GROUP)
    assert beyond[0].min() < 0 < beyond[0].max()  # of the ratios beyond ε, some are cut off and some are not


def test_ppo_equals_the_loops_of_lm_human_preferences():
    """Rewards, GAE, whitening and both clipped losses, a token at a time as in its train_policy.py. There
    all responses are of one length; here a row's loop spans its own response, and means are over tokens."""
    rng = np.random.default_rng(0)
    logp, old, ref, values, old_values = rng.normal(scale=0.3, size=(5, 4, 9))
    spans, score, beta, gamma, lam = [(2, 6), (1, 9), (5, 6), (4, 8)], rng.normal(size=4), 0.2, 0.97, 0.9
    advantages, returns, tokens = np.zeros((4, 9)), np.zeros((4, 9)), []
    for b, (start, end) in enumerate(spans):
        following = lastgaelam = 0.0
        for t in reversed(range(start, end)):
            reward = -beta * (old[b, t] - ref[b, t]) + (score[b] if t == end - 1 else 0.0)
            lastgaelam = reward + gamma * following - old_values[b, t] + gamma * lam * lastgaelam
            following = old_values[b, t]
            advantages[b, t], returns[b, t] = lastgaelam, lastgaelam + old_values[b, t]
            tokens.append((b, t))
    mean = sum(advantages[at] for at in tokens) / len(tokens)
    var = sum((advantages[at] - mean) ** 2 for at in tokens) / len(tokens)
    pg = vf = 0.0
    for at in tokens:
        a, ratio = (advantages[at] - mean) / np.sqrt(var + 1e-8), np.exp(logp[at] - old[at])
        pg += max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)) / len(tokens)
        kept = min(max(values[at], old_values[at] - 0.2), old_values[at] + 0.2)
        vf += 0.5 * max((values[at] - returns[at]) ** 2, (kept - returns[at]) ** 2) / len(tokens)

    logp, old, ref, values, old_values, score = map(torch.tensor, (logp, old, ref, values, old_values, score))
    mask = torch.tensor([[start <= t < end for t in range(9)] for start, end in spans])
    rewards = train_ppo.shape_rewards(score, old, ref, mask, beta)
    found, targets = train_ppo.gae(rewards, old_values, mask, gamma, lam)
    torch.testing.assert_close(found, torch.tensor(advantages))
    torch.testing.assert_close(targets, torch.tensor(returns))
    found = train_ppo.whiten(found, mask)
    assert train_ppo.policy_loss(logp, old, found, mask).item() == pytest.approx(pg, rel=1e-12)
    assert train_ppo.value_loss(values, old_values, targets, mask).item() == pytest.approx(vf, rel=1e-12)
