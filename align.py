"""Test-time user-preference alignment (Section 2.2, Eq. 5, Algorithm 1): rewrite the persona.

A line belongs here if it changes a persona, or decides whether to. Works on any agent that has
`persona`, `memory` (iterable, with `select`), `tools` (each with `over(memory)`) and
`answer(question)` (with `text` and `status`), and on any model with `chat`. Nothing but
`agent.persona` is changed, and every step is recorded. No validation set is looked at, and an
update that turns out worse stays.
"""

import copy
import html
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

# paper, Appendix A, word for word ("Loss Gradient/Feedback Prompt"). Read by LLM_grad, once per
# interaction of the batch.
GRADIENT_PROMPT = """\
You are a meticulous and critical evaluator of personalized AI agent responses.

Analyze the following and give the feedback on how to improve the system prompt to align with the \
user's preferences.

Question: [Question]

Expected Answer: [Ground Truth]

Agent Response: [Response]

Your feedback should focus on how to adjust the persona system prompt to tailor the agent's \
responses to the individual user's unique characteristics. Make sure the feedback is concise and \
clear.

Tips:

1. Explain on how to improve the search keywords of tools for this user.
2. Take the user's prior interactions, preferences, and any personalization aspects into \
consideration.
3. Provide explicit description for user profile and preferences that is not specific to this task.

Feedback:"""

# paper, Appendix A, word for word ("Gradient Update Prompt"). Read by LLM_update, once per
# iteration.
UPDATE_PROMPT = """\
You are a prompt engineering assistant tasked with refining the personal agent system prompts for \
improved user preference alignment.

Current system prompt: [Current Persona]

Provided Feedback: [Aggregated Feedback]

Based on the feedback above, generate an updated system prompt that explicitly highlights the \
user's unique preferences. Ensure that the prompt instructs the agent to align its responses with \
the user's preferences, including detailed user profile or preferences. Please maintain a helpful \
and clear tone in the system prompt.

New system prompt:"""

UPDATE_TOKENS = 2048  # of an update reply
MAX_WORDS = 1500  # of an updated persona
MAX_CHANGE = 4  # times longer or shorter than the persona before it
SHORT = 100  # words: a shorter persona counts as this long when growth is judged


@dataclass
class Sample:
    """One interaction of the batch: the user's answer, the agent's simulated one and the feedback
    on the difference. answer: what `agent.answer` returned; [Response] is its text."""

    query: str
    expected: str
    answer: Any
    feedback: str
    degenerate: bool


@dataclass
class Iteration:
    """One pass of Algorithm 1: the batch simulated, then one update. reasons: why the update
    `reply` was not accepted; `after` is then the persona `before`. new: the share of after's words
    that `before` has not. quoted: samples, by their place, of whose queries `after` has copied
    eight words in a row."""

    before: str
    samples: list  # of Sample
    reply: str
    after: str
    reasons: list
    new: float = 0.0
    quoted: list = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        return not self.reasons


@dataclass
class Alignment:
    """What alignment did: `final` is the persona P*."""

    initial: str
    final: str
    iterations: list = field(default_factory=list)


def fill(template: str, **values: str) -> list:
    """A prompt of Appendix A as messages, with values in its [Placeholders], named without blanks.

    Its first paragraph, which says who the model is, is the system message. One pass: brackets
    inside a value stay as they are."""
    role, _, rest = template.partition("\n\n")
    filled = re.sub(r"\[([A-Z][A-Za-z ]+)\]", lambda m: values[m[1].replace(" ", "")], rest)
    return [{"role": "system", "content": role}, {"role": "user", "content": filled}]


def bare(text: str) -> str:
    """What two spellings of one text share: letters and digits, in one case and Unicode form.

    'Don&rsquo;t<br />STOP.' -> 'dontstop'. Leaks are looked for with it."""
    text = str(text)
    for _ in range(2):  # '&amp;#39;' is "'" written twice over
        text = html.unescape(re.sub(r"&#\d{99,}", "", text))  # longer ones raise ValueError
        text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"<[a-z/][^<>]{0,40}>|[\W_]", "", text)


def _words(text):
    return re.findall(r"\w+", text.lower())


def _runs(text):
    """The runs of eight words of a text: one that another text shares, it has copied."""
    words = _words(text)
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


