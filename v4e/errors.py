"""One family of errors, written for the person who reads them.

Every error says what was wrong, where (file, key, value) and what to do next. The command line prints the
message alone, without a traceback, and exits with the class's ``exit_code``.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class V4EError(Exception):
    """Something the user can mend.

    Args:
        what: one sentence: what was wrong, with the offending value.
        where: file, key or setting in which it was found.
        fix: what to do next, as a sentence or a command.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f"{where}: " if where else ""
        advice = f" ({fix})" if fix else ""
        super().__init__(f"{place}{what}{advice}")

    def __reduce__(self):
        """Keep the three parts when the error crosses a process boundary."""
        return _rebuild, (type(self), self.what, self.where, self.fix)


@contextmanager
def found_at(key: str) -> Iterator[None]:
    """Errors inside that name no place are of this setting."""
    try:
        yield
    except V4EError as error:
        if error.where:
            raise
        raise _rebuild(type(error), error.what, f"key {key}", error.fix) from error


def _rebuild(cls: type[V4EError], what: str, where: str, fix: str) -> V4EError:
    return cls(what, where=where, fix=fix)


class ConfigError(V4EError):
    """A setting is unknown, mistyped or contradicts another."""

    exit_code = 3


class DataError(V4EError):
    """A photograph, an instruction or a shard cannot be used."""

    exit_code = 4


class CheckpointError(V4EError):
    """Weights or a checkpoint are missing, incomplete or of another model."""

    exit_code = 5


class ShapeError(V4EError):
    """Sizes do not fit the latent grid or each other."""

    exit_code = 6


class TrainingError(V4EError):
    """The run cannot go on: non-finite losses, too many quarantined samples."""

    exit_code = 7


class PreemptedError(V4EError):
    """The run was asked to stop and has saved itself; the same command goes on from there."""

    exit_code = 75  # "try again" in sysexits.h
