"""Process reward models: labels at the right tokens, formats, metrics by counting, selectors and search by
enumeration."""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import best_of_n
import train_prm
from best_of_n import best_at, curves, pass_at, tree_search, vote_at
from nanoalign import UserError
from nanoalign.data import join
from nanoalign.model import ScalarGPT
from nanoalign.rewards import make_reward, on_last_token
from nanoalign.rows import RowError, check_calculator, parse_steps, read_rows, write_rows
from nanoalign.steps import aggregate, step_ends, step_example, step_probabilities
from nanoalign.tokenizer import get_tokenizer
from nanoalign.world.steps import check_steps, problem, solution
from train_prm import UNLABELLED, auc, batch_of, calibration_error, first_error, step_examples, step_loss

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
    ids, labels, _ = batch_of(examples, WORLD, "cpu")
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
    trained, mask = step_example(WORLD.prompt(asked("Go.")), steps, WORLD, 128)
    ids, written = (
        torch.tensor(x)[None] for x in join(WORLD.prompt(asked("Go.")), WORLD.response("\n".join(steps)), 128)
    )
    seen = []

    def model(x):
        seen.append(x)
        return torch.arange(x.shape[1]).float().expand(x.shape)

    p, ends = step_probabilities(model, ids, written, WORLD)
    assert seen[0][0].tolist() == trained.tolist() and ends[0].tolist() == mask.tolist()
    assert torch.equal(p, torch.arange(ids.shape[1]).float()[None].sigmoid())  # no shift


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


def test_alternatives_of_prm800k_are_siblings_and_never_chained():
    def offered(*texts, chosen=None, human=None):
        completions = [{"text": text, "rating": rating} for text, rating in texts]
        return {"completions": completions, "chosen_completion": chosen, "human_completion": human}

    stages = [
        offered(("a", 1), ("a2", -1), chosen=0),
        offered(("b", -1), ("b2", 0), human={"text": "h", "rating": None}),
        offered(("c", -1), ("c2", None)),
    ]
    row = {"question": {"problem": "Q"}, "label": {"steps": stages, "finish_reason": "found_error"}}
    found = [(r["completions"], r["labels"], r["neutral"]) for r in parse_steps(row)]
    assert found == [
        (["a", "h"], [1.0, None], []),
        (["a2"], [0.0], []),
        (["a", "b"], [None, 0.0], []),
        (["a", "b2"], [None, 1.0], [1]),
        (["a", "h", "c"], [None, None, 0.0], []),  # c2 was not rated
    ]
    assert all(r["prompt"] == asked("Q") for r in parse_steps(row))
    neutral = parse_steps(row)[3]
    assert [
        len(step_examples([neutral, parse_steps(row)[1]], WORLD, 64, False, how))
        for how in ("good", "ignore")
    ] == [2, 1]


def test_quality_control_rows_of_prm800k_are_left_out_and_counted(tmp_path, capsys):
    good = {
        "question": {"problem": "Q"},
        "label": {"steps": [{"completions": [{"text": "a", "rating": 1}], "chosen_completion": 0}]},
    }
    path = str(tmp_path / "prm800k.jsonl")
    write_rows(
        path,
        [
            good,
            {**good, "is_quality_control_question": True},
            {**good, "is_initial_screening_question": True},
        ],
    )
    assert len(read_rows(path, "steps")) == 1
    assert "2 rows (ties, unrated or for quality control) were left out" in capsys.readouterr().out


def test_a_bad_rating_of_prm800k_is_named():
    step = {"completions": [{"text": "a", "rating": 2}], "chosen_completion": 0}
    with pytest.raises(RowError, match="rating 2"):
        parse_steps({"question": {"problem": "Q"}, "label": {"steps": [step]}})
    for broken in ({}, {"steps": 3}, {"steps": [{"completions": [{"rating": 1}], "chosen_completion": 0}]}):
        with pytest.raises(RowError, match="PRM800K"):
            parse_steps({"question": {"problem": "Q"}, "label": broken})


