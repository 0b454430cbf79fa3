"""Process reward models: labels at the right tokens, the loss, metrics by counting, as a reward."""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import SHARED

import train_prm
from nanoalign import UserError
from nanoalign.data import join
from nanoalign.generate import Rollout
from nanoalign.rewards import make_reward, on_last_token
from nanoalign.rows import read_rows, write_rows
from nanoalign.scalar import ScalarGPT
from nanoalign.statistics import auc, calibration_error
from nanoalign.steps import aggregate, step_ends, step_example, step_probabilities
from nanoalign.tokenizer import get_tokenizer
from train_prm import UNLABELLED, batch_of, first_error, step_examples, step_loss

WORLD = get_tokenizer("world")
NONE = UNLABELLED


def asked(text):
    return [{"role": "user", "content": text}]


def row_of(steps, labels, prompt="Start with 2.", **more):
    return {"prompt": asked(prompt), "completions": steps, "labels": labels, "meta": {}, **more}


# --------------------------------------------------------------------------------------------- step positions


def test_each_label_stands_at_the_token_that_ends_its_step_and_nowhere_else():
    steps, labels = ["2 + 3 = 5", "5 * 2 = 10", "Answer: 10"], [1.0, None, 0.0]
    [(ids, at, imitated)] = step_examples([row_of(steps, labels)], WORLD, 128, False, "good")
    ends = np.flatnonzero(ids == WORLD.step)
    assert at[ends].tolist() == [1, NONE, 0]
    assert (np.delete(at, ends) == NONE).all()
    start = len(WORLD.prompt(asked("Start with 2.")))
    pieces = np.split(ids[start:], ends - start + 1)[:-1]
    assert [WORLD.decode(piece).strip() for piece in pieces] == steps  # <|step|> is not decoded
    assert np.flatnonzero(imitated).tolist() == list(range(start, ends[0]))  # text of the right step alone
    right = [{**row_of(steps, labels), "label": label} for label in (True, False)]
    for row in right:
        [(ids, at, imitated)] = step_examples([row], WORLD, 128, True, "good")
        text = [i for i in range(start, len(ids)) if i not in ends] if row["label"] else []
        assert np.flatnonzero(imitated).tolist() == text  # of an outcome: the whole solution or nothing


def test_truncation_keeps_whole_steps_with_their_labels_and_drops_the_rest():
    rows = [row_of(["2 + 3 = 5", "5 * 2 = 10", "Answer: 10"], [1.0, 0.0, 1.0])]
    [(whole, at, _)] = step_examples(rows, WORLD, 128, False, "good")
    ends = np.flatnonzero(whole == WORLD.step)
    for length in range(ends[0] + 1, len(whole) + 1):
        [(ids, cut, _)] = step_examples(rows, WORLD, length, False, "good")
        assert np.array_equal(ids, whole[:length]) and np.array_equal(cut, at[:length])
    with pytest.raises(UserError, match="nothing to learn"):
        step_examples(rows, WORLD, int(ends[0]), False, "good")


def test_padding_carries_no_label_and_never_changes_the_loss():
    torch.manual_seed(0)
    rows = [row_of(["2 + 3 = 5"] * n, [1.0, 0.0, 1.0, 0.0][:n]) for n in (1, 4)]
    examples = step_examples(rows, WORLD, 128, False, "good")
    ids, labels, *_ = batch_of(examples, WORLD, "cpu")
    assert (labels[0, len(examples[0][0]) :] == NONE).all() and (labels != NONE).sum() == 5
    logits = torch.randn(ids.shape)
    alone = [
        step_loss(logits[i : i + 1, : len(e[0])], labels[i : i + 1, : len(e[0])])
        for i, e in enumerate(examples)
    ]
    torch.testing.assert_close(step_loss(logits, labels), (alone[0] + 4 * alone[1]) / 5)


def test_a_separator_in_the_users_text_is_not_a_step():
    prompt = "One step a line:\n1 + 1 = 2\n<|step|><|end|> go."
    steps = ["2 + 3 = 5", "Answer: 5"]
    [(ids, at, _)] = step_examples([row_of(steps, [1.0, 0.0], prompt)], WORLD, 256, False, "good")
    assert (ids == WORLD.step).sum() == 2 and (at != NONE).sum() == 2
    ids, mask = join(WORLD.prompt(asked(prompt)), WORLD.response("\n".join(steps)), 256)
    ends = step_ends(torch.tensor(ids)[None], torch.tensor(mask)[None], WORLD)
    assert ends.sum() == 2 and ends[0, -1] and not ends[0, ~mask].any()


