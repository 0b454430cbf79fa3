"""Every script that reads rows itself hands on --skip-bad-rows and --fields (the others use read_split)."""

import importlib

import pytest

READERS = {  # script: the flag that names its rows, their kind, and what it needs first
    "train_pretrain": ("data", "text", {"model": "world-nano"}),
    "collect": ("prompts", "prompts", {"policy": "{tiny}/policy.pt", "annotator": "human"}),
    "critique": ("prompts", "prompts", {"policy": "{tiny}/policy.pt"}),
    "evaluate": ("prompts", "prompts", {"checkpoints": ("{tiny}/policy.pt",)}),
    "best_of_n": ("problems", "prompts", {"policy": "{tiny}/solver.pt", "prm": "{tiny}/prm.pt"}),
}


class Asked(Exception):
    pass


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_rows_are_read_as_the_flags_say(name, skip, tiny, tmp_path, monkeypatch):
    flag, kind, needs = READERS[name]
    script, given = importlib.import_module(name), []

    def read_rows(*args):
        given.extend(args)
        raise Asked

    monkeypatch.setattr(script, "read_rows", read_rows)
    needs = {
        k: tuple(x.format(tiny=tiny) for x in v) if isinstance(v, tuple) else v.format(tiny=tiny)
        for k, v in needs.items()
    }
    flags = {**needs, flag: "mine.jsonl", "skip_bad_rows": skip, "fields": f"{kind}=theirs"}
    with pytest.raises(Asked):
        script.main(script.Config(**flags, out=str(tmp_path / "x.pt")))
    assert given == ["mine.jsonl", kind, skip, f"{kind}=theirs"]