def test_math_shepherds_marks_become_labels_and_its_separator_in_a_question_stays_text():
    given = "Сказки and руки? Step 1: 1 + 1 = 2 ки\nStep 2: 2 + 2 = 5 ки\nStep 3: The answer is: 5 ки"
    marks = iter("+--")
    head, _, tail = given.partition("Step 1:")
    judged = head + "Step 1:" + "".join(next(marks) if c == "\0" else c for c in tail.replace("ки", "\0"))
    row = parse_steps({"input": given, "label": judged, "task": "GSM8K"})[0]
    assert row["prompt"] == asked("Сказки and руки?")
    assert row["completions"] == ["Step 1: 1 + 1 = 2", "Step 2: 2 + 2 = 5", "Step 3: The answer is: 5"]
    assert row["labels"] == [1.0, 0.0, 0.0]
    with pytest.raises(RowError, match="Step 1"):
        parse_steps({"input": "No steps.", "label": "No steps."})


@pytest.mark.parametrize(
    "line, verdict",
    [
        ("48/2 = <<48/2=24>>24", 1.0),
        ("<<48/2=23>>23", 0.0),
        ("<<1/3=0.33>>0.33 and <<2*3=6>>", 1.0),
        ("<<1/3=0.34>>", 0.0),
        ("<<7/2=3>>", 0.0),
        ("<<1,000*2=2,000>>", 1.0),
        ("<<3-(2-5)*2=9>>", 1.0),
        ("<<2*3=6>> <<2*3=7>>", 0.0),
        ("<<x*.25=19.5>>", None),
        ("<<1/0=5>>", None),
        ("<<__import__('os')=5>>", None),
        ("<<9**9**9=5>>", None),
        ("no sum", None),
    ],
)
def test_a_line_of_gsm8k_is_checked_by_its_own_equations(line, verdict):
    assert check_calculator(line) == verdict


def test_a_labelled_solution_becomes_its_lines_with_the_verdict_at_the_end_for_an_outcome_model():
    row = {"question": "Q", "6b": {"solution": "<<1+1=2>>2\nso\nA: 3", "is_correct": False}}
    [parsed] = parse_steps(row)
    assert (parsed["completions"], parsed["labels"]) == (["<<1+1=2>>2", "so", "A: 3"], [1.0, None, None])
    assert train_prm.labels_of(parsed, True, "good") == [NONE, NONE, 0.0]
    with pytest.raises(UserError, match="--outcome needs"):
        step_examples([row_of(["a"], [1.0])], WORLD, 64, True, "good")


@pytest.mark.parametrize(
    "labels, said",
    [([2], "labels"), (["yes"], "labels"), ([-0.1], "labels"), ([True, None], "1 steps but 2")],
)
def test_bad_labels_are_one_clear_sentence(tmp_path, labels, said):
    path = str(tmp_path / "rows.jsonl")
    write_rows(path, [{"prompt": "Hi", "completions": ["a"], "labels": labels}])
    with pytest.raises(UserError, match=f"line 1: .*{said}"):
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


# -------------------------------------------------------------------------------------------------- the world


def test_every_worked_step_follows_and_every_slip_is_found():
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(200):
            meta = problem(rng, held_out)["meta"]
            steps = [*meta["steps"], f"Answer: {meta['answer']}"]
            assert all(check_steps(meta, steps)) and 4 <= len(steps) <= 6
            i = rng.randrange(len(steps))
            head, _, result = steps[i].rpartition(" ")
            slip = [*steps[:i], f"{head} {int(result) + 1}", *steps[i + 1 :]]
            verdicts = check_steps(meta, slip)
            assert verdicts[:i] == [True] * i and not verdicts[i]


META = {"answer": 32, "steps": ["7 + 5 = 12", "12 * 3 = 36", "36 - 4 = 32"]}


