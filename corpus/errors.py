"""The two kinds of failure that a command reports: the user's to mend, and ours."""


class UserError(Exception):
    """Bad arguments or bad input; the message names the file, the row or the key, and what to do. Exit status 2."""


class RunError(Exception):
    """A run that could not finish although its input was good; the message says what is left. Exit status 1."""
