"""The one exception for what a user can put right."""


class UserError(ValueError):
    """A refusal: names the key, file or row, what was given, and what would work.

    Entry points print its message without a traceback and exit with code 2.
    """
