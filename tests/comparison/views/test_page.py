"""The page is one file, holds exactly the data, and nothing in a record can become markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import HOSTILE, compare_runs, make_broken_run, make_linears, make_run

from mi_experiments.comparison.views.data import to_plain
from mi_experiments.comparison.views.page import to_script_json, write_page


class Page(HTMLParser):
    """A page as a browser reads it: its elements, and the text of each kind of them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.inside, []).append(data)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Write runs whose names, texts, errors, settings and linears would like to be code."""
    root = tmp_path / "sweep"
    for job, name in enumerate(HOSTILE):
        safe = name.replace("/", "∕")
        make_run(
            root / f"{job} {safe}", {name: 0.1 + job}, model__path=name, n_groups__grouping=name
        )
        make_linears(root / f"{job} {safe}", prefix=name)
    make_broken_run(root / "9", "failed", HOSTILE[0], model__name=HOSTILE[1])
    return root


def test_the_data_on_the_page_are_those_of_the_records(hostile: Path) -> None:
    comparison = compare_runs(hostile)
    page = Page(write_page(comparison))
    (kept,) = [json.loads(text) for text in page.texts["script"] if text.startswith("{")]
    assert kept == json.loads(json.dumps(to_plain(comparison)))


def test_nothing_in_a_record_becomes_an_element(hostile: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "tame" / "0")
    tame = Page(write_page(compare_runs(tmp_path / "tame")))
    wild = Page(write_page(compare_runs(hostile, "--sort", "-excess")))
    assert [tag for tag, _ in wild.elements] == [tag for tag, _ in tame.elements]
    assert wild.texts["style"] == tame.texts["style"]
    assert wild.texts["script"][1:] == tame.texts["script"][1:]
    assert len(wild.texts["script"]) == 2


def test_the_page_needs_nothing_else(hostile: Path) -> None:
    page = Page(write_page(compare_runs(hostile)))
    references = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in {"src", "href", "action", "srcset", "data", "poster", "style"}
        or name.startswith("on")
    ]
    assert references == ["#table"]
    for text in (*page.texts["style"], page.texts["script"][1]):
        assert not re.search(
            r"@import|url\(|\bfetch\b|XMLHttpRequest|\bimport\b|eval|innerHTML", text
        )


def test_the_policy_allows_this_style_and_this_script_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    page = Page(write_page(compare_runs(tmp_path)))
    (policy,) = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for element, rule in (("style", "style-src"), ("script", "script-src")):
        text = page.texts[element][-1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_the_same_records_make_the_same_page(hostile: Path) -> None:
    assert write_page(compare_runs(hostile)) == write_page(compare_runs(hostile))


def test_json_in_a_script_has_no_markup() -> None:
    text = to_script_json(HOSTILE)
    assert json.loads(text) == HOSTILE
    assert not set("<>&\u2028\u2029") & set(text)