# Words beside an answer that teach nothing
FILLER = """the a an is was be should expected correct right answer response feedback label score
rating tag category agent it of question"""


def is_degenerate(feedback: str, *given: str) -> bool:
    """Whether nothing can be learned from feedback on what was `given`.

    It has fewer than three different words of its own, beside those of FILLER and what was given
    ('', 'Expected Answer: 3.', 'dark comedy'), or has run into a loop, or is for the most part a
    copy of what was given or of the gradient prompt. A word is a run of letters: in a script
    without blanks short feedback counts as degenerate."""
    words = _words(feedback)
    looping = len(words) > 100 and len(set(words)) < len(words) / 5
    own = {word for word in words if word.isalpha()} - set(_words(" ".join([FILLER, *given])))
    runs = _runs(feedback)
    known = runs & _runs(" ".join([GRADIENT_PROMPT, *given]))
    return looping or len(own) < 3 or len(known) > len(runs) / 2


# What models put before an updated prompt: blank lines, rules, code fences, 'Certainly! ..', 'Here
# is the updated system prompt:', '**Revised prompt**', and at last 'System prompt: ' in its line.
OPENING = r"""(?xi)\A
    (?: [#*_ \t]* (?![#*_ \t])
        (?: (?:certainly|sure|of\ course|absolutely) [!,:] .*
        | (?= .* \b(?:prompt|persona|version)\b )
          (?:here|below|based\ on|the\ following|following|this\ is)\b [^.\n]* :
        | (?:(?:current|new|updated|revised|refined|improved)\ )? (?:persona\ |system\ )* prompt :?
        ) [*_ \t]* (?:\n|\Z)
    | [ \t]* (?:(?:[-*_=]{3,}|`{3}\w*)[ \t]*)? (?:\n|\Z)
    )*
    (?: [#*_ \t]* (?![#*_ \t])
        (?:(?:current|new|updated|revised)\ )? (?:persona\ |system\ )* prompt
        [*_ \t]* : [*_ \t]* )?"""
# Where a closing remark may begin: below a rule or a fence, then also below a blank line
RULE = r"(\n[ \t]*(?:[-*_=]{3,}|`{3}\w*)[ \t]*(?=\n|\Z))"
BORDER = r"(\n[ \t]*(?:(?:[-*_=]{3,}|`{3}\w*)[ \t]*)?(?=\n|\Z))"
# What they put after it, behind one of these: a remark, or nothing
CLOSING = r"""(?xi)\Z | [#*_ \t]* (?![#*_ \t])
    (?: (?:(?:this|these)[ ]|the[ ](?=new|updated|revised|refined|improved|above|changes\b))
        (?:(?:new|updated|revised|refined|improved|above|system|persona)\ )*
        (?:changes?|prompt|version)\b
    | i\ hope\ this
    | key\ changes(?:\ made)?:
    | (?:please\ )?
      (?: feel\ free\ to\ (?:adjust|change|modify|edit|ask\ (?:if|me|any)\b|let\ me)
      | let\ me\ know\ (?:if|how|whether|what\ you) )
    | if\ you[ ]
      (?: have\ any\ (?:questions|feedback|changes|suggestions)
      | need\ any\ (?:changes|adjustments|modifications|further|more)
      | would\ like\ (?:me|any|further|changes) )
    )"""
# <system_prompt>..</system_prompt>, "..": round the whole of it
ENCLOSING = r"""(?s)\A(?:<(\w+)>(.*)</\1>|"([^"]*)")\Z"""
# The update prompt's next heading, where the model goes on with what it was given
ECHO = r"(?im)^[#*_ \t]*provided feedback[*_ \t]*:"
# 'I'm sorry, ..', 'As an AI language model, I cannot ..'
REFUSAL = r"""(?xi)\W*
    (?: as\ an\ ai(?:\ language)?(?:\ model|\ assistant)?,\ i\b
    | (?:unfortunately,\ )? i\ can(?:no|['’])t
    | i(?:['’]m|\ am)\ (?:sorry|unable|not\ able) | sorry, | i\ apologi[sz]e )"""


