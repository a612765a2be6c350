"""The one exception for what the user can mend."""


class UserError(Exception):
    """What was given cannot work.

    The message is one line: what is wrong, where, the rule, and the fix. The scripts print it
    without a traceback and end with exit code 2 (kaja.cli.run).
    """
