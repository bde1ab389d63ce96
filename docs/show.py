"""One question of every run that was asked it, as a story: python docs/show.py ID

A line belongs here if it makes rows readable: the persona before, what alignment did to it, the
question, every step of the agent, its answer, and what the user had said.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import NoRun, Run, reading, runs_below, script

import lamp

PARTS = {
    "thought": "Thought",
    "action": "Action",
    "input": "Action Input",
    "observation": "Observation",
}


def marked(before: str, after: str) -> str:
    """`after` with what it took out of `before` as [-..-] and what it put in as {+..+}, by words:
    'You [-help.-] {+watch films.+}'."""
    old, new = (re.findall(r"\S+\s*", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(None, before.split(), after.split())
    text = ""
    for kind, i, j, k, m in matcher.get_opcodes():
        removed = _wrapped(old[i:j], "[-", "-]")
        added = _wrapped(new[k:m], "{+", "+}")
        pieces = [removed, added]
        if kind == "equal":
            pieces = ["".join(new[k:m])]
        elif added:
            pieces = [removed.rstrip(), added]
        for piece in filter(None, pieces):
            if text and not text[-1].isspace():
                text += " "
            text += piece
    return text


def _wrapped(words, start, end):
    text = "".join(words)
    bare = text.rstrip()
    if not bare:
        return ""
    return start + bare + end + text[len(bare) :]


def told(answer: dict) -> str:
    """An answer with its steps: every Thought, Action, Action Input and Observation."""
    lines = []
    for step in answer["steps"]:
        for key, name in PARTS.items():
            if step[key]:
                lines.append(f"{name}: {step[key]}")
    lines.append(f"Answer: {answer['text']!r} ({answer['status']})")
    return "\n".join(lines)


def spent(usage: dict) -> str:
    """'3 calls, 2777 + 77 tokens, 0.1 s'"""
    tokens = f"{usage['input']} + {usage['output']} tokens"
    return f"{usage['calls']} calls, {tokens}, {usage['seconds']:.1f} s"


def alignment(line: dict) -> list[str]:
    """A line of personas.jsonl: the persona, and each iteration's simulations, feedback and
    outcome."""
    parts = []
    if line["profile"]:
        parts.append(f"--- profile (semantic memory)\n{line['profile']}")
    if line["initial"]:
        parts.append(f"--- persona, initial\n{line['initial']}")
    for number, iteration in enumerate(line["iterations"], 1):
        for sample in iteration["samples"]:
            answer = told(sample["answer"])
            parts.append(f"--- iteration {number}, simulated\n{sample['query']}\n\n{answer}")
            parts.append(f"the user's: {sample['expected']!r}")
            dropped = ", degenerate: dropped" if sample["degenerate"] else ""
            parts.append(f"--- feedback{dropped}\n{sample['feedback'] or '(empty)'}")
        if iteration["reasons"]:
            why = ", ".join(iteration["reasons"])
            reply = iteration["reply"] or "(no call)"
            parts.append(f"--- persona unchanged: {why}; the update reply was\n{reply}")
        else:
            change = marked(iteration["before"], iteration["after"])
            what = f"{iteration['new']:.0%} new words"
            for place in iteration["quoted"]:
                what += f", eight or more in a row from simulated question {place + 1}"
            parts.append(f"--- persona after iteration {number}, {what}, marked\n{change}")
    if line["usage"]["calls"]:
        parts.append(f"profile and alignment: {spent(line['usage'])}")
    return parts


def story(run: Run, row: dict) -> str:
    """One row of a run from the persona to the verdict."""
    parts = [f"=== {run.folder}: query {row['id']} of user {row['user_id']}"]
    for line in run.lines:
        if line["user_id"] == row["user_id"] and "error" not in line:
            parts += alignment(line)
    if "error" in row:
        parts.append(f"--- FAILED: {row['error']}")
    else:
        verdict = "RIGHT" if row["prediction"] == row["gold"] else "WRONG"
        parts.append(f"--- question\n{row['question']}")
        parts.append(f"{told(row)}, read as {row['prediction']!r}")
        parts.append(f"the user's: {row['gold']!r}, {verdict}")
    parts.append(spent(row["usage"]))
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("show.py", description="One question as a story.")
    add = parser.add_argument
    add("id", metavar="ID", help="of a query, as predictions.jsonl has it")
    add("--output", default="runs", metavar="DIR", help="folder above the runs (runs)")
    add("--method", metavar="M,..", help="only runs of these methods")
    settings = parser.parse_args(argv)
    runs = runs_below([settings.output])
    if settings.method:
        runs = [run for run in runs if run.method in settings.method.split(",")]
    stories = []
    for run in runs:
        for row in [*run.rows.values(), *run.failed]:
            if row["id"] == settings.id:
                with reading(run.folder):
                    stories.append(story(run, row))
    if not stories:
        raise NoRun(f"no query {settings.id!r} in {len(runs)} runs below {settings.output}")
    print(lamp.printable("\n\n\n".join(stories)))


if __name__ == "__main__":
    sys.exit(script("show.py", main, sys.argv[1:]))
