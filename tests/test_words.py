"""Plain English: phrases and names that must not come back into code, tests and docs."""

import ast
import io
import json
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("rec_jax", "experiments", "configs", "tests", "scripts", "docs", "notebooks")
TEXTS = sorted(
    path
    for path in [
        *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*")),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.cfg"),
    ]
    if path.is_file()
    and path.suffix in ("", ".py", ".md", ".sh", ".cfg", ".ipynb")
    and path != pathlib.Path(__file__)
)

# Regular expressions over the text in lower case, with one blank for any white space: {phrase: say instead}.
PHRASES = {
    r"\bforetell\w*": "predict",
    r"\b(goes|go|going|went) on\b": "resumes, continues",
    r"\basked\b(?! questions)": "requested; query positions",
    r"\bnothing is asked for": "no compression requested: set ...",
    r"\btables? of items\b": "item embedding table",
    r"\bspread\b": "sharded; standard deviation",
    r"\b(lies|lie|lay)\b": "is placed; is, has",
    r"\btouche[sd]\b|\btouching\b": "the entries a batch reads",
    r"\bscores? by themselves\b": "Matryoshka prefixes",
    r"\banything could reach\b": "the oracle's NDCG@10",
    r"\bin expectation\b": "expected metric over random orderings",
    r"\b(model|models|one|those) that generates?\b": "generative retrieval model",
    r"\bbeginnings? of (the )?codes\b": "trie nodes, prefix embeddings",
    r"\blearns? to do (with|without)\b": "logit adjustment by log-popularity",
    r"\bviews of (the )?vectors\b|\bseveral views\b": "Matryoshka and multi-token losses",
    r"\bfind each other\b|\btake turns\b": "initialisation, barriers, broadcasts",
    r"\bin turns?\b": "interleaved, alternating",
    r"\bwires?\b": "communication",
    r"\bbehind\b": "after",
    r"\b(is|are) missing of\b": "missing runs",
    r"\bsaid here\b": "Set explicitly: ...",
    r"\bmeaningless\b": "placeholder",
    r"\b(does|do) not go with\b": "is not supported with",
    r"\bas late as\b|\bwho(m|se)?ever\b": "after; across users",
    r"\bone's own\b": "your own",
    r"\bbut for\b": "except for",
    r"\bat hand\b": "available",
    r"\btold? apart\b|\btells? (\w+ ){0,2}apart\b": "distinguished",
    r"\bof late\b|\bhitherto\b|\bthence\b|\bwherefore\b": "a plain word",
}
# Names of variables, parameters, attributes and functions, without a suffix of dimensions (_BSD).
NAMES = {
    "asked", "at", "behind", "extras", "found", "more", "said", "spread", "there", "told", "touched",
}  # fmt: skip
# A docstring or comment begins with its noun or verb.
FIRST_WORDS = {"Of", "Times", "Which", "What", "Whose", "That", "Those", "How", "Said"}


def plain(path) -> str:
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    if path.suffix in (".py", ".sh", ""):
        text = re.sub(r"\n\s*#", "\n", text)  # a comment of several lines
    return text


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_phrases(path):
    text = re.sub(r"\s+", " ", plain(path)).lower()
    hits = [
        f"{text[max(match.start() - 40, 0) : match.end() + 30]!r}: say {instead}"
        for phrase, instead in PHRASES.items()
        for match in re.finditer(phrase, text)
    ]
    assert not hits, "\n".join(hits)


SOURCES = [path for path in TEXTS if path.suffix == ".py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    assert not {name for name in names if re.sub(r"_[A-Za-z0-9]{1,5}$|^_", "", name) in NAMES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_words(path):
    source = path.read_text()
    firsts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (
            text := ast.get_docstring(node)
        ):
            firsts.append(text)
    comments = [
        (token.start[0], token.string.lstrip("# "))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    previous = -1
    for line, text in comments:
        if line != previous + 1 and text:
            firsts.append(text)
        previous = line
    assert not [text for text in firsts if text.split()[0].strip("\"'`,:") in FIRST_WORDS]
