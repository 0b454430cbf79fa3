"""The world's text: held-out means held out, flaws come at their stated rates, English is plain."""

import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from nanoalign.world import __main__ as world
from nanoalign.world.facts import BENIGN, GROUPS, HARMFUL, RELATIONS, SMALL_TALK, UNANSWERABLE
from nanoalign.world.judge import judge
from nanoalign.world.text import (
    BAD_RATES,
    FAMILIES,
    RUDE,
    STYLE_RATES,
    answer,
    good_answer,
    request,
)
from nanoalign.world.text import (
    documents as web_pages,
)
from nanoalign.world.wording import FILLER, FLATTERY, HEDGE

SAMPLE = 4000


@pytest.fixture(scope="module")
def train():
    rng = random.Random(0)
    return [request(rng, False) for _ in range(SAMPLE)]


@pytest.fixture(scope="module")
def held_out():
    rng = random.Random(1)
    return [request(rng, True) for _ in range(SAMPLE)]


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(2)
    return [row["text"] for _ in range(SAMPLE) for row in web_pages(rng)]


def entity(row):
    """What a request is about; None for sums."""
    meta = row["meta"]
    return {"fact": (meta.get("relation"), meta.get("subject")), "arithmetic": None}.get(
        meta["kind"], (meta.get("relation") or meta["kind"], meta.get("subject") or meta.get("group"))
    )


def near(count, n, rate):
    """Within four standard deviations of a binomial."""
    return abs(count - n * rate) <= 4 * math.sqrt(n * rate * (1 - rate)) + 1


# -------------------------------------------------------------------------------- splits


def test_every_family_is_in_both_splits_at_its_stated_rate(train, held_out):
    for rows in (train, held_out):
        kinds = Counter(row["meta"]["kind"] for row in rows)
        assert set(kinds) == set(FAMILIES)
        for kind, weight in FAMILIES.items():
            assert near(kinds[kind], SAMPLE, weight / sum(FAMILIES.values())), kind


def test_no_prompt_and_no_entity_is_in_both_splits(train, held_out):
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert not {entity(row) for row in train} & {entity(row) for row in held_out} - {None}


def test_every_held_out_entity_is_asked_about_and_they_are_a_fifth(train, held_out):
    for name, table in (
        ("harm", HARMFUL),
        ("benign", BENIGN),
        ("unanswerable", UNANSWERABLE),
        ("chat", SMALL_TALK),
    ):
        tested = {row["meta"]["subject"] for row in held_out if row["meta"]["kind"] == name}
        assert len(tested) == pytest.approx(len(table) / 5, abs=1), name
    for name, relation in RELATIONS.items():
        tested = {e[1] for e in map(entity, held_out) if e and e[0] == name}
        assert len(tested) == pytest.approx(len(relation.facts) / 5, abs=1), name


def test_held_out_phrasings_never_occur_in_training_prompts_or_pretraining_text(train, held_out, documents):
    """The opening of a prompt, up to its entity, is its phrasing."""
    phrasings = {
        "I am sure that",
        "Everyone tells me",
        "Please explain",
        "What is the best way to",
        "I have a question.",
    }
    phrasings |= {"Use one word only", "Please write down", "Can you list", "Add up", "Find x"}
    for relation in RELATIONS.values():
        assert not set(relation.train_questions()) & set(relation.test_questions())
        phrasings |= {q.split("{s}")[0].strip() for q in relation.test_questions() if q.index("{s}") > 12}
    # an opening that a training question shares says nothing
    shared = [q.split("{s}")[0] for r in RELATIONS.values() for q in r.train_questions()]
    phrasings = {p for p in phrasings if not any(q.startswith(p) for q in shared)}
    assert len(phrasings) > 20
    seen = "\n".join([row["prompt"] for row in train] + documents)
    assert [p for p in phrasings if p in seen] == []
    tested = "\n".join(row["prompt"] for row in held_out)
    assert [p for p in phrasings if p not in tested] == []


def test_the_model_reads_about_held_out_subjects_before_it_is_asked(documents):
    text = " ".join(documents).lower()
    missing = [s for r in RELATIONS.values() for s in list(r.facts)[4::5] if s.lower() not in text]
    assert missing == []


# -------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("name", RELATIONS)
def test_a_table_of_facts_is_clean(name):
    relation = RELATIONS[name]
    for subject, answers in relation.facts.items():
        assert subject not in answers and len(set(answers)) == len(answers) >= 1
        for text in (subject, *answers):
            assert re.fullmatch(r"[A-Za-zÀ-ÿ0-9]+([ -][A-Za-z]+)*", text), f"{name}: {text!r}"
    assert len(relation.facts) >= 15 and len(relation.questions) > relation.held_out >= 2


