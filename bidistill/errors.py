"""The one exception that a user's mistake becomes."""


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that says what to do.

    The command line prints it as ``error: <message>`` and exits with code 2. Wording:
    ``<what>: got <value>, expected <value>; <what to do>``.
    """


class MissingPackage(UserError, ImportError):
    """A package that is needed for one thing alone is not installed, or is another version."""
