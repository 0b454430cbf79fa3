"""Best of n and step search: estimators by enumerating subsets, search by enumerating trees."""

import itertools
import math
import random
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import WORLD

import best_of_n
from best_of_n import best_at, curves, pass_at, tree_search, vote_at
from nanoalign import UserError
from nanoalign.generate import Rollout

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
    assert table["mean"][4] == (
        pytest.approx(right.mean()),
        pytest.approx(right.mean(1).std(ddof=1) / 40**0.5),
    )


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


def test_equal_prefixes_are_one_and_what_is_unfinished_at_the_last_step_comes_last():
    asked = []

    def expand(nodes):  # each node's two steps are the same one, but for the first prefix's
        asked.append(nodes)
        return [
            (node + step, node + step == "xbb") for node in nodes for step in ("ab" if node == "x" else "bb")
        ]

    def score(nodes):
        return [0.9 if "a" in node else 0.5 for node in nodes]

    [beam] = tree_search(["x"], expand, score, 3, 2, 3, False)
    assert asked == [["x"] * 3, ["xa", "xb"], ["xab"]]
    assert beam == [(0.5, "xbb"), (0.0, "xabb")]
    asked.clear()
    [diverse] = tree_search(["x"], expand, score, 3, 2, 1, True)  # each prefix goes another way, or ends
    assert diverse == [(0.0, "xa"), (0.0, "xb")]


TREE = {  # what follows the steps so far, and whether it ends there
    "": (("Go on.\n", False), ("Stop it.\n", False)),
    "Go on.\n": (("Answer: 4", False), ("Answer: 4", False)),
    "Stop it.\n": (("Answer: 3", True), ("Answer: 5\n", False)),
    "Stop it.\nAnswer: 5\n": (("Answer: 3", True), ("Answer: 3", True)),
}


@pytest.fixture
def searched(monkeypatch, capsys):
    """searched(kind, …) → the share right, the tokens a problem and the n of a search in `TREE`, where a
    process model likes all that begins with "Go on."."""

    def rollouts(policy, tokenizer, prompts, limit, seed, stops, temperature, into):
        assert list(stops) == WORLD.newlines and temperature == 0.7
        new, seen = [], Counter()
        for ids in prompts:
            so_far = WORLD.decode(ids[len(ASKED) :].tolist())
            text, ended = TREE[so_far][seen[so_far] % 2]
            seen[so_far] += 1
            new.append((ids, [*WORLD.encode(text), *[WORLD.end] * ended], ended))
        rows = [torch.tensor([*ids, *step]) for ids, step, _ in new]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, WORLD.pad)
        at = torch.arange(ids.shape[1])
        starts, ends = (torch.tensor([[n] for n in column]) for column in zip(*(
            (len(ids), len(ids) + len(step)) for ids, step, _ in new)))  # fmt: skip
        ended = torch.tensor([ended for *_, ended in new])
        yield list(range(len(new))), Rollout(ids, (at >= starts) & (at < ends), ids.float(), ended)

    def prm(indices, drawn):
        assert not drawn.mask[:, : len(ASKED)].any() and drawn.mask[:, len(ASKED)].all()
        liked = drawn.ids[:, len(ASKED)] == WORLD.encode("Go on.")[0]
        return torch.where(liked, 0.9, 0.4)[:, None].expand(drawn.ids.shape)

    def searched(kind, **changes):
        flags = {"width": 2, "expansions": 2, "depth": 2, "samples": 8, "temperature": 0.7, **changes}
        drawn = {"tokens": np.full((1, 8), 10.0), "right": np.ones((1, 8), bool)}
        drawn["scores"] = {"prm-min": np.ones((1, 8))}
        policy = SimpleNamespace(config=SimpleNamespace(context=128))
        row = {"prompt": [{"role": "user", "content": "1 + 2?"}], "meta": {"answer": 3}}
        found = best_of_n.search(kind, policy, prm, WORLD, [row], drawn, best_of_n.Config(**flags))
        [(n, (right, _))] = found.items()
        return right, int(re.search(r"right, (\d+) tokens", capsys.readouterr().out)[1]), n

    monkeypatch.setattr(best_of_n, "rollouts", rollouts)
    return searched


ASKED = WORLD.prompt([{"role": "user", "content": "1 + 2?"}])


def length(text, ended=False):
    return len(WORLD.encode(text)) + ended


@pytest.mark.parametrize("kind", ["beam", "dvts"])
def test_search_counts_every_sampled_token_and_an_unfinished_solution_scores_0_in_it(kind, searched):
    """The process model likes "Answer: 4" better, which has not ended; as best-of-n has it, that scores 0."""
    first = 2 * (length("Go on.\n") + length("Stop it.\n"))
    then = 2 * length("Answer: 4") + length("Answer: 3", True) + length("Answer: 5\n")
    right, tokens, n = searched(kind)
    assert right == 1 and tokens == first + then and n == min(8, round(tokens / 10))
    right, tokens, _ = searched(kind, depth=1)  # nothing has ended: all are alike, and the first is none
    assert right == 0 and tokens == first


def test_a_solution_is_as_long_at_most_in_search_as_in_best_of_n(searched):
    """--max-new-tokens is of the whole solution, not of each step."""
    whole = length("Stop it.\n") + length("Answer: 3", True)
    assert searched("beam", max_new_tokens=whole)[0] == 1
    assert searched("beam", max_new_tokens=whole - 1)[0] == 0


# ------------------------------------------------------------------------------------------------ the script


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


def test_votes_are_cast_for_equal_numbers_however_they_are_written(monkeypatch):
    said = ["Answer: 1/2", "A: 0.5", "#### 9007199254740993", "#### 9007199254740992", "none", "5 or 6"]
    prompt = [{"role": "user", "content": "?"}]
    half, exact = ({"prompt": prompt, "meta": {"answer": gold}} for gold in ("0.5", 2**53))
    mask = torch.ones(6, 1, dtype=torch.bool)

    def rollouts(*_, **__):
        for start in (0, 6):  # the same six solutions of both problems
            yield range(start, start + 6), Rollout(mask.long(), mask, 0.0 * mask, mask[:, 0])

    monkeypatch.setattr(best_of_n, "rollouts", rollouts)
    texts = iter(said * 2)
    monkeypatch.setattr(type(WORLD), "decode_response", lambda *_: next(texts))
    config = best_of_n.Config(samples=6)
    drawn = best_of_n.draw(None, lambda rows, new: 0.0 * new.logp, None, WORLD, [half, exact], config)
    assert drawn["right"].tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    answers = drawn["answers"]
    assert (answers[0] == answers[1]).tolist() == [True] * 4 + [False] * 2 and np.isnan(answers[:, 4:]).all()
    assert answers[0, 0] == answers[0, 1] and len({*answers[0, :4]}) == 3
