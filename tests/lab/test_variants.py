"""The variants of the demo's rows are what their names say; people without a taste have none."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

import collect
from lab import tastes, variants
from lab.shuffled_pairs import one_by_one
from nanoalign import UserError
from nanoalign.data import prompt_key
from nanoalign.rows import write_rows
from nanoalign.world.judge import judge
from nanoalign.world.people import compare, impression, people
from nanoalign.world.text import answer, bad_answer, good_answer, request, restyle


def some_pairs(count=60):
    rng, rows = random.Random(0), []
    for i in range(count):
        row = request(rng, False)
        for _ in range(2):
            good, bad = good_answer(row["meta"], rng), bad_answer(row["meta"], rng)
            sides = (good, bad) if i % 3 else (bad, good)
            rows.append(
                {"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1], "meta": row["meta"]}
            )
    return [row for row in rows if row["chosen"] != row["rejected"]]


def varied(tmp_path, kind, rows, **flags):
    source, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl")
    write_rows(source, rows)
    variants.varies(kind)[0](variants.Config(rows=source, out=out, **flags))
    return [json.loads(line) for line in open(out, encoding="utf-8")]


def test_clean_demonstrations_have_the_full_utility(tmp_path):
    rng, rows = random.Random(1), []
    for _ in range(200):
        row = request(rng, False)
        rows.append({"prompt": row["prompt"], "completion": answer(row, rng), "meta": row["meta"]})
    found = varied(tmp_path, variants.clean, rows, count=50)
    assert len(found) == 50
    for row in found:
        *prompt, said = row["messages"]
        assert judge({"prompt": prompt, "meta": row["meta"]}, said["content"]).utility == 1


def test_a_part_has_all_pairs_of_its_prompts(tmp_path):
    rows = some_pairs()
    found = varied(tmp_path, variants.part, rows, share=0.25)
    keys = {prompt_key(row) for row in rows}
    kept = {
        row["prompt"][-1]["content"] if isinstance(row["prompt"], list) else row["prompt"] for row in found
    }
    assert len(kept) == round(0.25 * len(keys))
    assert len(found) == sum(row["prompt"] in kept for row in rows)


def test_a_share_of_the_labels_is_flipped_and_nothing_else(tmp_path):
    rows = some_pairs(300)
    found = varied(tmp_path, variants.flip, rows, share=0.2)
    flipped = [own["chosen"] == row["rejected"] for own, row in zip(found, rows)]
    assert len(found) == len(rows) and 0.13 < sum(flipped) / len(rows) < 0.27
    same = [
        {own["chosen"], own["rejected"]} == {row["chosen"], row["rejected"]} for own, row in zip(found, rows)
    ]
    assert all(same)


def test_the_odds_of_a_flipped_pair_are_not_those_of_its_sides_before(tmp_path):
    rows = [{**row, "meta": row["meta"] | {"p_chosen": 0.9}} for row in some_pairs()]
    found = varied(tmp_path, variants.flip, rows, share=0.5)
    for own, row in zip(found, rows):
        assert ("p_chosen" in own["meta"]) == (own["chosen"] == row["chosen"])


@pytest.mark.parametrize("flags", [{"share": 0.0}, {"share": 5.0}, {"count": 0}])
def test_a_share_is_one(tmp_path, flags):
    with pytest.raises(UserError, match="--share is above 0 and at most 1"):
        varied(tmp_path, variants.part, some_pairs(), **flags)


def test_certain_pairs_are_one_a_prompt_with_the_judges_side_first(tmp_path):
    found = varied(tmp_path, variants.certain, some_pairs(), count=20)
    assert len({json.dumps(row["prompt"]) for row in found}) == len(found) == 20
    for row in found:
        chosen, rejected = (judge(row, row[side]).utility for side in ("chosen", "rejected"))
        assert chosen > rejected


def test_lopsided_thumbs_have_the_share_asked_for_and_as_many_as_there_are(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "x", "label": i % 2 == 0} for i in range(100)]
    found = varied(tmp_path, variants.lopsided, rows, share=0.9)
    assert sum(row["label"] for row in found) == 50 and len(found) == 56
    with pytest.raises(UserError, match="no row for lopsided"):
        varied(tmp_path, variants.lopsided, rows, share=1.0)


def test_people_without_a_taste_judge_as_if_it_were_zero():
    rng = random.Random(2)
    row = {**request(rng, False, "belief")}
    row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    good = good_answer(row["meta"], rng)
    texts = [(good, True), (restyle(good, "flattering", rng), True)]
    flags = SimpleNamespace(seed=0, crowd=5, votes=1, prompts="x")

    def p_first(annotate, *more):
        comparisons, _ = annotate(
            [row], [list(texts)], lambda r, t: collect.pairings(r, t, True), flags, *more
        )
        [c] = comparisons
        return c["meta"]["p_first"] if c["responses"][0] == good else 1 - c["meta"]["p_first"]

    def expected(off):
        seen = [impression(row, text) for text, _ in texts]
        total = 0
        for one in people(5):
            biases = {name: 0 if name in off else x for name, x in one.biases.items()}
            a, b = (s["judge"] + sum(biases[k] * s[k] for k in biases) for s in seen)
            total += 1 / (1 + math.exp((b - a) / one.noise))
        return total / 5

    assert p_first(compare) == pytest.approx(expected(()), abs=1e-4)
    assert p_first(tastes.without, "flattery") == pytest.approx(expected(("flattery",)), abs=1e-4)
    everything = p_first(tastes.without, "all")
    assert everything > p_first(compare)
    assert everything == pytest.approx(expected(people(1)[0].biases), abs=1e-4)
    with pytest.raises(UserError, match="no taste called kindness"):
        tastes.without([row], [list(texts)], None, flags, "kindness")


def test_shuffled_pairs_are_prompts_of_their_own():
    pairs = [
        ((np.array([1, i]), np.array([False, True])), (np.array([1, 9]), np.array([False, True])))
        for i in (2, 3)
    ]
    first, second = one_by_one(pairs, [{"a": 1}, {"a": 2}])
    assert [len(p.responses) for p in (first, second)] == [2, 2] and second.rows == [{"a": 2}]
    assert (
        first.responses[first.chosen[0]] is pairs[0][0] and first.responses[first.rejected[0]] is pairs[0][1]
    )
