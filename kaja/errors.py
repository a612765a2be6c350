"""The exceptions that are no defects: what the user can mend, and a run that was asked to stop."""


class UserError(Exception):
    """What was given cannot work.

    The message is one line: what is wrong, where, the rule, and the fix. The scripts print it
    without a traceback and end with exit code 2 (kaja.cli.run).
    """


class Stopped(Exception):
    """SIGTERM asked a run to stop, and it has saved what it goes on from. Exit code 143."""

    def __init__(self, step: int, total_steps: int, unit: str = "step") -> None:
        super().__init__(f"SIGTERM: saved after {unit} {step} of {total_steps}; go on with --resume auto")
