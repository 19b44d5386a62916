"""A comparison as one HTML page that needs no network and lets nothing in its records run.

The page holds its data as JSON, and its styles and scripts, whose hashes are the only ones that
its policy lets a browser apply: neither the name of a run nor an error message can add another.
"""

import base64
import hashlib
import html
import json
import re
from importlib.resources import files

from mi_experiments.comparison.views.data import Comparison, to_plain

SCRIPTS = ("marks.js", "chart.js", "losses.js", "columns.js", "layers.js", "table.js", "page.js")


def write_page(comparison: Comparison) -> str:
    """Return the page.

    Everything that is drawn or printed on it is read from its JSON, element `data`.
    """
    style = read("page.css")
    body = "".join(read(name) for name in SCRIPTS)
    data = 'JSON.parse(document.getElementById("data").textContent)'
    script = f'"use strict";\nconst DATA = {data};\n{body}'
    policy = (
        f"default-src 'none'; style-src '{csp_hash(style)}'; "
        f"script-src '{csp_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    runs = len(comparison.details)
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(f"{runs} {'run' if runs == 1 else 'runs'} · mi_experiments"),
        "STYLE": style,
        "DATA": to_script_json(to_plain(comparison)),
        "SCRIPT": script,
    }
    # In one pass: what is put in is never searched for a place to put something.
    return re.sub(r"@([A-Z]+)@", lambda place: parts[place[1]], read("page.html"))


def read(name: str) -> str:
    """Return a file that lies beside this module."""
    return (files(__package__) / name).read_text()


def csp_hash(text: str) -> str:
    """Return the hash by which a page's policy names a script or style."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def to_script_json(value: object) -> str:
    """Return JSON that no HTML parser can take for the end of its element or for markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