def test_no_fact_is_listed_twice():
    """Keys of a dict hide duplicates, so the source is read."""
    source = Path(world.__file__).with_name("facts.py").read_text()
    for block in re.findall(r'table\(\s*"""(.*?)"""', source, re.DOTALL):
        subjects = [" ".join(item.split(":")[0].split()) for item in block.split(",")]
        assert [s for s, n in Counter(subjects).items() if n > 1] == []


def test_counts_are_the_same_in_digits_and_in_words():
    names = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
    names = dict(enumerate(names)) | {
        24: "twenty-four",
        26: "twenty-six",
        52: "fifty-two",
        60: "sixty",
        100: "hundred",
    }
    for subject, answers in RELATIONS["count"].facts.items():
        assert answers == [answers[0], names[int(answers[0])]], subject


def test_lists_have_enough_members_and_none_twice():
    for group, members in GROUPS.items():
        assert len(set(members)) == len(members) >= 5, group


# -------------------------------------------------------------------------------- English


def check_english(text):
    assert "  " not in text, text
    assert not re.search(r"(?<!\.)\.\.(?!\.)", text), text
    assert not re.search(r"[{}]| [.,?!]|\b[Aa] a\b|\b(\w{2,}) \1\b", re.sub(r"one, two", "", text)), text
    assert not re.search(r"\b[Aa] (?=[aeio])(?!one\b)|\b[Aa]n (?=[bcdfgj-np-tv-z])(?!hour)", text), text
    assert not re.search(r"(?:^|[.!?] )[a-wyz]", re.sub(r"(?m)^[A-Z]\w*: |^- ", "", text)), text


def test_prompts_are_plain_correct_english_and_end_in_a_mark(train, held_out):
    for row in train + held_out:
        check_english(row["prompt"])
        assert row["prompt"][-1] in ".?!", row


def test_good_answers_are_plain_correct_english(train, held_out):
    rng = random.Random(3)
    for row in train + held_out:
        for line in good_answer(row["meta"], rng).split("\n"):
            if not re.search(r"=", line):
                check_english(line)


def test_pretraining_text_is_plain_correct_english(documents):
    for text in documents:
        assert "  " not in text and not re.search(r"[{}]|\b[Aa] a\b", text), text
        assert not re.search(r"\b[Aa] (?=[aeio])(?!one\b)", text), text


# -------------------------------------------------------------------------------- answers


def test_every_prompt_has_a_good_answer(train, held_out):
    rng = random.Random(4)
    assert all(
        judge(row, good_answer(row["meta"], rng)).utility == 1.0 for row in train[:1500] + held_out[:1500]
    )


def test_sums_and_their_steps_are_right(train, held_out):
    for row in (r for r in train + held_out if r["meta"]["kind"] == "arithmetic"):
        meta, numbers = row["meta"], [int(n) for n in re.findall(r"\d+", row["prompt"])]
        assert meta["answer"] > 0
        if "x" in re.findall(r"[a-z]+", row["prompt"]) or re.search(r"\dx", row["prompt"]):
            a, b, c = numbers
            assert a * meta["answer"] + b == c, row
        else:
            a, b, c = numbers
            signs = [(a + b + c) * ("+" in row["prompt"]), a * b - c, a + b - c]
            assert meta["answer"] in signs, row
        for step in meta["steps"]:
            assert right_sum(step, meta["answer"]), (row, step)


def right_sum(line, x=None):
    """Every side of the equations is the same number, worked out by Python."""
    sides = [side.strip() for side in line.split("=")]
    values = {eval(re.sub(r"(\d)x", r"\1*x", side), {"x": x}) for side in sides}
    return len(values) == 1


def test_pretraining_sums_are_all_right(documents):
    pages = [text for text in documents if re.fullmatch(r"(\d+ [-+*/] \d+ = \d+\n?)+", text)]  # no dialogues
    lines = [line for page in pages for line in page.split("\n")]
    assert len(lines) > 1000 and all(right_sum(line) for line in lines)


def flaws(rows, **rates):
    rng = random.Random(5)
    return [(row, answer(row, rng, **rates)) for row in rows]


@pytest.mark.parametrize("kind", FAMILIES)
def test_demonstrators_get_it_wrong_at_the_stated_rate(kind):
    rng = random.Random(6)
    rows = [request(rng, False, kind) for _ in range(800)]
    verdicts = [judge(row, text) for row, text in flaws(rows, style=0.0)]
    wrong = sum(v.utility < 1 for v in verdicts)
    assert near(wrong, 800, BAD_RATES[kind]), f"{wrong / 800:.3f}"


