"""Links between pages lead somewhere. Links to other hosts are not checked, because nothing is fetched."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")] + sorted(
    DOCS.rglob("*.md")
)


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> Iterator[str]:
    """The targets of a page's links and pictures outside of code."""
    for target in re.findall(r"\]\(<?([^)\s>]+)", re.sub(r"`[^`\n]*`", "`", prose(text))):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            yield target


def plain(heading: str) -> str:
    """A heading's words, without links and marks."""
    return re.sub(r"[`*]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip()


def github(heading: str) -> str:
    """The anchor that GitHub gives a heading: letters, digits, hyphens and underscores, and a hyphen for each blank."""
    return re.sub(r"[^\w\- ]", "", plain(heading).lower()).replace(" ", "-")


def mkdocs(heading: str) -> str:
    """The anchor that mkdocs gives a heading: ASCII only, and one hyphen for a row of blanks and hyphens."""
    ascii_only = unicodedata.normalize("NFKD", plain(heading)).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors(text: str) -> set[str]:
    """The anchors that are the same on GitHub and in the built manual. A heading that comes twice has none."""
    found = re.findall(r"^#{1,6} +(.+?)\s*$", prose(text), re.MULTILINE)
    both = [github(heading) for heading in found if github(heading) == mkdocs(heading)]
    return {anchor for anchor in both if both.count(anchor) == 1}


def leads_somewhere(page: Path, text: str, target: str) -> bool:
    """Whether a link on a page with this text names an existing file or folder of ours, and an existing anchor."""
    path, _, anchor = unquote(target).partition("#")
    there = (page.parent / path).resolve() if path else page
    if not there.exists() or not there.is_relative_to(ROOT):
        return False
    return not anchor or (there.suffix == ".md" and anchor in anchors(there.read_text() if path else text))


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    return [target for target in links(text) if not leads_somewhere(page, text, target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files and folders exist, and anchors are headings of the page they name."""
    assert broken(page, page.read_text()) == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_the_manual_stands_alone(page: Path) -> None:
    """The manual's pages link to nothing outside of docs/, because the built site has only these. The menu has all."""
    outside = [link for link in links(page.read_text()) if not (page.parent / link).resolve().is_relative_to(DOCS)]
    assert outside == []
    assert re.search(
        rf"[-:] {re.escape(str(page.relative_to(DOCS)))}$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )


def test_the_readme_is_short() -> None:
    """The README is short enough to be read in one go, because longer texts have pages in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    ("target", "leads"),
    [
        ("docs/rest.md", True), ("docs/rest.md#cells", True), ("docs/adr/", True), ("#a-part", True), ("LICENSE", True),
        ("docs/none.md", False), ("docs/rest.md#none", False), ("#none", False), ("#twice", False),
        ("LICENSE#a", False), ("../", False), ("https://nowhere.invalid/", True), ("mailto:me@nowhere.invalid", True),
    ],
)  # fmt: skip
def test_a_broken_link_is_found(target: str, leads: bool) -> None:
    """The check finds wrong paths and anchors, also of headings that come twice. It accepts other hosts."""
    text = f"# A `part`\n## Twice\n## Twice\n[words]({target})\n```\n[code](nowhere)\n```\n`[code](nowhere)`\n"
    assert (broken(ROOT / "README.md", text) == []) is leads


@pytest.mark.parametrize(
    ("heading", "on_github", "in_the_manual"),
    [
        ("What crosses, and what does not", "what-crosses-and-what-does-not", "what-crosses-and-what-does-not"),
        ("`POST /sandboxes/{id}/execute`", "post-sandboxesidexecute", "post-sandboxesidexecute"),
        ("One & two", "one--two", "one-two"),
        ("Grüße", "grüße", "grue"),
    ],
)
def test_anchors_of_headings(heading: str, on_github: str, in_the_manual: str) -> None:
    """GitHub and the built manual have different rules, which agree for most headings."""
    assert (github(heading), mkdocs(heading)) == (on_github, in_the_manual)