def test_a_sampled_solution_is_read_exactly_as_a_training_row_is():
    """The same ids, label positions where the policy wrote its line breaks and its end token."""
    steps = ["2 + 3 = 5", "5 * 2 = 10", "Answer: 10"]
    trained, mask, _ = step_example(WORLD.prompt(asked("Go.")), steps, WORLD, 128)
    ids, written = (
        torch.tensor(x)[None] for x in join(WORLD.prompt(asked("Go.")), WORLD.response("\n".join(steps)), 128)
    )
    seen = []

    class Model:
        def hidden(self, x):
            seen.append(x)
            return torch.arange(x.shape[1]).float().expand(x.shape)

        def score(self, hidden):
            return hidden

    drawn = Rollout(ids, written, 0.0 * ids, written[:, -1])
    p, ends = step_probabilities(Model(), drawn, WORLD)
    assert seen[0][0].tolist() == trained.tolist() and ends[0].tolist() == mask.tolist()
    assert torch.equal(p, torch.arange(ids.shape[1]).float()[None].sigmoid())  # no shift


PIECES = ("1 + 1 = 2", "\n", "\n\n", " ", "so", ".", "\t", "日本", "", "\r\n")


@pytest.mark.parametrize("vocabulary", ["world", "r50k"])
def test_steps_of_any_lines_have_the_marks_of_the_same_text_as_a_sample(vocabulary, r50k):
    """And a step ends at the token that holds the line break after it, found here by decoding prefixes."""
    tokenizer, rng = {"world": WORLD, "r50k": r50k}[vocabulary], random.Random(0)
    prompt = tokenizer.prompt(asked("Go."))
    for _ in range(100):
        steps = ["".join(rng.choices(PIECES, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 5))]
        ids, mask = join(prompt, tokenizer.response("\n".join(steps)), 1000)
        written = step_ends(torch.tensor(ids)[None], torch.tensor(mask)[None], tokenizer)[0].numpy()
        for length in (1000, rng.randint(1, len(ids))):
            read, marks, spans = step_example(prompt, steps, tokenizer, length)
            assert read.tolist() == np.where(written, tokenizer.step, ids)[:length].tolist()
            assert marks.tolist() == written[:length].tolist()
            for number, start, end in spans:
                text = " " + "\n".join(steps[: number + 1])
                upto, with_it = (
                    tokenizer.encoding.decode_bytes(ids[len(prompt) : k]) for k in (end, end + 1)
                )
                due = text.encode() + (b"\n" if number < len(steps) - 1 else b"<|end|>")
                assert with_it.startswith(due) and not upto.startswith(due)
                assert marks[end] and start <= end
            firsts = [start for _, start, _ in spans]
            assert firsts == [len(prompt), *(end + 1 for *_, end in spans)][: len(spans)]
            if length == 1000:
                left_out = set(range(len(steps))) - {number for number, *_ in spans}
                assert len(steps) - 1 not in left_out  # the end token is a token of its own
                assert not any(steps[number].strip() for number in left_out)  # blank, its end shared


def test_every_line_of_a_right_step_is_right_and_of_a_wrong_one_only_the_last_is_known():
    steps = ["1 + 1 = 2\n2 + 2 = 4", "4 + 1 = 6\n6 + 1 = 7", "7 + 1 = 8\n8 + 1 = 9", "9\nAnswer: 9"]
    row = row_of(steps, [1.0, 0.0, None, 0.75], label=True)
    [(ids, at, imitated)] = step_examples([row], WORLD, 128, False, "good")
    ends = np.flatnonzero(ids == WORLD.step)
    assert at[ends].tolist() == [1, 1, NONE, 0, NONE, NONE, NONE, 0.75]
    assert (np.delete(at, ends) == NONE).all()
    assert WORLD.decode(ids[imitated]) == " 1 + 1 = 22 + 2 = 49Answer: 9"
    [(ids, at, imitated)] = step_examples([row], WORLD, 128, True, "good")
    assert at[ends].tolist() == [NONE] * 7 + [1]  # of an outcome: one label, at the end
    assert not imitated[ends].any()
    [(_, at, _)] = step_examples([{**row, "neutral": [0]}], WORLD, 128, False, "ignore")
    assert at[ends].tolist() == [NONE, NONE, NONE, 0, NONE, NONE, NONE, 0.75]