@pytest.mark.parametrize(
    "steps, verdicts",
    [
        (["5 + 7 = 12", "3 * 12 = 36", "36 - 4 = 32", "Answer: 32"], "1111"),
        (["7 + 5 = 13", "13 * 3 = 39", "39 - 4 = 35", "Answer: 35"], "0111"),  # reckons on correctly
        (["7 + 5 = 13", "13 * 3 = 39", "39 - 4 = 35", "Answer: 32"], "0110"),  # right for no reason
        (["7 + 5 = 13", "12 * 3 = 36", "36 - 4 = 32", "Answer: 32"], "0011"),  # not what stands before it
        (["7 + 5 = 12", "36 - 4 = 32", "Answer: 32"], "100"),  # a step is missing
        (["7 + 5 = 12", "12 * 3 = 36", "4 - 36 = -32"], "110"),
        (["7 + 5 = 12", "12 * 3 = 36", "Answer: 36"], "110"),  # too early
        (["Answer: 32"], "0"),
        (["7 + 5 = 12", "7 + 5 = 12", "12 * 3 = 36"], "100"),  # repeated
        (["7 + 5 = 12", "", "12 * 3 = 36"], "101"),
        (["7 + 5 = 12", "12 * 3 = 36", "36 - 4 = 32", "Answer: 32", "Answer: 32"], "11110"),
        (["so 7 + 5 = 12"], "0"),
    ],
)
def test_a_step_follows_only_from_what_stands_before_it(steps, verdicts):
    assert check_steps(META, steps) == [v == "1" for v in verdicts]


def test_demonstrations_slip_as_often_as_stated_and_some_state_the_right_answer_all_the_same():
    rng, slipped, lucky = random.Random(1), 0, 0
    for _ in range(1000):
        meta = problem(rng, False)["meta"]
        steps = solution(meta, rng).split("\n")
        wrong = not all(check_steps(meta, steps))
        slipped += wrong
        lucky += wrong and steps[-1] == f"Answer: {meta['answer']}"
    assert 0.16 < slipped / 1000 < 0.24 and 0.35 < lucky / slipped < 0.65


# ------------------------------------------------------------------------------------ subsets and votes


def subsets_of(N, n):
    return [list(s) for s in itertools.combinations(range(N), n)]


@pytest.mark.parametrize("n", range(1, 8))
def test_estimators_are_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        right, scores = rng.random(7) < 0.4, rng.integers(0, 4, 7) / 3
        answers, weights = np.where(right, 1.0, rng.integers(2, 4, 7)), rng.integers(1, 3, 7).astype(float)
        answers[rng.random(7) < 0.2] = math.nan
        right &= ~np.isnan(answers)
        best, passed, voted = [], [], []
        for s in subsets_of(7, n):
            top = [i for i in s if scores[i] == scores[s].max()]
            best.append(np.mean(right[top]))
            passed.append(right[s].any())
            sums = {}
            for i in s:
                if not math.isnan(answers[i]):
                    sums[answers[i]] = sums.get(answers[i], 0) + weights[i]
            winners = [a for a in sums if sums[a] == max(sums.values())]
            voted.append(np.mean([a == 1.0 for a in winners]) if winners and right.any() else 0.0)
        chosen = np.array([[i in s for i in range(7)] for s in subsets_of(7, n)])
        assert best_at(right, scores, n) == pytest.approx(np.mean(best))
        assert pass_at(right, n) == pytest.approx(np.mean(passed))
        assert vote_at(right, answers, weights, chosen) == pytest.approx(np.mean(voted))


def test_the_table_draws_subsets_without_bias_and_errors_are_over_problems():
    rng = np.random.default_rng(0)
    right = rng.random((40, 8)) < 0.5
    answers = np.where(right, 1.0, 2.0)
    table = curves(right, answers, {"prm-min": right.astype(float)}, 4000, 0)
    assert list(table["mean"]) == [1, 2, 4, 8]
    for n, chosen in [(n, np.array([[i in s for i in range(8)] for s in subsets_of(8, n)])) for n in (2, 4)]:
        exact = np.mean([vote_at(r, a, np.ones(8), chosen) for r, a in zip(right, answers)])
        assert table["majority"][n][0] == pytest.approx(exact, abs=0.01)
    assert table["prm-min"] == table["pass"]  # a perfect model finds one wherever there is one
    assert table["mean"][4] == (pytest.approx(right.mean()), pytest.approx(right.mean(1).std() / 40**0.5))