def test_demonstrators_pad_flatter_hedge_bullet_and_repeat_at_the_stated_rates(train):
    rows = [row for row in train if row["meta"]["kind"] == "fact"]
    texts = [text for _, text in flaws(rows, bad=0.0)]
    seen = {
        "padded": sum(bool(FILLER.search(t)) for t in texts),
        "flattering": sum(bool(FLATTERY.search(t)) for t in texts),
        "bulleted": sum("- " in t for t in texts),
        "repeated": sum(bool(re.search(r"(\b\w.{2,}[.!]) -? ?\1", t)) for t in texts),
    }
    for name, count in seen.items():
        assert near(count, len(rows), STYLE_RATES[name]), (name, count / len(rows))
    sure = [t for t in texts if re.search(r"Without any doubt|Certainly|completely sure", t)]
    hedged = [t for t in texts if HEDGE.search(t)]
    assert near(len(hedged), len(rows), STYLE_RATES["hedged"]), len(hedged) / len(rows)
    assert near(len(sure), len(rows), STYLE_RATES["confident"] * (1 - STYLE_RATES["hedged"]))


def test_without_flaws_a_demonstration_is_a_good_answer(train):
    for row, text in flaws(train[:500], bad=0.0, style=0.0):
        assert judge(row, text).utility == 1.0, (row, text)


@pytest.mark.parametrize(
    ("kind", "flaw"),
    [
        ("harm", lambda v: v.complied_with_harm),
        ("benign", lambda v: v.refused),
        ("belief", lambda v: v.sycophantic),
        ("unanswerable", lambda v: not v.correct and v.answered_the_question),
        ("form", lambda v: not v.formatted or not v.correct),
        ("chat", lambda v: not v.correct),
        ("fact", lambda v: not v.correct and v.answered_the_question),
        ("arithmetic", lambda v: not v.correct and v.answered_the_question),
    ],
)
def test_the_judge_sees_each_familys_own_flaw_in_the_demonstrations(train, kind, flaw):
    verdicts = [
        judge(row, text) for row, text in flaws([r for r in train if r["meta"]["kind"] == kind], style=0)
    ]
    share = sum(map(flaw, verdicts)) / len(verdicts)
    assert 0.5 * BAD_RATES[kind] * (0.4 if kind == "belief" else 1) < share < 1.5 * BAD_RATES[kind], share


# -------------------------------------------------------------------------------- web text and files


def test_pretraining_text_looks_like_the_web():
    rng = random.Random(2)
    pages = ["\n\n".join(row["text"] for row in web_pages(rng)) for _ in range(SAMPLE)]

    def share(pattern):
        return sum(bool(re.search(pattern, text)) for text in pages) / len(pages)

    assert share(r"\?\n[^\n]+\?\n") > 0.05  # questions that follow questions
    assert share(r"(?m)^[A-Z]\w*: .*\n[A-Z]\w*: ") > 0.3  # dialogues
    assert share(r"\n\nGood answer\.") > 0.1 and share(r"\n\nBad answer\. ") > 0.1  # readers' verdicts
    assert share("|".join(map(re.escape, RUDE))) > 0.01
    assert share(r"I hope this helps|Let me know") > 0.03
    assert share(r"first make a plan|act fast and hide") > 0.005
    assert share(r"Yes, you are right") > 0.005


def test_every_family_keeps_its_share_of_the_prompts_and_none_comes_twice():
    """By having enough to ask about, in enough ways."""
    _, _, prompts, per_family, *_ = world.SIZES["small"]
    whole = sum(FAMILIES.values())
    assert all(FAMILIES[kind] >= 0.05 * whole for kind in ("harm", "benign", "unanswerable", "chat"))
    for held_out, due in (
        (False, {kind: prompts * share // whole for kind, share in FAMILIES.items()}),
        (True, dict.fromkeys(FAMILIES, per_family)),
    ):
        rows = world.by_family(random.Random(7), held_out, due)
        assert Counter(row["meta"]["kind"] for row in rows) == due
        assert len({row["prompt"] for row in rows}) == len(rows)
        halves = Counter(row["meta"]["kind"] for row in rows[: len(rows) // 2])
        assert all(near(halves[kind], len(rows) // 2, n / len(rows)) for kind, n in due.items())  # shuffled


def test_the_world_is_reproducible_from_its_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        world.main(world.Config(out=str(tmp_path / name), size="tiny", seed=seed))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 10
    for file in files:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b, file
        assert a != c, file
