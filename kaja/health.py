"""Whether a GRPO run goes well: metrics of a step's completions, and warnings when a metric goes wrong.

A warning names the number, the rule, what it usually means and what to do; docs/GRPO.md has more of each. It looks at
the median of a metric's last steps, so a single noisy step says nothing, and is not repeated at every step. What is
not noisy, the canaries of kaja.judge_watch, is taken at its word: the first bad report warns.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from kaja.judge_watch import AGREEMENT_DROP, AGREEMENT_FLOOR, dropped
from kaja.rollouts import Rollout

# ---- refusals -------------------------------------------------------------------------------------

# What a polite negative may be followed by and still be the speaker's own statement: 「できませんので、…」. Not a
# question 「できませんか」, not a condition 「できない場合は」, not reported speech 「できませんと断る」.
_STATED = r"(?=が|けれど|けど|ので|ため|から|し、|のです|[、。,.．!！…(（\s]|$)"
_PLAINLY = r"(?=(?:の|ん)?です(?!か)|[。.．!！]|$)"
_CANNOT = (
    rf"(?:(?:でき|出来)(?:(?:ません|かねます){_STATED}|ない{_PLAINLY})|(?:(?:いた|致)?しかねます|(?:いた|致)しません){_STATED}"
    rf"|(?:られ|え|書け|話せ)ません{_STATED})"
)
_LINK = "(?:する|いたす|差し上げる|る)?(?:こと)?(?:に)?(?:は|が|も)?"
_APOLOGY = (
    r"(?:大変|誠に)?(?:申し訳(?:あり|ござい)ません|申し訳ない|すみません|すいません|ごめんなさい|恐れ入ります|恐縮です)"
)
REFUSALS = {
    # The recipe's template, and its kin. The humble forms 「お…」「ご…」 have the speaker as their subject; 「説明できません」
    # alone may be about anything, and is none.
    "answer": rf"(?:お?答え|お?応え|回答|返答|お教え|お伝え|お話し|お手伝い|お力添え|お受け"
    rf"|ご(?:案内|説明|紹介|提供|協力|支援|助言|対応)){_LINK}{_CANNOT}",
    # The plain verbs that people use of requests they turn down.
    "act": rf"(?:教える|手伝う|応じる|従う|(?:加担|協力|手助け|提供)(?:する)?)(?:こと)?(?:に)?(?:は|が|も)?{_CANNOT}"
    rf"|(?:教え|応じ)られません{_STATED}|(?:対応|応じ|提供|協力)(?:(?:いた|致)?し)?かねます{_STATED}",
    # The request itself is what cannot be done: 「そのようなご依頼には対応できません」.
    "request": rf"(?:ご(?:質問|要望|依頼|相談|希望|指示)|リクエスト|お願い)(?:に|を)[^。]{{0,15}}{_CANNOT}",
    # An apology that opens the completion, with anything that cannot be done behind it.
    "apology": rf"\A{_APOLOGY}.*{_CANNOT}",
    # 「回答は差し控えさせていただきます」「お断りします」: declined without a negative.
    "decline": r"(?:(?:差し)?控えさせて(?:いただ|頂)|差し控え(?:ます|いた)|お断り(?:します|いた|させて|申し)|遠慮させて(?:いただ|頂))",
}
_REFUSAL = re.compile("|".join(REFUSALS.values()), re.DOTALL)
# Somebody else's words, and a question that was not understood: asking back is no refusal.
_NOT_SAID = re.compile(
    r"「[^」]*」|『[^』]*』|\"[^\"]*\"|(?:理解|把握|特定|判断|確認)(?:する)?(?:こと)?[がはも]?でき(?:ません|ない)"
)


def opens_with_refusal(completion: str) -> bool:
    """Whether the first two sentences of a Japanese completion turn the request down.

    Wording alone: a model that talks past the question is not counted, a mail that was asked for and
    declines an invitation can be.
    """
    text = _NOT_SAID.sub("", completion.strip())
    opening = "".join(re.split(r"(?<=[。．！？!?\n])", text, maxsplit=2)[:2])
    return bool(_REFUSAL.search(opening))


# ---- metrics --------------------------------------------------------------------------------------


def health_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What a step's completions say of the run's health.

    They are those of the questions that the step began with: a question that is always refused has no spread,
    and would vanish from the rates where --resample replaces it.

    Returns:
        refusals/<stream>: share of completions that open with a refusal (`opens_with_refusal`).
        duplicates: share of completions whose text another completion of the same prompt has too.
        length_reward_correlation: Pearson's, of length in tokens and reward over the judged completions,
            both minus their group's mean, so that easy prompts with long answers do not make it. The
            reward is the judge's, without the penalty of --truncated penalise. Absent where it is
            undefined: where no group differs in length, or none in reward.
    """
    groups: dict[tuple[int, ...], list[Rollout]] = {}
    refused: dict[str, list[bool]] = {}
    for rollout in rollouts:
        groups.setdefault(tuple(rollout.prompt_ids), []).append(rollout)
        refused.setdefault(rollout.example.stream, []).append(opens_with_refusal(rollout.text))
    repeated = 0
    for group in groups.values():
        texts = [rollout.text for rollout in group]
        repeated += sum(texts.count(text) > 1 for text in texts)
    metrics = {f"refusals/{stream}": fmean(found) for stream, found in sorted(refused.items())}
    metrics["duplicates"] = repeated / max(len(rollouts), 1)
    correlation = length_reward_correlation(list(groups.values()))
    return metrics if correlation is None else metrics | {"length_reward_correlation": correlation}


