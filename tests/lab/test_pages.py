"""A page's tables are what its commands print."""

import pytest

from lab import pages
from nanoalign import UserError

PAGE = """# Title

<!-- python -m lab.seeds a.json b.json -->
| old |
<!-- end -->

Text <!-- python -m os -->.
"""


def test_what_stands_below_a_command_is_replaced_and_nothing_else():
    asked = []
    page = pages.renewed(PAGE, run=lambda command: asked.append(command) or "| new |\n| 1 |")
    assert asked == ["python -m lab.seeds a.json b.json"]
    assert page == PAGE.replace("| old |", "| new |\n| 1 |")
    assert pages.renewed(page, run=lambda command: "| new |\n| 1 |") == page


def test_only_the_laboratorys_own_commands_are_run():
    for command in ("python -m os", "python -c 1", "rm -rf x", "python evaluate.py"):
        text = f"<!-- {command} -->\nx\n<!-- end -->\n"
        assert pages.renewed(text, run=lambda command: pytest.fail(command)) == text


@pytest.mark.parametrize("last", ["", "<!-- python -m lab.seeds c.json -->\n| 2 |\n<!-- end -->\n"])
def test_a_table_without_an_end_takes_nothing_with_it(last):
    page = "<!-- python -m lab.seeds a.json -->\n| 1 |\n\nProse.\n" + last
    with pytest.raises(UserError, match="has no `<!-- end -->`"):
        pages.renewed(page, run=lambda command: pytest.fail(command))


def test_a_command_that_fails_leaves_the_page_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- python -m lab.seeds no-such-file.json -->\n| 1 |\n<!-- end -->\n")
    before = page.read_text()
    with pytest.raises(UserError, match=r"lab.seeds no-such-file.json` failed: .*no-such-file.json"):
        pages.main([str(page)])
    assert page.read_text() == before
    with pytest.raises(UserError, match="name the pages"):
        pages.main([])
