"""A real browser without a window: what a page is after its scripts ran, and what it complains of.

Only files of this machine are opened; the flags keep the browser itself from the network.
"""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", "--enable-logging=stderr", "--window-size=1300,2400",
         "--virtual-time-budget=4000", "--dump-dom"]  # fmt: skip


VOID = {"meta", "link", "br", "img", "input", "hr"}
"""Elements that have no end."""


class Node(NamedTuple):
    """An element: its attributes, and all text below it."""

    tag: str
    attributes: dict[str, str]
    text: list[str]

    @property
    def words(self) -> str:
        """All text, in one line."""
        return " ".join("".join(self.text).split())

    def number(self, name: str) -> float:
        """Return an attribute as the number that it spells."""
        return float(self.attributes[name])


class Tree(HTMLParser):
    """A document as a list of its elements, each knowing the ids of those around it."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.nodes: list[tuple[Node, tuple[str, ...]]] = []
        self.open: list[Node] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs}, [])
        around = tuple(parent.attributes.get("id", "") for parent in self.open)
        self.nodes.append((node, around))
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.text.append(data)

    def below(self, identity: str, tag: str, **attributes: str) -> list[Node]:
        """Return the elements of a kind inside the element with an id."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [
            node
            for node, around in self.nodes
            if identity in around
            and node.tag == tag
            and all(node.attributes.get(name) == value for name, value in wanted.items())
        ]

    def by_id(self, identity: str) -> Node:
        """Return the element with an id."""
        return next(node for node, _ in self.nodes if node.attributes.get("id") == identity)


class Opened(NamedTuple):
    """A page in the browser: its tree, and the lines in its console."""

    tree: Tree
    console: list[str]


def find_browser() -> str:
    """Return the browser, or skip the test and say so."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser to open the page with: none of {', '.join(NAMES)} is installed")


def open_page(page: Path, profile: Path, *flags: str) -> Opened:
    """Open a file, let its scripts run, and return what it became."""
    shutil.rmtree(profile, ignore_errors=True)
    ended = subprocess.run(
        [find_browser(), *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = re.findall(r"^\[.*CONSOLE.*\] (.*)$", ended.stderr, re.MULTILINE)
    return Opened(Tree(ended.stdout), console)