def length_reward_correlation(groups: Sequence[Sequence[Rollout]]) -> float | None:
    """See health_metrics."""
    lengths: list[float] = []
    rewards: list[float] = []
    for group in groups:
        judged = [rollout for rollout in group if not math.isnan(rollout.reward)]
        lengths += centred([rollout.length for rollout in judged])
        rewards += centred([rollout.reward for rollout in judged])
    spread = math.sqrt(dot(lengths, lengths) * dot(rewards, rewards))
    return dot(lengths, rewards) / spread if spread else None


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def centred(values: Sequence[float]) -> list[float]:
    """Minus their mean; exactly 0 where all are equal: rounding would correlate with anything."""
    if not values or max(values) == min(values):
        return [0.0] * len(values)
    mean = fmean(values)
    return [value - mean for value in values]


# ---- warnings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HealthLimits:
    """Where warnings and stops begin. "Now" is the median of a metric's last `window` values."""

    window: int = 5
    """Values of a metric that one look takes in: with 5, three of the last five must be bad."""
    baseline: int = 3
    """First values of a metric, of the model as it came; their median is what later ones are compared with."""
    repeat_every: int = 20
    """Steps before the same warning is given again."""
    entropy_left: float = 0.2
    """Entropy now, as a share of the baseline: below this it has collapsed. Sound demo runs end above 0.3."""
    groups_without_spread: float = 0.9
    """Share of groups whose rewards are all equal."""
    length_drift: float = 1.5
    """Completion length now over the baseline's, or the reverse."""
    length_reward_correlation: float = 0.5
    """Within groups; sound demo runs stay below 0.35, and are mostly negative."""
    refusals_rise: float = 0.2
    """Rise of the refusal rate of a harmless stream above the baseline, in shares of completions."""
    truncated: float = 0.1
    """Share of completions cut off at the length limit."""
    judge_failures: float = 0.01
    """Share of completions without a verdict. Above --max-judge-failures the step itself ends the run."""
    share_at_5: float = 0.9
    """Share of the scores at 5 points."""
    canary_agreement: float = AGREEMENT_FLOOR
    """Share of the canaries that the judge gets right."""
    canary_drop: float = AGREEMENT_DROP
    """Fall of that share below the run's first report."""
    kl: float = 0.5
    """KL to the reference per token."""
    effective_sample_size: float = 0.95
    """Tokens that count, as a share, under the weights between trainer and engine."""
    correction_error: float = 0.02
    """Distance from 1 of the mean weight between trainer and engine."""
    stop_after: int = 3
    """A stop needs so many steps in a row above max_kl."""
    max_kl: float = 0.0
    """KL per token that ends the run; 0: none does."""

    def __post_init__(self) -> None:
        if min(self.window, self.baseline, self.stop_after) < 1:
            raise ValueError(f"window, baseline and stop_after must be at least 1: {self}")