# --------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("diverse", [False, True])
@pytest.mark.parametrize("width, expansions", [(1, 2), (2, 2), (3, 4)])
def test_search_with_a_perfect_model_finds_a_right_solution_wherever_the_tree_has_one(
    diverse, width, expansions
):
    """Trees of depth 4 whose leaves are right or wrong at random; a perfect model knows whether a right leaf
    lies below a node."""
    found = exists = 0
    for seed in range(60):
        rng = random.Random(seed)
        leaves = {leaf: rng.random() < 0.1 for leaf in itertools.product(range(expansions), repeat=4)}

        def below(node, leaves=leaves):
            return float(any(right for leaf, right in leaves.items() if leaf[: len(node)] == node))

        def expand(nodes):
            return [((*node, k), len(node) == 3) for node in nodes for k in range(expansions)]

        def score(nodes):
            return list(map(below, nodes))

        [solutions] = tree_search([()], expand, score, width, expansions, 6, diverse)
        exists += any(leaves.values())
        found += leaves[solutions[0][1]]
        assert len(solutions) == width
    assert 0 < exists < 61 and found == exists


def test_search_keeps_problems_apart_and_counts_a_beam_that_ends_early():
    def expand(nodes):
        return [(node + "a", len(node) >= 2 or node[0] == "y") for node in nodes] + []

    found = tree_search(["x", "y"], expand, lambda nodes: [float(len(n)) for n in nodes], 1, 1, 9, False)
    assert [[node for _, node in solutions] for solutions in found] == [["xaa"], ["ya"]]


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.fixture(scope="module")
def prm(world, sft, steps_file):
    path = str(world / "prm.pt")
    train_prm.main(train_prm.Config(init=sft, data=steps_file, out=path, batch_size=16, epochs=2))
    return path


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
    train_prm.main(train_prm.Config(init=sft, data=path, out=out, epochs=4, batch_size=16, lr=3e-3))
    last = [json.loads(line) for line in (tmp_path / "x.metrics.jsonl").read_text().splitlines()][-1]
    assert last["eval_auc"] > 0.99 and last["eval_f1"] > 0.9 and last["eval_ece"] < 0.1


def test_rewards_read_a_process_model_as_one_score_and_densely(world, prm, sft):
    from nanoalign.checkpoint import load_policy
    from nanoalign.generate import rollouts

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


def test_best_of_n_writes_its_table_and_searches(world, sft, prm, tmp_path, capsys):
    config = best_of_n.Config(
        policy=sft, prm=prm, orm=prm, problems=f"{world}/problems_held_out.jsonl", count=4, samples=4,
        subsets=5, max_new_tokens=32, show=2, depth=3, width=2, expansions=2, out=str(tmp_path / "x.csv"),
    )  # fmt: skip
    best_of_n.main(replace(config, search=("beam", "dvts")))
    out = capsys.readouterr().out
    assert all(word in out for word in ("beam, 2 × 2", "dvts, 2 × 2", "majority", "answer)"))
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines[0] == "selector,n,right,error" and len(lines) == 1 + 3 * 9 + 2
    with pytest.raises(UserError, match="--search sideways"):
        best_of_n.main(replace(config, search=("sideways",)))
    with pytest.raises(UserError, match="expected 'prm'"):
        best_of_n.main(replace(config, prm=sft))


def test_a_process_model_is_a_scalar_model_with_its_stage(prm):
    from nanoalign.checkpoint import load_scalar

    model, _, content = load_scalar(prm, "cpu", ("prm",))
    assert isinstance(model, ScalarGPT) and content["stage"] == "prm" and content["kind"] == "process"
