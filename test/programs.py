"""Programs of every form that `sgl.function` has, over a few documents."""

from typing import Any

import sglang as sgl

NAMES = ["Ann", "Bob", "Cid", "Dan"]
DOCUMENTS = [f"Tale {name}. " + f"Once {name} went out. " * 4 for name in NAMES]


def ask(s: Any, document: int, question: int) -> None:
    """One answer."""
    s += DOCUMENTS[document] + f"Question {question}?"
    s += sgl.gen("answer", max_tokens=3)


def judge(s: Any, document: int, question: int) -> None:
    """Two turns, the second with the first one's answer."""
    s += DOCUMENTS[document] + f"Grade {question}: "
    s += sgl.gen("grade", max_tokens=3)
    s += " Why " + s["grade"] + "? " + sgl.gen("why", max_tokens=2)


def survey(s: Any, document: int, question: int) -> None:
    """A fork of four, joined, and a choice."""
    s += DOCUMENTS[document] + f"Survey {question}: "
    forks = s.fork(4)
    for index, fork in enumerate(forks):
        fork += f"part {index}" + sgl.gen("part", max_tokens=2)
    forks.join()
    s += ";".join(s["part"]) + " So "
    s += sgl.select("verdict", choices=["yes", "no"])


def chat(s: Any, document: int, question: int) -> None:
    """Roles of a chat template, with stop strings in a list that the program owns."""
    s += sgl.system("Answer.")
    s += sgl.user(DOCUMENTS[document])
    with s.assistant():
        s += sgl.gen("first", max_tokens=3, stop=[*STOP])
    s += sgl.user(f"And {question}?")
    s += sgl.assistant(sgl.gen("second", max_tokens=3))


STOP = ["!"]


def typed(s: Any, document: int, question: int) -> None:
    """Constrained answers."""
    s += DOCUMENTS[document] + f"{question}: "
    s += sgl.gen("number", max_tokens=4, regex="[0-9]+")
    s += sgl.gen("truth", max_tokens=8, json_schema='{"type": "boolean"}')
    s += sgl.gen("count", max_tokens=4, dtype=int)


def choose(s: Any, document: int, question: int) -> None:
    """A choice before any answer."""
    s += DOCUMENTS[document] + f"{question}: "
    s += sgl.select("verdict", choices=["red", "blue", "green"])
    s += sgl.gen("more", max_tokens=2)


def append(s: Any, document: int, question: int) -> None:
    """Variables, scopes, and a copy whose text is not kept."""
    s["n"] = str(question)
    with s.var_scope("shown"):
        s += DOCUMENTS[document] + s["n"]
    with s.copy() as other:
        other += "?" + sgl.gen("aside", max_tokens=2)
    s += s["shown"][-3:] + sgl.gen("main", max_tokens=2)


def several(s: Any, document: int, question: int) -> None:
    """Several answers in one expression, and samples of an equal prompt."""
    s += (
        DOCUMENTS[document]
        + sgl.gen("a", max_tokens=2)
        + f" {question} "
        + sgl.gen("b", max_tokens=2)
    )
    forks = s.fork(3)
    forks += sgl.gen("same", max_tokens=2)
    forks.join()


FORMS = [ask, judge, survey, chat, typed, choose, append, several]


def mixed(s: Any, kind: str, document: int, question: int) -> None:
    """One of three kinds; keeps what the server says of its first requests."""
    s += DOCUMENTS[document] + f"{kind} {question}: "
    if kind == "survey":
        forks = s.fork(4)
        for index, fork in enumerate(forks):
            fork += f"part {index}" + sgl.gen("part", max_tokens=1)
        forks.join()
        s["first"] = [fork.get_meta_info("part") for fork in forks]
        s += ";".join(s["part"]) + " So "
        s += sgl.select("verdict", choices=["yes", "no"])
        return
    s += sgl.gen("answer", max_tokens=2)
    s["first"] = [s.get_meta_info("answer")]
    if kind == "judge":
        s += " Why " + s["answer"] + "? " + sgl.gen("why", max_tokens=2)


def arguments(count: int) -> list[dict[str, int]]:
    return [{"document": i % len(DOCUMENTS), "question": i} for i in range(count)]
