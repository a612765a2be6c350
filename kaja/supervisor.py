"""Guards a server: starts it, starts it again once if it dies, and never lets it outlive whoever asked for it.

A process of its own, of the standard library alone (12 MB), so that nothing the trainer does stops it: kill -9
included. kaja.judge_server starts it so:

    python -P kaja/supervisor.py --port 8000 --log server.log --start-timeout 900 -- COMMAND ...

1. COMMAND runs in a session of its own: all that it starts is one process group, and Ctrl-C does not reach it.
2. When http://127.0.0.1:PORT/health answers 200 for the first time, "healthy" is written to stdout.
3. If the server ends after that, or /health fails for long, what is left of its group is ended and COMMAND runs
   once more, on the same port. A server that was never healthy is not tried again: it would fail the same way.
4. When stdin is closed, the parent is gone or SIGTERM comes, the group is ended and this process too.

The log gets what the server prints and a line for each of these events; those that matter to whoever watches the
run (a second life, giving up) go to stderr too. Exit code: 0 when it was told to end, 1 when it gave up.
"""

import argparse
import http.client
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

LIVES = 2
TICK = 0.2  # seconds between two looks at the server, the parent and stdin
PROBE_TIMEOUT = 5.0  # seconds within which /health must answer
KILL_SECONDS = 5.0  # until what was killed is gone; more only where the kernel holds a process


class Owner:
    """Whoever wants the server: our parent, which holds the other end of stdin."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._dismissed = False
        signal.signal(signal.SIGTERM, self._dismiss)

    def _dismiss(self, *_: object) -> None:
        self._dismissed = True

    def wants_it(self) -> bool:
        """Whether the server is still wanted, found out within TICK seconds."""
        stdin = sys.stdin.fileno()
        if select.select([stdin], [], [], TICK)[0] and not os.read(stdin, 1024):
            return False
        # A process that the parent forked may hold stdin's other end open after the parent is gone.
        return not self._dismissed and os.getppid() == self._parent


class Life:
    """One run of the server's command, in a session and process group of its own."""

    def __init__(self, command: Sequence[str], port: int, log: BinaryIO) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.started = time.monotonic()
        self.last_healthy: float | None = None
        self._port, self._over = port, threading.Event()
        # In a thread: an answer may take PROBE_TIMEOUT, and the end of the parent shall not wait for it.
        threading.Thread(target=self._probe, daemon=True).start()

    def _probe(self) -> None:
        while not self._over.wait(TICK if self.last_healthy is None else 1.0):
            if is_healthy(self._port):
                self.last_healthy = time.monotonic()

    def exit_code(self) -> int | None:
        """None while it runs, -9 after a kill -9. It stays a zombie until `end`, so that nobody gets its number."""
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def end(self, grace: float) -> None:
        """End the whole group: by SIGTERM, and after `grace` seconds by SIGKILL."""
        self._over.set()
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, KILL_SECONDS)):
            deadline = time.monotonic() + patience
            if running(self.process.pid):
                os.killpg(self.process.pid, number)
            while running(self.process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
        self.process.poll()


def is_healthy(port: int) -> bool:
    """Not by urllib, which would ask the proxy that the environment names."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PROBE_TIMEOUT)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def running(group: int) -> list[int]:
    """The processes of a process group, without zombies, which only wait to be noticed."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended in between
                # pid (name) state parent group ...; the name may hold anything
                state, _, its_group = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
                if int(its_group) == group and state not in "ZX":
                    found.append(int(entry.name))
    return found


def guard(
    life: Life, wanted: Callable[[], bool], tell: Callable[[], None], start_timeout: float, failing: float
) -> str:
    """Why this life must end; nothing if the server is not wanted any more. `tell`s when it is healthy."""
    told = False
    while wanted():
        now, healthy = time.monotonic(), life.last_healthy
        if healthy is not None and not told:
            told = True
            tell()
        code = life.exit_code()
        if code is not None:
            return f"ended with exit code {code}"
        if healthy is None and now - life.started > start_timeout:
            return f"did not answer /health within {start_timeout:g} s"
        if healthy is not None and now - healthy > failing:
            return f"has not answered /health for {failing:g} s"
    return ""


def supervise(
    command: Sequence[str], port: int, log: BinaryIO, *, start_timeout: float, failing: float, grace: float
) -> int:
    """See the module. Returns the exit code."""

    def say(text: str, aloud: bool = True) -> None:
        line = f"supervisor {time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n"
        with suppress(OSError):  # a disk that is full shall neither end the server nor leave it behind
            log.write(line.encode())
        if aloud:
            with suppress(OSError):
                print(line, end="", file=sys.stderr, flush=True)

    def tell() -> None:
        say(f"healthy after {time.monotonic() - life.started:.0f} s", aloud=number > 1)
        with suppress(BrokenPipeError):  # the parent has just died: the owner does not want it any more
            os.write(sys.stdout.fileno(), b"healthy\n")

    owner = Owner()
    for number in range(1, LIVES + 1):
        life = Life(command, port, log)
        say(f"life {number}, process {life.process.pid}: {' '.join(command)}", aloud=False)
        try:
            reason = guard(life, owner.wants_it, tell, start_timeout, failing)
        finally:
            life.end(grace)
        if not reason:
            say("ended, as it was told to", aloud=False)
            return 0
        if life.last_healthy is None:
            say(f"the server {reason}, before it was healthy", aloud=False)
            return 1
        if number < LIVES:
            say(f"the server {reason}; starting it once more")
    say(f"the server {reason}, for the second time: giving up; see {log.name}")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="of 127.0.0.1, on which the command serves /health")
    parser.add_argument("--log", type=Path, required=True, help="file to append to")
    parser.add_argument("--start-timeout", type=float, default=900, help="seconds until /health must answer 200")
    parser.add_argument("--failing", type=float, default=60, help="seconds that /health may fail, once it answered")
    parser.add_argument("--grace", type=float, default=10, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = vars(parser.parse_args(argv))
    with arguments.pop("log").open("ab", buffering=0) as log:
        return supervise(**arguments, log=log)


if __name__ == "__main__":
    sys.exit(main())
