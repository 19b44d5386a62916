"""What may be said of a table of runs: selected, paired with a baseline, averaged, pivoted.

Two rows are compared or averaged only if they agree in everything that varies (`varying`) except
what was named; an average carries the 95 % interval of Student's t and the number of its samples.
"""

import ast
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd

from mi_experiments.errors import InputError
from mi_experiments.run_table import (
    AVERAGED,
    COUNT,
    INTERVAL,
    cells,
    find_column,
    find_settings,
    settings,
    stands_for,
    varying,
)

WORDS = {"null": None, "true": True, "false": False}
OPERATORS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
             ast.In: "in", ast.NotIn: "not in"}  # fmt: skip


def select_rows(frame: pd.DataFrame, expression: str) -> pd.DataFrame:
    """Keep the rows for which an expression holds: comparisons joined by `and`, `or`, `not`.

    The expression is never run as Python: its syntax tree is checked and rewritten, so that only
    comparisons of columns and values reach pandas. `KEY == null` finds what is missing.

    Raises:
        InputError: anything else in it, an unknown column, or no row for which it holds.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        query = Query(frame)
        text = query.condition(tree.body)
        named = frame[list(query.columns)].set_axis(list(query.columns.values()), axis=1)
        chosen = named.query(text, engine="python", local_dict=query.values).index
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or error
        raise InputError(f"--where {expression!r} cannot be understood: {reason}") from error
    if chosen.empty:
        raise InputError(f"--where {expression!r} holds for none of {len(frame)} rows")
    return frame.loc[chosen].reset_index(drop=True)


class Query:
    """Rewrites a checked syntax tree for pandas: columns by number, literals as variables.

    Attributes:
        columns: of the table, to the name that each has in the rewritten text.
        values: of the literals, by the same kind of name.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        self.columns: dict[str, str] = {}
        self.values: dict[str, Any] = {}

    def condition(self, node: ast.expr) -> str:
        """Rewrite what is true or false of a row."""
        match node:
            case ast.BoolOp(op, parts):
                word = " and " if isinstance(op, ast.And) else " or "
                return f"({word.join(self.condition(part) for part in parts)})"
            case ast.UnaryOp(ast.Not(), part):
                return f"(not {self.condition(part)})"
            case ast.Compare(left, operators, others):
                pairs = zip([left, *others], operators, others, strict=False)
                return f"({' and '.join(self.comparison(*pair) for pair in pairs)})"
        raise refuse(node)

    def comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> str:
        """Rewrite one comparison; its left side is a column, or its right side is."""
        word = OPERATORS.get(type(operator))
        listed = isinstance(right, ast.List | ast.Tuple)
        if word is None or listed != (word in {"in", "not in"}):
            raise refuse(ast.Compare(left, [operator], [right]))
        known = [literal(side) for side in (left, right)]
        if all(known) or (known[0] and known[0][0] is None):
            raise refuse(ast.Compare(left, [operator], [right]))
        if known[1] and known[1][0] is None:
            # A missing value is the one that does not equal itself.
            word = {"==": "!=", "!=": "=="}.get(word, "")
            if not word:
                raise refuse(ast.Compare(left, [operator], [right]))
            right = left
        return f"({self.term(left)} {word} {self.term(right)})"

    def term(self, node: ast.expr) -> str:
        """Rewrite a column or a literal."""
        if found := literal(node):
            name = f"value{len(self.values)}"
            self.values[name] = found[0]
            return f"@{name}"
        column = find_column(self.frame, dotted_name(node))
        return self.columns.setdefault(column, f"column{len(self.columns)}")


def literal(node: ast.expr) -> tuple[Any] | None:
    """Return the value of a literal, alone in a tuple; None if the node is something else."""
    match node:
        case ast.Constant(str() | int() | float() | None as value):
            return (value,)
        case ast.Name(name) if name in WORDS:
            return (WORDS[name],)
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return (-value,)
        case ast.List(items) | ast.Tuple(items):
            found = [literal(item) for item in items]
            if not all(found) or any(isinstance(item, ast.List | ast.Tuple) for item in items):
                raise refuse(node)
            return ([math.nan if one[0] is None else one[0] for one in found if one],)
    return None


