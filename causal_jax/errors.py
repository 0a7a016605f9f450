"""The one exception for what a user can put right."""


class InputError(ValueError):
    """The user's input is wrong: the message names the field, the value and what would be right.

    The commands print it as `error: ...` without a traceback and exit with 2.
    """
