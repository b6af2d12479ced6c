"""Code blocks of the README and docs/, and the commands in them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path) -> list[tuple[str, str]]:
    """Returns (language, text) of each fenced block of a page."""
    return blocks_of(path.read_text())


def blocks_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a block, one string each, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines]
    return [line for line in lines if re.match(r"python |scripts/|ruff ", line)]


def apply_diff(text: str, root: pathlib.Path) -> None:
    """Applies a `diff` block to the file that its first line names; `...` separates the hunks."""
    head, _, body = text.partition("\n")
    path = root / head.removeprefix("# ")
    source = path.read_text()
    for hunk in body.split("\n...\n"):
        lines = hunk.strip("\n").splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in ("+", "-"))
        assert source.count(old) == 1, f"{path} does not contain once:\n{old}"
        source = source.replace(old, new)
    path.write_text(source)