def dotted_name(node: ast.expr) -> str:
    """Return the config key that a chain of attributes spells."""
    match node:
        case ast.Name(name) if not name.startswith("_"):
            return name
        case ast.Attribute(value, name) if not name.startswith("_"):
            return f"{dotted_name(value)}.{name}"
    raise refuse(node)


def refuse(node: ast.AST) -> InputError:
    """Return the error for a part of an expression that is no comparison."""
    return InputError(
        f"--where: {ast.unparse(node)} is not allowed: compare columns with values "
        "(== != < <= > >=, in [...]), joined by and, or, not"
    )


def add_difference(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Add `difference`: excess minus that of the baseline which agrees in everything else.

    Only completed runs are paired. A baseline differs from itself by 0; a run without a partner
    has no difference.

    Args:
        frame: rows of `read_runs`.
        baseline: `KEY=VALUE[,KEY=VALUE]`: settings that make a run a baseline. A config's name
            (`recipe`, `model`) stands for all keys of its group.

    Returns:
        The table with one more column, nats per token.

    Raises:
        InputError: an unknown key or value, two baselines for one run, or no pair at all.
    """
    wanted = dict(part.partition("=")[::2] for part in re.split(r",(?=[\w.]+=)", baseline))
    columns = find_settings(frame, wanted, "--baseline")
    completed = (frame["status"] == "completed") & frame["excess"].notna()
    chosen = completed.copy()
    for column, value in zip(columns, wanted.values(), strict=True):
        holds = frame[column].map(lambda cell, value=value: spells(value, cell))
        if not holds.any():
            known = ", ".join(dict.fromkeys(map(show_value, frame[column])))
            raise InputError(f"--baseline: no run has {column}={value}; there is {known}")
        chosen &= holds
    free = stands_for(frame, columns)
    keys = [name for name in varying(frame) if name not in free]
    agreeing = cells(frame[keys])
    partners: dict[tuple[Any, ...], int] = {}
    for row in frame.index[chosen]:
        if (other := partners.setdefault(agreeing[row], row)) != row:
            raise InputError(
                f"--baseline {baseline}: {frame['run'][other]} and {frame['run'][row]} agree in "
                "everything else; leave one out with --where, or name more keys"
            )
    paired = completed & pd.Series([key in partners for key in agreeing], frame.index)
    if not (paired & ~chosen).any():
        raise InputError(
            f"--baseline {baseline}: {explain_no_pair(frame, keys, completed, chosen)}"
        )
    excess = [
        frame["excess"][row] - frame["excess"][partners[agreeing[row]]] if paired[row] else math.nan
        for row in frame.index
    ]
    return frame.assign(difference=excess)


def explain_no_pair(
    frame: pd.DataFrame, keys: Sequence[str], completed: pd.Series, chosen: pd.Series
) -> str:
    """Say what keeps runs and baselines apart: the fewest keys in which two of them differ."""
    apart = [
        [key for key, cell, own in zip(keys, other, baseline, strict=True) if cell != own]
        for other in cells(frame.loc[completed & ~chosen, keys])
        for baseline in cells(frame.loc[chosen, keys])
    ]
    if not apart:
        return "there are no completed runs on both sides"
    return f"no run agrees with a baseline in everything else; add {', '.join(min(apart, key=len))}"


def spells(text: str, cell: object) -> bool:
    """Tell whether a value is the one that was written, as on the command line of a run."""
    if pd.isna(cell) or isinstance(cell, bool | str):  # type: ignore[call-overload]
        return text == show_value(cell)
    try:
        return float(text) == cell
    except ValueError:
        return False


def show_value(cell: object) -> str:
    """Write a setting as on the command line: `3`, `true`, `null`, `random`."""
    if pd.isna(cell):  # type: ignore[call-overload]
        return "null"
    if isinstance(cell, float):
        return f"{cell:g}"
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def average_over(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Average the rows that agree in status, error and everything that varies except some keys.

    Args:
        frame: rows of `read_runs`.
        names: settings to average over; their copies go with them.

    Returns:
        A row a group: its settings, `runs`, and of each column of `AVERAGED` the mean, half the
        width of its 95 % interval (`_ci95`, missing for one sample) and the number of samples
        (`_n`).

    Raises:
        InputError: an unknown key, or two completed runs that agree in these keys too: repeats of
            one sample, which would make the interval too narrow.
    """
    over = find_settings(frame, names, "--over")
    free = stands_for(frame, over)
    apart = [name for name in varying(frame) if name not in free]
    constant = [
        name
        for name in settings(frame)
        if name not in free and name not in apart and frame[name].nunique(dropna=False) == 1
    ]
    identity = ["status", "error", *apart]
    agreeing = cells(frame[identity])
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, key in enumerate(agreeing):
        groups.setdefault(key, []).append(row)
    rows = []
    for members in groups.values():
        group = frame.iloc[members]
        refuse_repeats(group, over)
        first = group.iloc[0]
        rows.append({name: first[name] for name in identity + constant} | averages(group))
    order = [name for name in frame if name in {*identity, *constant}]
    averaged = pd.DataFrame(rows)
    return averaged[order + [name for name in averaged if name not in order]]


def refuse_repeats(group: pd.DataFrame, over: list[str]) -> None:
    """Refuse completed runs that are one sample twice."""
    seen: dict[tuple[Any, ...], str] = {}
    done = group[group["status"] == "completed"]
    for key, run in zip(cells(done[over]), done["run"], strict=True):
        if key in seen:
            values = ", ".join(f"{n}={show_value(v)}" for n, v in zip(over, key, strict=True))
            raise InputError(
                f"--over: {seen[key]} and {run} agree in {values} too, so they are one sample "
                f"twice: leave one out with --where \"run != '{run}'\""
            )
        seen[key] = run


def averages(group: pd.DataFrame) -> dict[str, Any]:
    """Return the number of rows, and mean, interval and count of what is averaged."""
    row: dict[str, Any] = {"runs": len(group)}
    for name in AVERAGED:
        if name in group:
            values = group[name].dropna()
            row[name] = values.mean()
            row[name + INTERVAL] = half_width(values.tolist())
            row[name + COUNT] = len(values)
    return row


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the mean's 95 % interval by Student's t; NaN below two values."""
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return student_quantile(count - 1) * math.sqrt(variance / count)


@cache
def student_quantile(freedom: int) -> float:
    """Return the t that a Student variable exceeds in absolute value with probability 5 %.

    Bisection of `central_probability` down to neighbouring floating-point numbers.
    """
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        if central_probability(angle, freedom) < 0.95:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(high)


def central_probability(angle: float, freedom: int) -> float:
    """Return P(|T| ≤ √freedom · tan(angle)), exact for whole degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even).
    """
    odd = freedom % 2
    total, addend = 0.0, math.cos(angle) if odd else 1.0
    for k in range(freedom // 2):
        total += addend
        addend *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    central = math.sin(angle) * total
    return 2 / math.pi * (angle + central) if odd else central


def pivot(frame: pd.DataFrame, rows: str, columns: str, value: str) -> pd.DataFrame:
    """Spread a value over two settings: a row for each of one, a column for each of the other.

    Interval and count go with an averaged value. Rows without the value leave their cell missing.

    Raises:
        InputError: an unknown column, or two rows with a value for one cell.
    """
    down, across = find_settings(frame, (rows, columns), "--pivot")
    value = find_column(frame, value)
    table: dict[Any, dict[str, Any]] = {}
    for row in frame.to_dict("records"):
        label = f"{across}={show_value(row[across])}"
        line = table.setdefault(show_value(row[down]), {down: row[down]})
        if not pd.isna(row[value]) and not pd.isna(line.get(label, math.nan)):
            others = [name for name in varying(frame) if name not in {down, across}]
            raise InputError(
                f"--pivot: several rows have {down}={show_value(row[down])} and {label}; they "
                f"differ in {', '.join(others) or 'nothing'}: use --over or --where"
            )
        if label not in line or not pd.isna(row[value]):
            parts = [name for name in (value, value + INTERVAL, value + COUNT) if name in frame]
            line |= {label + name.removeprefix(value): row[name] for name in parts}
    return pd.DataFrame(list(table.values()))