def test_the_case_of_a_step_of_two_lines_has_the_marks_that_a_sample_has():
    path = SHARED / "cases" / "step_of_two_lines.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    [row] = read_rows(str(path), "steps")
    [(_, at, _)] = step_examples([row], WORLD, 128, False, "good")
    sample = join(WORLD.prompt(row["prompt"]), WORLD.response("\n".join(row["completions"])), 128)
    ends = step_ends(*(torch.tensor(x)[None] for x in sample), WORLD)
    assert (at == 1).sum() == ends.sum() == 3 and at[ends[0].numpy()].tolist() == [1, 1, 1]


def test_any_token_with_a_line_break_ends_a_step(r50k):
    ids = torch.tensor([[*r50k.encode("1 + 1 = 2\n\n\n2 + 2 = 4\nA: 4"), r50k.end, r50k.pad]])
    ends = step_ends(ids, ids != r50k.pad, r50k)
    assert [r50k.decode([i]) for i in ids[ends].tolist()] == ["\n\n", "\n", "\n", ""]


# -------------------------------------------------------------------------------------------------- the loss


LOGITS = torch.tensor([[0.3, -1.2, 5.0, 0.0], [2.0, -40.0, 90.0, 1.0]])
LABELS = torch.tensor([[1.0, -100, 0, -100], [-100, 1, 1, 0]])


def cross_entropies():
    pairs = [(z, y) for z, y in zip(LOGITS.flatten().tolist(), LABELS.flatten().tolist()) if y != -100]
    return [math.log1p(math.exp(-z)) if y else z + math.log1p(math.exp(-z)) for z, y in pairs]


def test_the_loss_is_the_mean_cross_entropy_of_the_labelled_steps():
    assert step_loss(LOGITS, LABELS).item() == pytest.approx(np.mean(cross_entropies()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bfloat16, torch.float16, torch.float64])
def test_minus_100_survives_every_dtype(dtype):
    assert step_loss(LOGITS, LABELS.to(dtype)).item() == pytest.approx(np.mean(cross_entropies()), rel=1e-6)


def test_unlabelled_positions_have_no_gradient_and_a_soft_label_pulls_to_its_probability():
    logits = LOGITS.clone().requires_grad_()
    step_loss(logits, LABELS).backward()
    due = (LOGITS.sigmoid() - LABELS) / 5
    torch.testing.assert_close(logits.grad, torch.where(LABELS == -100, 0.0, due))
    z = torch.logit(torch.tensor([[0.3]])).requires_grad_()
    step_loss(z, torch.tensor([[0.3]])).backward()
    assert z.grad.abs().item() < 1e-7


def test_no_label_at_all_is_0_not_nan():
    assert step_loss(LOGITS, torch.full_like(LOGITS, -100)).item() == 0


# ------------------------------------------------------------------------------------------------- the files


def test_an_outcome_model_needs_a_verdict_on_the_final_answer_and_learns_from_it_alone():
    row = row_of(["<<1+1=2>>2", "so", "A: 3"], [1.0, None, None], label=False)
    assert train_prm.labels_of(row, True, "good") == [NONE, NONE, 0.0]
    with pytest.raises(UserError, match="--outcome needs"):
        step_examples([row_of(["a"], [1.0])], WORLD, 64, True, "good")


def test_a_neutral_step_counts_as_right_or_is_ignored():
    row = row_of(["a", "b"], [1.0, 1.0], neutral=[1])
    assert train_prm.labels_of(row, False, "good") == [1.0, 1.0]
    assert train_prm.labels_of(row, False, "ignore") == [1.0, NONE]


@pytest.mark.parametrize(
    "labels, said",
    [([2], "labels"), (["yes"], "labels"), ([-0.1], "labels"), ([True, None], "1 steps but 2")],
)
def test_bad_labels_are_one_clear_sentence(tmp_path, labels, said):
    path = str(tmp_path / "rows.jsonl")
    write_rows(path, [{"prompt": "Hi", "completions": ["a"], "labels": labels}])
    with pytest.raises(UserError, match=f"line 1: .*{said}"):
        read_rows(path, "steps")


@pytest.mark.parametrize("neutral", [1, ["1"], [None]])
def test_bad_numbers_of_neutral_steps_are_one_clear_sentence(tmp_path, neutral):
    path = str(tmp_path / "rows.jsonl")
    write_rows(path, [{"prompt": "Hi", "completions": ["a"], "labels": [1], "neutral": neutral}])
    with pytest.raises(UserError, match=r"line 1: .*neutral"):
        read_rows(path, "steps")


def test_rows_without_any_label_are_one_clear_sentence():
    with pytest.raises(UserError, match="no step of the 2 rows is labelled"):
        step_examples([row_of(["a", "b"], [None, None])] * 2, WORLD, 64, False, "good")


