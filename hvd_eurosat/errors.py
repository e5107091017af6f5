"""The errors that are shown to people as one line instead of a traceback."""

STOPPED = 75  # the exit status of a run that was asked to stop and saved its state (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something its reader can mend: bad usage, configuration or data. Ends the program with status 2.

    The message is one line that names the culprit and, where there is one, the cure.
    """


class RunError(Exception):
    """A run that began well could not go on (a full disk, say). Ends the program with status 1."""


class Stopped(Exception):  # noqa: N818 (not an error)
    """Every rank is at the same place and leaves there, because one of them was asked to stop."""
