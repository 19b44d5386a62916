"""The rows of a table for which a written condition holds, without running it as code."""

import ast
import math
from typing import Any

import pandas as pd

from mi_experiments.comparison.columns import find_column
from mi_experiments.errors import InputError

WORDS = {"null": None, "true": True, "false": False}
OPERATORS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
             ast.In: "in", ast.NotIn: "not in"}  # fmt: skip
LONGEST = 10_000
"""Characters that a condition may have."""

REFUSED = (SyntaxError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
           NameError, NotImplementedError)  # fmt: skip
"""What parsing a condition and comparing columns with values may raise."""


def select_rows(frame: pd.DataFrame, expression: str) -> pd.DataFrame:
    """Keep the rows for which an expression holds: comparisons joined by `and`, `or`, `not`.

    The expression is never run as Python: its syntax tree is checked and rewritten, so that only
    comparisons of columns and values reach pandas. `KEY == null` finds what is missing.

    Raises:
        InputError: anything else in it, an unknown column, or no row for which it holds.
    """
    said = expression if len(expression) <= 200 else f"{expression[:80]}…"
    if len(expression) > LONGEST:
        raise InputError(
            f"--where {said!r} has {len(expression):,} characters: it may have {LONGEST:,}"
        )
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        query = Query(frame)
        text = query.condition(tree.body)
        named = frame[list(query.columns)].set_axis(list(query.columns.values()), axis=1)
        chosen = named.query(text, engine="python", local_dict=query.values).index
    except (RecursionError, MemoryError):
        raise InputError(f"--where {said!r} is nested too deep to be understood") from None
    except REFUSED as error:
        reason = " ".join(str(getattr(error, "msg", None) or error).split())
        if isinstance(error, SyntaxError):
            reason += " (compare with ==, write text in quotes)"
        raise InputError(f"--where {said!r} cannot be understood: {reason}") from error
    if chosen.empty:
        raise InputError(f"--where {said!r} holds for none of {len(frame)} rows")
    return frame.loc[chosen].reset_index(drop=True)


class Query:
    """Rewrites a checked syntax tree for pandas: columns by number, literals as variables.

    Attributes:
        columns: the columns of the table, to the name that each has in the rewritten text.
        values: the values of the literals, by the same kind of name.
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
    text = " ".join(ast.unparse(node).split())
    shown = text if len(text) <= 200 else f"{text[:80]}…"
    return InputError(
        f"--where: {shown} is not allowed: compare columns with values "
        "(== != < <= > >=, in [...]), joined by and, or, not"
    )
