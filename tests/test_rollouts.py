"""Judging while others are still being generated, and the speeds of a step's phases."""

import threading
from collections.abc import Sequence

import pytest

from kaja.data import Example
from kaja.engine import Completion
from kaja.reward import Verdict
from kaja.rollouts import Judging, Rollout, throughput

EXAMPLES = [Example(str(number), "test", "safety", f"質問{number}") for number in range(3)]


class Judge:
    """Gives as many points as the completion has letters, and notes what it was asked in which thread."""

    name = "letters"
    concurrent = True

    def __init__(self) -> None:
        self.calls: list[tuple[bool, list[str], list[str]]] = []
        self.called = threading.Event()

    def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
        in_main = threading.current_thread() is threading.main_thread()
        self.calls.append((in_main, [example.id for example in examples], list(completions)))
        self.called.set()
        return [Verdict(float(len(text))) for text in completions]

    def close(self) -> None:
        pass


def group(*lengths: int) -> list[Completion]:
    return [Completion([7] * length, [0.0] * length, "stop") for length in lengths]


def decode(token_ids: Sequence[int]) -> str:
    return "x" * len(token_ids)


def test_a_finished_group_is_judged_while_another_is_generated() -> None:
    judge = Judge()
    with Judging(judge, EXAMPLES, decode) as judging:
        judging.ask(2, group(1, 2))  # generation goes on, and the judge does not wait for its end
        assert judge.called.wait(timeout=10)
        judging.ask(0, group(3, 4))
        verdicts = judging.verdicts([group(3, 4), group(5, 0), group(1, 2)])
    assert [[verdict.score for verdict in one] for one in verdicts] == [[3, 4], [5, 0], [1, 2]]
    assert judge.calls[0] == (False, ["2", "2"], ["x", "xx"])
    assert (True, ["1", "1"], ["xxxxx", ""]) in judge.calls  # what was not asked for before, at once
    assert len(judge.calls) == 3


def test_without_asking_ahead_the_judge_is_asked_once() -> None:
    judge = Judge()
    with Judging(judge, EXAMPLES, decode) as judging:
        verdicts = judging.verdicts([group(1), group(2), group(3)])
    assert [one[0].score for one in verdicts] == [1, 2, 3]
    assert judge.calls == [(True, ["0", "1", "2"], ["x", "xx", "xxx"])]


def test_an_error_of_the_judge_is_not_lost() -> None:
    class Broken(Judge):
        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            raise ConnectionError("gone")

    before = set(threading.enumerate())  # other tests of this process may have left some
    with pytest.raises(ConnectionError, match="gone"), Judging(Broken(), EXAMPLES, decode) as judging:
        judging.ask(0, group(1))
        judging.verdicts([group(1)])
    assert set(threading.enumerate()) <= before


def test_ctrl_c_does_not_wait_for_a_judge_that_hangs() -> None:
    class Hanging(Judge):
        closed = threading.Event()

        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            self.called.set()
            assert self.closed.wait(timeout=10)
            return []

    judge, before = Hanging(), set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), Judging(judge, EXAMPLES, decode) as judging:
        judging.ask(0, group(1))
        assert judge.called.wait(timeout=10)
        raise KeyboardInterrupt
    left = set(threading.enumerate()) - before
    assert len(left) == 1 and not judge.closed.is_set()
    judge.closed.set()  # as the end of open_judge does
    for thread in left:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_throughput_counts_new_tokens_in_generation_and_all_elsewhere() -> None:
    rollouts = [Rollout(EXAMPLES[0], [1] * 10, one, "", Verdict(1.0)) for one in group(4, 6)]
    speeds = throughput(rollouts, {"seconds/generate": 2.0, "seconds/update": 0.5, "seconds/log_probs": 0.0})
    assert speeds == {"tokens_per_second/generate": 5.0, "tokens_per_second/update": 60.0}
