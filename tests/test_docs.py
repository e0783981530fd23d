"""The Python in docs/ runs, and prints what it says."""

import re
import sys

import pytest

from tests.support.processes import REPOSITORY, run

SNIPPETS = {
    page.name: "".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))
    for page in (REPOSITORY / "docs").glob("*.md")
}


@pytest.mark.parametrize("name", [name for name, code in SNIPPETS.items() if code])
def test_snippets_print_what_their_comments_say(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code = SNIPPETS[name]
    result = run([sys.executable, "-c", code], tmp_path_factory.mktemp("docs"), timeout_s=120)
    assert result.returncode == 0, result.stdout
    comments = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert comments
    for line, comment in zip(result.stdout.splitlines(), comments, strict=True):
        assert comment.startswith(line)  # and goes on to explain it
