"""pass@k: share of problems that a model's programs solve (Chen et al., 2021), judged in the sandbox.

A problem is judged by `{prompt, tests, entry}`: the program is the prompt, the answer, the tests and
`check(entry)`. The answer may be the rest of the function, as a model writes that goes on after the prompt, or the
function in a block of Markdown, as a chat model writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import comb

from monkeyjump.evaluation.metrics.scores import Accepted, Answers, Score, mean_score, register
from monkeyjump.evaluation.sandbox import Limits, check_sandbox, require_consent, run_program
from monkeyjump.tasks.metric_names import KNOWN

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
# how an answer begins that is more than the rest of a function
WHOLE = ("def ", "async def ", "import ", "from ", "class ", "@", "#")
# where a model that was not told to stop has gone on to something else (Chen et al., and the end of a block)
ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@", "\n```")


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples passes: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: fewer samples than k.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, found {samples}")
    return 1 - comb(samples - passed, k) / comb(samples, k)


def score_programs(samples: Sequence[Answers], accepted: Accepted, k: int = 1, limits: Limits = Limits()) -> Score:  # noqa: B008  frozen
    """pass@k over problems.

    Args:
        samples: of each problem, what the model wrote, k times or more.
        accepted: of each problem, what judges an answer last (see `tasks.examples`).

    Raises:
        InputError: outside `allow_code`, or this machine gives no sandbox.
    """
    require_consent(f"pass@{k}")
    check_sandbox()
    values = []
    for answers, right in zip(samples, accepted, strict=True):
        judge = json.loads(right[-1])
        passed = sum(run_program(program_of(judge, answer), limits).passed for answer in answers)
        values.append(pass_at_k(len(answers), passed, k))
    return mean_score(values)


@register("pass@1", KNOWN["pass@1"])
def pass_at_1(answers: Answers, accepted: Accepted) -> Score:
    return score_programs([[answer] for answer in answers], accepted)


def program_of(judge: dict[str, str], answer: str) -> str:
    """The program that comes to its end if the answer is right."""
    prompt, entry = judge["prompt"], judge["entry"]
    block = BLOCK.search(answer)
    code = (block.group(1) if block else answer).strip("\n")
    head = rf"^(?:async )?def {re.escape(entry)}\b"
    is_whole = block is not None or code.startswith(WHOLE)
    if is_whole and re.search(
        head, code, re.MULTILINE
    ):  # the whole function; imports and helpers before it are the prompt's
        start = list(re.finditer(head, prompt, re.MULTILINE))
        written = f"{prompt[: start[-1].start()] if start else prompt}\n{code}"
    else:
        written = f"{prompt.rstrip()}\n{_body(code)}"
    return f"{written}\n\n{judge['tests']}\n\ncheck({entry})\n"


def _body(code: str) -> str:
    """The rest of a function, indented: answers come without outer blanks, or without any indentation at all."""
    code = code[: min((place for end in ENDS if (place := code.find(end)) >= 0), default=len(code))].rstrip()
    lines = code.split("\n")
    if lines[0][:1].isspace():
        return code
    if all(line[:1].isspace() for line in lines[1:] if line.strip()):
        return f"    {code}"
    return "\n".join(f"    {line}" for line in lines)