def unwrap(reply: str) -> str:
    """The prompt inside an update reply, without opening line, headings, rules, fences, quotes or a
    tag round it, closing remarks, and an echo of the feedback. What stands between them is not
    touched; a last paragraph of its own that reads like a closing remark goes, too."""
    text = re.split(ECHO, reply)[0]
    text = re.sub(OPENING, "", text.strip())
    for border in (RULE, BORDER):
        parts = re.split(border, text.strip())
        while len(parts) > 1 and re.match(CLOSING, parts[-1].strip()):
            del parts[-2:]  # the remark and the border above it
        text = "".join(parts)
    return re.sub(ENCLOSING, r"\2\3", text.strip()).strip()


def judge(reply: Any, before: str) -> tuple:
    """(persona, []) if an update reply can replace the persona `before`, else (before, reasons)."""
    after = unwrap(reply.text)
    words, old = len(after.split()), len(before.split())
    checks = {
        "refused": reply.finish == "content_filter" or re.match(REFUSAL, after),
        "longer than the model takes": reply.finish == "overflow",
        "cut off at the token limit": reply.finish == "length",
        "empty": not after,
        "too long": words > min(MAX_WORDS, MAX_CHANGE * max(old, SHORT)),
        "too short": words * MAX_CHANGE < old,
        "unchanged": after == before,
    }
    reasons = [reason for reason, found in checks.items() if found]
    return (before if reasons else after), reasons


def simulate(agent: Any, llm: Any, place: int) -> Sample:
    """r_hat, the agent's answer to an episode of its memory as of then, and the textual gradient
    LLM_grad(q, r_hat, r).

    The tools read what was known before the episode, and of that nothing that asks the same."""
    *earlier, episode = list(agent.memory)[: place + 1]
    question = episode.query
    gold = episode.response
    asked = bare(question)
    known = [i for i, old in enumerate(earlier) if bare(old.query) != asked]
    past = agent.memory.select(known)
    twin = copy.copy(agent)
    twin.tools = [tool.over(past) for tool in agent.tools]
    answer = twin.answer(question)
    prompt = fill(
        GRADIENT_PROMPT,
        Question=_delimited("question", question),
        GroundTruth=_delimited("expected_answer", gold),
        Response=_delimited("agent_response", answer.text),
    )
    feedback = llm.chat(prompt).text
    failed = answer.status in ("refused", "overflow")  # by the model, which tells nothing of a user
    degenerate = failed or is_degenerate(feedback, question, gold, answer.text)
    return Sample(question, gold, answer, feedback, degenerate)


def _delimited(tag, value):
    """A value of the gradient prompt, marked as one: a model obeys a question that it quotes."""
    return f"<{tag}>\n{value}\n</{tag}>"


def update(llm: Any, before: str, samples: list) -> Iteration:
    """P* = LLM_update(gradients, P): one call over all usable feedback, numbered."""
    useful = [sample.feedback for sample in samples if not sample.degenerate]
    if not useful:
        return Iteration(before, samples, "", before, ["no usable feedback"])
    feedback = "\n\n".join(f"{i}. {text}" for i, text in enumerate(useful, 1))
    prompt = fill(UPDATE_PROMPT, CurrentPersona=before, AggregatedFeedback=feedback)
    reply = llm.chat(prompt, max_tokens=UPDATE_TOKENS)
    after, reasons = judge(reply, before)
    words = set(_words(after))
    new = len(words - set(_words(before))) / max(len(words), 1)
    copied = _runs(after) - _runs(before)
    quoted = [i for i, sample in enumerate(samples) if copied & _runs(sample.query)]
    return Iteration(before, samples, reply.text, after, reasons, new, quoted)


def align(agent: Any, llm: Any, n: int = 3, iterations: int = 1) -> Alignment:
    """Algorithm 1 on the last n labelled episodes of `agent.memory`; sets `agent.persona` to P*.

    Iterations repeat over the same batch, each from the persona that the one before left. The
    simulations of a batch run side by side."""
    labelled = [i for i, episode in enumerate(agent.memory) if episode.response]
    record = Alignment(agent.persona, agent.persona)
    if n < 1 or not labelled:
        return record
    batch = labelled[-n:]
    with ThreadPoolExecutor(len(batch)) as pool:
        for _ in range(iterations):
            samples = list(pool.map(lambda place: simulate(agent, llm, place), batch))
            iteration = update(llm, agent.persona, samples)
            record.iterations.append(iteration)
            agent.persona = record.final = iteration.after
    return record
