"""What can go wrong, in words for the person who typed the command.

MiError
├── InputError        something the user gave cannot be used; exit code 2
│   └── ValueRefused      a value is out of its range
├── NumericalError    the mathematics failed on real numbers; exit code 3
│   └── SingularError     a Hessian is not positive definite
├── AuditError        a compressed linear is not what was promised; exit code 4
├── VerdictError     a number is not what was expected of it; exit code 5
└── ResumableError    the run was stopped and can continue; exit code 75
    └── MemoryShortage    memory does not suffice
"""


class MiError(Exception):
    """An expected failure: one line that names the thing and the remedy."""

    exit_code = 1


class InputError(MiError):
    """The configuration, a file or a dataset cannot be used as given."""

    exit_code = 2


class ValueRefused(InputError, ValueError):
    """A value of the configuration is out of its range.

    Attributes:
        key: whose value it is, from where the check is made.
        rest: the value, and what is allowed.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key = key
        self.rest = f"={as_typed(value)} is not allowed: {allowed}"
        super().__init__(key + self.rest)


class NumericalError(MiError):
    """A computation on real activations or weights has no valid result."""

    exit_code = 3


class SingularError(NumericalError):
    """A Hessian is not positive definite with the damping that it may be given."""


class AuditError(MiError):
    """A compressed linear breaks one of the promises of its plan."""

    exit_code = 4


class VerdictError(MiError):
    """A number is outside the tolerance of what was expected of it."""

    exit_code = 5


class ResumableError(MiError):
    """The run stopped before its end, and the same command continues it (EX_TEMPFAIL)."""

    exit_code = 75


class MemoryShortage(ResumableError):
    """Memory does not suffice, of the accelerator or of the host, even in the smallest pieces."""


def in_a_line(error: OSError) -> str:
    """Return what the system refused: the reason and the file, as far as it says them."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror + (f": {error.filename}" if error.filename is not None else "")


def require(key: str, value: object, holds: bool, allowed: str) -> None:
    """Raise the one line that a person needs when a value is out of its range.

    Raises:
        ValueRefused: it is.
    """
    if not holds:
        raise ValueRefused(key, value, allowed)


def as_typed(value: object) -> str:
    """Write a value as on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "name", value))