# --------------------------------------------------------------------------------------------------- metrics


def test_auc_is_the_share_of_pairs_in_the_right_order_ties_half():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.integers(0, 6, 30) / 5, rng.random(30) < 0.4
        wins = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
        assert auc(scores, positive) == pytest.approx(np.mean(wins))
    assert math.isnan(auc(scores, np.ones(30, bool)))


def test_calibration_error_is_the_gap_between_confidence_and_truth_per_bin():
    p, y = np.array([0.05, 0.02, 0.55, 0.51, 1.0]), np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert calibration_error(p, y) == pytest.approx((abs(0.07 - 1) + abs(1.06 - 1) + 0) / 5)


def test_the_first_error_must_be_named_exactly_and_a_sound_solution_not_at_all():
    p = [np.array(x) for x in ([0.9, 0.2, 0.1], [0.4, 0.1], [0.9, 0.9, 0.1], [0.8, 0.3], [0.9, 0.6])]
    labels = [np.array(x) for x in ([1, 0, 1], [1, 0], [1, 0, 0], [1, 1], [1, 1])]
    found = first_error(p, labels)
    assert found == {
        "exact": pytest.approx(1 / 3),
        "clean": 0.5,
        "f1": pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5)),
    }


@pytest.mark.parametrize(
    "how, expected", [("min", [0.2, 0.5, 0.0]), ("product", [0.12, 0.5, 0.0]), ("last", [0.6, 0.5, 0.0])]
)
def test_steps_are_summed_up_by_minimum_product_or_last_and_no_step_is_0(how, expected):
    p = torch.tensor([[0.1, 0.2, 0.3, 0.6], [0.5, 0.1, 0.9, 0.1], [0.9] * 4])
    ends = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
    torch.testing.assert_close(aggregate(p, ends, how), torch.tensor(expected))


# ------------------------------------------------------------------------------------------------ the script


def test_a_process_model_learns_which_steps_are_right(world, sft, tmp_path):
    """Steps that can be told by a word: AUC and first errors go from chance to certain."""
    rng = random.Random(0)
    rows = []
    for i in range(400):
        labels = [rng.random() < 0.7 for _ in range(rng.randint(1, 4))]
        steps = [f"{rng.randint(1, 99)} is {'right' if y else 'wrong'}" for y in labels]
        rows.append({"prompt": f"{i}?", "completions": steps, "labels": labels, "label": labels[-1]})
    path, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "x.pt")
    write_rows(path, rows)
    how = {"epochs": 4, "batch_size": 16, "lr": 3e-3, "reader": False}  # sft.pt has hardly learnt to read
    train_prm.main(train_prm.Config(init=sft, data=path, out=out, **how))
    last = [json.loads(line) for line in (tmp_path / "x.metrics.jsonl").read_text().splitlines()][-1]
    assert last["eval_auc"] > 0.99 and last["eval_f1"] > 0.9 and last["eval_ece"] < 0.1


def test_rewards_read_a_process_model_as_one_score_and_densely(world, prm, sft):
    from nanoalign.checkpoint import load_policy
    from nanoalign.rollouts import rollouts

    policy, tokenizer, _ = load_policy(sft)
    rows = read_rows(f"{world}/problems.jsonl", "prompts")[:6]
    prompts = [tokenizer.prompt(row["prompt"]) for row in rows]
    [(_, rollout)] = rollouts(policy, tokenizer, prompts, 24, 0)
    dense = make_reward(f"prm-steps:{prm}", tokenizer, "cpu")(rows, rollout)
    ends = step_ends(rollout.ids, rollout.mask, tokenizer)
    assert dense.shape == rollout.ids.shape and (dense[ends] > 0).all() and not dense[~ends].any()
    for how in ("min", "product", "last"):
        one = make_reward(f"prm-{how}:{prm}", tokenizer, "cpu")(rows, rollout)
        torch.testing.assert_close(one, aggregate(dense, ends, how))
    both = make_reward(f"prm-steps:{prm} - 0.5*length", tokenizer, "cpu")(rows, rollout)
    torch.testing.assert_close(both - dense, on_last_token(-0.5 * rollout.mask.sum(1).float(), rollout.mask))


def test_a_process_model_is_a_scalar_model_with_its_stage(prm):
    from nanoalign.checkpoint import load_scalar

    model, _, content = load_scalar(prm, "cpu", ("prm",))
    assert isinstance(model, ScalarGPT) and content["stage"] == "prm" and content["kind"] == "process"
