"""The one exception for what a user can put right."""


class UserError(Exception):
    """A mistake in what the user gave: a recipe, a file, data.

    Its message is one line: what was given, what is allowed, what to do. The command line prints it without a traceback
    and exits with status 2.
    """