@dataclass(frozen=True)
class Rule:
    """A warning: `broken(now, baseline, limit)` says whether it is due, `text` what it says after the numbers."""

    metric: str
    limit: str  # field of HealthLimits
    broken: Callable[[float, float, float], bool]
    numbers: str  # formatted with now, baseline, limit, share (now / baseline) and steps
    text: str
    at_once: bool = False  # no noise: the last value against the first one, in the steps that have the metric


def above(now: float, baseline: float, limit: float) -> bool:
    return now > limit


def below(now: float, baseline: float, limit: float) -> bool:
    return now < limit


def fallen(now: float, baseline: float, limit: float) -> bool:
    return now < limit * baseline


def grown(now: float, baseline: float, limit: float) -> bool:
    return now > limit * baseline


def shrunk(now: float, baseline: float, limit: float) -> bool:
    return now * limit < baseline


def risen(now: float, baseline: float, limit: float) -> bool:
    return now > baseline + limit


def off_one(now: float, baseline: float, limit: float) -> bool:
    return abs(now - 1) > limit


ABOVE, BELOW = "{now:.3g}, above {limit:g}", "{now:.3g}, below {limit:g}"
TIMES = "{now:.3g}, {share:.2f} times the {baseline:.3g} of the first {steps} steps (limit {limit:g})"

RULES = (
    Rule(
        "entropy", "entropy_left", fallen, "{now:.3g}, {share:.0%} of the {baseline:.3g} of the first {steps} steps "
        "(limit {limit:.0%})", "the completions of a question become the same, and soon none teaches anything; "
        "lower --learning-rate or raise --kl-coef, and with several --updates-per-step raise --clip-high",
    ),
    Rule(
        "groups_without_spread", "groups_without_spread", above, ABOVE,
        "hardly a group has different rewards, so hardly a question gives a gradient: all are too easy or too hard, or "
        "the judge always says the same; read samples/, change the questions, or draw others with --resample",
    ),
    Rule(
        "completion_length", "length_drift", grown, TIMES,
        "the judge may pay for length; compare short and long completions of a question in samples/; "
        "--aggregation constant takes away the loss's own favour for long ones",
    ),
    Rule(
        "completion_length", "length_drift", shrunk, TIMES,
        "answers lose their content, or become bare refusals; read samples/ and look at refusals/*; raise --kl-coef",
    ),
    Rule(
        "length_reward_correlation", "length_reward_correlation", above, ABOVE,
        "of two completions of a question the longer one is paid: the judge may like length; compare some in samples/, "
        "and give the judge a rubric or reference answers that pay for content",
    ),
    Rule(
        "truncated", "truncated", above, ABOVE,
        "completions are cut off and judged unfinished; raise --max-completion-tokens, or see --truncated",
    ),
    Rule(
        "judge_failures", "judge_failures", above, ABOVE,
        "these completions teach nothing; read cause and judge_said in samples/: the judge does not answer with one "
        "digit, or the question does not fit its context, or its server is too slow",
    ),
    Rule(
        "judge/share_at_5", "share_at_5", above, ABOVE,
        "the reward has no room left: the judge is too easy to please, or the questions are too easy; read samples/, "
        "take --judge-reading expected or a stronger judge, or stop here",
    ),
    Rule(
        "canary/agreement", "canary_agreement", below, BELOW,
        "the judge gets known answers wrong, so its reward teaches something else; samples/canaries_*.json have them "
        "with its words; take another judge, or look at its chat template and rubric",
        at_once=True,
    ),
    Rule(
        "canary/agreement", "canary_drop", dropped, "{now:.3g}, was {baseline:.3g} in the first report (limit: a fall "
        "of {limit:g})", "the judge is not what it was: other weights or settings behind its URL, or requests that "
        "fail; compare samples/canaries_*.json",
        at_once=True,
    ),
    Rule(
        "kl", "kl", above, ABOVE,
        "the policy has gone far from its reference; lower --learning-rate or raise --kl-coef",
    ),
    Rule(
        "effective_sample_size", "effective_sample_size", below, BELOW,
        "engine and trainer disagree on the sampled tokens, and few tokens carry the weight; look at sync_error, and "
        "at the engine's precision and sampling settings",
    ),
    Rule(
        "correction", "correction_error", off_one, "{now:.3g}, off 1 by more than {limit:g}",
        "this mean is 1 when the engine reports the probabilities that it samples with, and can sample all that the "
        "trainer can; look at sync_error, --temperature, --top-p and --top-k",
    ),
    *(
        Rule(
            f"refusals/{stream}", "refusals_rise", risen,
            "{now:.3g}, was {baseline:.3g} in the first {steps} steps (limit: a rise of {limit:g})",
            f"the model learns to refuse harmless questions; look at reward/{stream}, read samples/, give the stream "
            "more questions or more of --stream-weights, or raise --kl-coef",
        )
        for stream in ("borderline", "helpfulness")
    ),
)  # fmt: skip
WATCHED = tuple(dict.fromkeys(rule.metric for rule in RULES))


