"""What best_of_n.main wires up: solutions, their scores and the table, from what was sampled (wires.py)."""

import csv
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import wires
from runs import WORLD, write_lines
from wires import asked, logprobs, policy_at, spy

import best_of_n
from nanoalign import UserError
from nanoalign.answers import Number
from nanoalign.checkpoint import load_scalar

OFF = {  # every flag that has a say in what is computed, off its default
    "count": 3, "samples": 5, "subsets": 7, "search": ("dvts", "beam"), "width": 2, "expansions": 3,
    "depth": 2, "by": "product", "show": 1, "checker": "", "max_new_tokens": 8, "temperature": 0.8, "seed": 4,
    "device": "cpu:0",
}  # fmt: skip


@pytest.fixture
def config(tiny, tmp_path):
    problems = write_lines(tmp_path / "problems.jsonl", asked(4))
    models = {name: f"{tiny}/{name}.pt" for name in ("prm", "orm")}
    return best_of_n.Config(
        policy=f"{tiny}/solver.pt", problems=problems, **models, **OFF, out=f"{tmp_path}/t.csv"
    )


@pytest.fixture
def sampled(monkeypatch):
    """Answers are what a text's length says, 0 to 2; → every batch that is sampled."""
    monkeypatch.setattr(best_of_n, "final_answer", lambda text: Number(Fraction(len(text) % 3)))
    batches, original = [], best_of_n.rollouts

    def rollouts(model, tokenizer, prompts, limit, seed, **how):
        for indices, drawn in original(model, tokenizer, prompts, limit, seed, **how):
            batches.append((prompts, limit, seed, how, indices, drawn))
            yield indices, drawn

    monkeypatch.setattr(best_of_n, "rollouts", rollouts)
    return batches


def table_at(path):
    return list(csv.reader(Path(path).read_text().splitlines()))


def steps_of(model, ids, mask):
    """P(right) of each step of one response."""
    ends = [t for t in mask.nonzero().flatten().tolist() if ids[t] in (*WORLD.newlines, WORLD.end)]
    marked = ids.clone()
    marked[ends] = WORLD.step
    with torch.no_grad():
        return torch.sigmoid(model(marked[None])[0, ends])


def scores_of(p):
    return (
        {"min": p.min(), "product": p.prod(), "last": p[-1]}
        if len(p)
        else dict.fromkeys(("min", "product", "last"), 0)
    )


