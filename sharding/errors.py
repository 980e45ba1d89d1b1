"""The one exception that a user is meant to read. It lives in the lowest folder so that every folder can raise it."""


class UserError(Exception):
    """Something that the person who started the command can cure.

    The message names what is wrong (file, field), what was found, what was expected and what to do. The command line
    prints it without a traceback unless `--traceback` is given, and exits with status 2.
    """
