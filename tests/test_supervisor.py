"""The supervisor with real processes: whatever happens, the server is restarted at most once and nothing is left."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from judge_fixtures import SERVER, group_is_gone, process_is_gone, wait_until
from kaja import supervisor


class Guarded:
    """A supervisor with the small server, as a process; how its log and the server look from outside."""

    def __init__(self, folder: Path, *flags: str, **options: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "server.py").write_text(SERVER)
        self.log, self.stderr = folder / "server.log", folder / "stderr"
        given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, str(folder / "server.py"), str(self.port), *flags]
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, supervisor.__file__, "--port", str(self.port), "--log", str(self.log), *given,
                 "--", *command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def lives(self) -> list[int]:
        """The number of the server's process in each life so far."""
        text = self.log.read_text() if self.log.exists() else ""
        return [int(pid) for _, pid in re.findall(r"life (\d), process (\d+)", text)]

    def workers(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"worker (\d+)", self.log.read_text())]

    def healthy(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"healthy\n"

    def ask(self, path: str) -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def dismiss(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(20)

    def said(self) -> str:
        return self.stderr.read_text()


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Callable[..., Guarded]]:
    made: list[Guarded] = []

    def make(*flags: str, **options: float) -> Guarded:
        made.append(Guarded(tmp_path, *flags, **options))
        return made[-1]

    yield make
    for guarded in made:
        guarded.dismiss()
        assert all(group_is_gone(pid) for pid in guarded.lives())


def test_ends_with_stdin(guard: Callable[..., Guarded]) -> None:
    guarded = guard("worker")
    guarded.healthy()
    (server,), (worker,) = guarded.lives(), guarded.workers()
    assert os.getsid(server) == os.getpgid(worker) == server  # a session of its own, which the worker shares
    assert guarded.ask("/health") == 200
    assert guarded.dismiss() == 0
    assert group_is_gone(server) and process_is_gone(worker)
    assert "ended, as it was told to" in guarded.log.read_text() and guarded.said() == ""


def test_ends_on_sigterm(guard: Callable[..., Guarded]) -> None:
    guarded = guard("worker")
    guarded.healthy()
    guarded.process.send_signal(signal.SIGTERM)
    assert guarded.process.wait(20) == 0
    assert group_is_gone(guarded.lives()[0])


def test_ends_while_the_server_is_still_starting(guard: Callable[..., Guarded]) -> None:
    guarded = guard("silent", "worker")  # /health accepts and never answers: the end must not wait for it
    wait_until(lambda: guarded.ask("/") == 200)
    began = time.monotonic()
    assert guarded.dismiss() == 0
    assert time.monotonic() - began < 4.5  # a probe may take 5
    assert group_is_gone(guarded.lives()[0])


def test_restarts_once_and_then_gives_up(guard: Callable[..., Guarded]) -> None:
    guarded = guard("worker")
    guarded.healthy()
    (first,) = guarded.lives()
    os.kill(first, signal.SIGKILL)
    guarded.healthy()
    assert guarded.lives()[:1] == [first] and len(guarded.lives()) == 2
    assert group_is_gone(first) and process_is_gone(guarded.workers()[0])  # what the first life left
    assert guarded.ask("/health") == 200  # on the same port
    os.kill(guarded.lives()[1], signal.SIGKILL)
    assert guarded.process.wait(20) == 1
    assert len(guarded.lives()) == 2 and all(group_is_gone(pid) for pid in guarded.lives())
    log = guarded.log.read_text()
    assert [f"served by {pid}, session {pid}" in log for pid in guarded.lives()] == [True, True]
    once, again, gave_up = guarded.said().splitlines()
    assert once.endswith("the server ended with exit code -9; starting it once more")
    assert "healthy after" in again
    assert gave_up.endswith(f"the server ended with exit code -9, for the second time: giving up; see {guarded.log}")


def test_a_server_that_exits_0_and_leaves_its_worker(guard: Callable[..., Guarded]) -> None:
    """As vLLM's does when its engine is killed."""
    guarded = guard("worker")
    guarded.healthy()
    guarded.ask("/exit/0")
    guarded.healthy()
    first, second = guarded.workers()
    assert process_is_gone(first) and not process_is_gone(second)
    assert "the server ended with exit code 0; starting it once more" in guarded.said()


def test_a_server_that_was_never_healthy_is_not_tried_again(guard: Callable[..., Guarded]) -> None:
    guarded = guard("crash")
    assert guarded.process.wait(20) == 1
    assert len(guarded.lives()) == 1
    assert "ValueError: there is no such model" in guarded.log.read_text()
    assert guarded.log.read_text().endswith("the server ended with exit code 1, before it was healthy\n")


def test_a_server_that_is_not_healthy_in_time(guard: Callable[..., Guarded]) -> None:
    guarded = guard("ill", start_timeout=1)
    assert guarded.process.wait(20) == 1
    assert group_is_gone(guarded.lives()[0]) and len(guarded.lives()) == 1
    assert guarded.log.read_text().endswith("the server did not answer /health within 1 s, before it was healthy\n")


@pytest.mark.slow
def test_a_short_illness_is_forgiven_a_long_one_is_not(guard: Callable[..., Guarded]) -> None:
    guarded = guard(failing=4)
    guarded.healthy()
    guarded.ask("/status/500")
    time.sleep(1)
    guarded.ask("/status/200")
    time.sleep(4)
    assert len(guarded.lives()) == 1
    guarded.ask("/status/500")
    guarded.healthy()
    assert len(guarded.lives()) == 2 and group_is_gone(guarded.lives()[0])
    assert "the server has not answered /health for 4 s; starting it once more" in guarded.said()


def test_a_server_that_ignores_sigterm_is_killed(guard: Callable[..., Guarded]) -> None:
    guarded = guard("deaf", "worker", grace=0.5)
    guarded.healthy()
    began = time.monotonic()
    assert guarded.dismiss() == 0
    assert 0.5 < time.monotonic() - began < 9
    assert group_is_gone(guarded.lives()[0])


def test_a_full_disk_neither_ends_the_server_nor_leaves_it_behind(tmp_path: Path) -> None:
    """The server is one that goes on when its log cannot be written, as vLLM does."""
    (tmp_path / "server.log").symlink_to("/dev/full")
    with socket.socket() as listening, (tmp_path / "pid").open("w") as pid:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(20)
        command = ["sh", "-c", f"echo $$ > {pid.name}; exec sleep 60"]
        process = subprocess.Popen(
            [sys.executable, supervisor.__file__, "--port", str(listening.getsockname()[1]),
             "--log", str(tmp_path / "server.log"), "--", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        server = int(wait_until(Path(pid.name).read_text))
        connection = listening.accept()[0]  # GET /health
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert process.stdout is not None and process.stdout.readline() == b"healthy\n"
        assert not group_is_gone(server)
        process.communicate(timeout=20)  # closes stdin
    connection.close()
    assert process.returncode == 0 and group_is_gone(server)


def test_running_counts_living_processes_of_the_group_alone() -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000"], start_new_session=True)
    other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        wait_until(lambda: len(supervisor.running(parent.pid)) == 3)
        os.kill(parent.pid, signal.SIGKILL)  # a zombie, until it is waited for
        wait_until(lambda: len(supervisor.running(parent.pid)) == 2)
        assert parent.pid not in supervisor.running(parent.pid) and not group_is_gone(parent.pid)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        other.kill()
        parent.wait()
        other.wait()
    wait_until(lambda: supervisor.running(parent.pid) == [])


def test_is_healthy_takes_200_alone(guard: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    guarded = guard()
    guarded.healthy()
    assert supervisor.is_healthy(guarded.port)
    guarded.ask("/status/503")
    assert not supervisor.is_healthy(guarded.port)
    guarded.dismiss()
    assert not supervisor.is_healthy(guarded.port)  # refused