def test_solutions_are_scored_by_what_they_are_and_not_at_all_unless_they_end(
    config, sampled, monkeypatch, capsys
):
    drawn, tabled = spy(monkeypatch, best_of_n, "draw"), spy(monkeypatch, best_of_n, "curves")
    best_of_n.main(config)
    [found], policy = [call.result for call in drawn], policy_at(config.policy)
    prm, orm = (load_scalar(path, "cpu", ("prm",))[0] for path in (config.prm, config.orm))
    prompts, limit, seed, how, indices, new = sampled[0]
    rows = [asked(4)[i * 4 // 3] for i in range(3)]
    spelt = [WORLD.prompt(wires.user(row["prompt"])).tolist() for row in rows for _ in range(5)]
    assert [prompt.tolist() for prompt in prompts] == spelt and (limit, how["temperature"]) == (8, 0.8)
    assert seed == 4 and len(indices) == 15 and 0 < sum(new.ended.tolist()) < 15
    for i, ids, mask, ended in zip(indices, new.ids, new.mask, new.ended):
        at, p = divmod(i, 5), steps_of(prm, ids, mask)
        with torch.no_grad():
            logp = logprobs(policy, ids[None], mask[None], 0.8).sum().item()
        due = {f"prm-{name}": value * ended for name, value in scores_of(p).items()}
        due |= {
            "orm": scores_of(steps_of(orm, ids, mask))["last"] * ended,
            "likelihood": logp if ended else -math.inf,
        }
        for name, value in due.items():
            assert found["scores"][name][at] == pytest.approx(float(value), rel=1e-4), name
        text = WORLD.decode_response(ids[mask])
        assert found["texts"][at] == text and found["tokens"][at] == mask.sum()
        assert found["steps"][at] == pytest.approx(p.tolist(), rel=1e-4)
        assert found["right"][at] == (len(text) % 3 == rows[at[0]]["meta"]["answer"])
    assert found["scores"].keys() == {"likelihood", "prm-min", "prm-product", "prm-last", "orm"}
    [call] = tabled
    assert (
        call.right is found["right"] and call.answers is found["answers"] and call.scores is found["scores"]
    )
    assert (call.subsets, call.seed) == (7, 4)
    table, written = call.result, table_at(config.out)
    assert written[0] == ["selector", "n", "right", "error"]
    cells = {(name, int(n)): (float(right), float(error)) for name, n, right, error in written[1:]}
    for name in ("mean", "pass", "majority", "vote", *found["scores"]):
        for n in (1, 2, 4, 5):
            assert cells[name, n] == pytest.approx(table[name][n])
    out = capsys.readouterr().out
    for name in ("mean", "orm"):
        shown = "".join(f"{f'{right:.3f} ± {error:.3f}':>14}" for right, error in table[name].values())
        assert f"{name:>12}{shown}\n" in out
    assert "\n3 problems; share right" in out and f"{'n':>12}{1:>14}{2:>14}{4:>14}{5:>14}" in out
    assert out.count(rows[0]["prompt"]) == 1 and rows[1]["prompt"] not in out


def test_search_counts_every_token_it_samples_and_is_compared_at_that_price(
    config, sampled, monkeypatch, capsys
):
    drawn, trees = spy(monkeypatch, best_of_n, "draw"), spy(monkeypatch, best_of_n, "tree_search")
    ends = []
    original = best_of_n.tree_search

    def tree_search(*args, **options):
        ends.append(len(sampled))
        result = original(*args, **options)
        ends.append(len(sampled))
        return result

    monkeypatch.setattr(best_of_n, "tree_search", tree_search)
    best_of_n.main(config)
    out, found = capsys.readouterr().out, drawn[0].result
    each = found["tokens"].mean()
    cells = [line for line in table_at(config.out) if line[0] in ("beam", "dvts")]
    assert [line[0] for line in cells] == ["dvts", "beam"]
    seeds = set()
    for k, (kind, tree) in enumerate(zip(config.search, trees)):
        batches = sampled[ends[2 * k] : ends[2 * k + 1]]
        cost = sum(int(batch[5].mask.sum()) for batch in batches) / 3
        assert f"{kind}, 2 × 3, by product: " in out and f" right, {cost:.0f} tokens a problem" in out
        n = min(5, max(1, round(cost / each)))
        assert f"best of {n} by prm-product: " in out and int(cells[k][1]) == n
        equal = [best_of_n.best_at(*own, n) for own in zip(found["right"], found["scores"]["prm-product"])]
        assert f"by prm-product: {np.mean(equal):.3f} ± " in out
        assert (tree.width, tree.expansions, tree.depth, tree.diverse) == (2, 3, 2, kind == "dvts")
        best = [WORLD.decode_response(own[0][1][1][own[0][1][0] :]) for own in tree.result]
        right = [
            len(text) % 3 == row["meta"]["answer"]
            for text, row in zip(best, (asked(4)[i] for i in (0, 1, 2)))
        ]
        assert float(cells[k][2]) == pytest.approx(np.mean(right))
        for _, limit, seed, how, _, _ in batches:
            assert (limit, how["temperature"]) == (8, 0.8) and list(how["stops"]) == WORLD.newlines
            seeds.add(seed)
    assert len(seeds) >= 2 and 4 not in seeds


def test_best_of_n_refuses_what_it_cannot_do(config, tiny):
    for word, changes in [
        ("--search", {"search": ("beam", "greedy")}), ("--by", {"by": "mean"}), ("--samples", {"depth": 0}),
        ("--temperature", {"temperature": 0.0}), ("chat model", {"policy": f"{tiny}/base.pt"}),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=word):
            best_of_n.main(wires.replaced(config, **changes))
    ones = dict.fromkeys(("samples", "count", "subsets", "width", "expansions", "depth"), 1)
    best_of_n.main(wires.replaced(config, **ones))  # the least of everything is fine


def test_without_an_outcome_model_there_is_no_column_for_it_and_the_checker_marks_steps(
    config, sampled, tmp_path, capsys
):
    (tmp_path / "checks.py").write_text(
        "def check(meta, steps):\n    return [len(step) > 3 for step in steps]\n"
    )
    rows = [{**row, "meta": {**row["meta"], "steps": []}} for row in asked(4)]
    problems = write_lines(tmp_path / "steps.jsonl", rows)
    own = wires.replaced(
        config, orm="", search=(), checker=f"{tmp_path}/checks.py:check", problems=problems, show=9
    )
    best_of_n.main(own)
    out = capsys.readouterr().out
    assert not re.search(r"^ +orm ", out, re.MULTILINE) and ("✓" in out or "✗" in out)
    assert all(row["prompt"] in out for row in (rows[0], rows[1], rows[2])) and json.dumps("") not in out