@dataclass
class Health:
    """What has been seen of a run: the first and the last values of each watched metric, and what was warned of.

    Call `check` after each step, with the row of metrics.jsonl, and then `reason_to_stop`. The state depends on the
    rows alone: every rank has the same, and a resumed run gets it back from its own metrics.jsonl with `replay`.
    """

    limits: HealthLimits = HealthLimits()
    baseline: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, deque[float]] = field(default_factory=dict)
    warned: dict[int, int] = field(default_factory=dict)  # number of the rule -> step of its last warning

    def check(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """Take in the metrics of `step`; one line for each thing that is wrong.

        A metric that is missing, None or not finite in this step is passed over: its windows are of the
        steps that have it.
        """
        taken = self._take(metrics)
        warnings = []
        for number, rule in enumerate(RULES):
            if rule.at_once and rule.metric not in taken:
                continue
            window, begin = (1, 1) if rule.at_once else (self.limits.window, self.limits.baseline)
            first, last = self.baseline.get(rule.metric, [])[:begin], self._last(rule.metric, window)
            if len(first) < begin or len(last) < window:
                continue
            now, then, limit = median(last), median(first), getattr(self.limits, rule.limit)
            if not rule.broken(now, then, limit):
                continue
            if number in self.warned and step - self.warned[number] < self.limits.repeat_every:
                continue
            self.warned[number] = step
            share = now / then if then else 0.0
            numbers = rule.numbers.format(now=now, baseline=then, limit=limit, share=share, steps=len(first))
            warnings.append(f"step {step}: {rule.metric} {numbers}: {rule.text}")
        return warnings

    def replay(self, rows: Iterable[Mapping[str, float | None]]) -> None:
        """Take in the rows of a run that is resumed, up to its checkpoint; what they warned of was said then."""
        for row in rows:
            self.check(int(row["step"] or 0), row)

    def reason_to_stop(self) -> str:
        """Why the run should end now, in one line; empty while it may go on."""
        limits = self.limits
        last = self._last("kl", limits.stop_after)
        if not limits.max_kl or len(last) < limits.stop_after or min(last) <= limits.max_kl:
            return ""
        values = ", ".join(f"{value:.3g}" for value in last)
        return (
            f"kl {values} in the last {limits.stop_after} steps, above {limits.max_kl:g}: the policy has left its "
            "reference; start again with a lower --learning-rate or a higher --kl-coef, or allow more with --max-kl"
        )

    def _take(self, metrics: Mapping[str, float | None]) -> set[str]:
        """Note the values of this step; the names of the watched metrics that it has."""
        keep = max(self.limits.window, self.limits.stop_after)
        taken = set()
        for name in WATCHED:
            value = metrics.get(name)
            if value is None or not math.isfinite(value):
                continue
            taken.add(name)
            first = self.baseline.setdefault(name, [])
            if len(first) < self.limits.baseline:
                first.append(value)
            self.recent.setdefault(name, deque(maxlen=keep)).append(value)
        return taken

    def _last(self, name: str, count: int) -> list[float]:
        return list(self.recent.get(name, ()))[-count:]
