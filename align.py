"""Test-time user-preference alignment (Section 2.2, Eq. 5, Algorithm 1): rewrite the persona by textual feedback.

Works on any agent that has `persona`, `memory` (iterable, with `before(i)` and `drop(indices)`), `tools` (each with
`over(memory)`) and `answer(question)`, and any model with `chat(messages, max_tokens=..)` whose replies have `text` and
`finish`. It changes nothing but `agent.persona`, and keeps a record of every step.
What it does not do: look at a validation set, or take back an update that turns out worse.
"""
import copy
import difflib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

# paper, Appendix A, word for word ("Loss Gradient/Feedback Prompt"). Read by LLM_grad, once per interaction of the batch.
GRADIENT_PROMPT = """\
You are a meticulous and critical evaluator of personalized AI agent responses.

Analyze the following and give the feedback on how to improve the system prompt to align with the user's preferences.

Question: [Question]

Expected Answer: [Ground Truth]

Agent Response: [Response]

Your feedback should focus on how to adjust the persona system prompt to tailor the agent's responses to the individual \
user's unique characteristics. Make sure the feedback is concise and clear.

Tips:

1. Explain on how to improve the search keywords of tools for this user.
2. Take the user's prior interactions, preferences, and any personalization aspects into consideration.
3. Provide explicit description for user profile and preferences that is not specific to this task.

Feedback:"""

# paper, Appendix A, word for word ("Gradient Update Prompt"). Read by LLM_update, once per iteration.
UPDATE_PROMPT = """\
You are a prompt engineering assistant tasked with refining the personal agent system prompts for improved user \
preference alignment.

Current system prompt: [Current Persona]

Provided Feedback: [Aggregated Feedback]

Based on the feedback above, generate an updated system prompt that explicitly highlights the user's unique preferences. \
Ensure that the prompt instructs the agent to align its responses with the user's preferences, including detailed user \
profile or preferences. Please maintain a helpful and clear tone in the system prompt.

New system prompt:"""

MAX_WORDS = 1500  # of an updated persona
MAX_CHANGE = 4    # times longer or shorter than the persona before it
SHORT = 100       # words: a shorter persona counts as this long when growth is judged
REFUSAL = re.compile(r"\W*(i'm sorry|i am sorry|sorry,|i can(no|')t|i am unable|i'm unable|as an ai\b)", re.I)
# words beside an answer that teach nothing
FILLER = set("the a an is was be should expected correct right answer response feedback label score rating tag "
             "category agent it of".split())
# What models put round an updated prompt: opening remarks and headings, closing remarks, rules and code fences.
OPENER = (r"(?:(?:certainly|sure|of course|absolutely)[!,.:].*|(?:here|below|based on|the following|following|this is)\b[^.\n]*"
          r"\b(?:prompt|persona|version)\b[^.\n]*:|"
          r"(?:(?:new|updated|revised|refined|improved) )?(?:persona |system )*prompt)")
CLOSER = (r"(?:(?:this|the|these) (?:(?:new|updated|revised|refined|improved|above|system|persona)\s+)*"
          r"(?:changes?|prompt|version)\b|(?:please )?(?:feel free to (?:adjust|change|modify|edit|ask|let me)|"
          r"let me know (?:if|how|whether|what you))\b|i hope this|"
          r"key changes(?: made)?:|if you (?:have any (?:questions|feedback|changes|suggestions)|"
          r"need any (?:changes|adjustments|modifications|further|more)|would like (?:me|any|further|changes))\b)")
RULE = r"[ \t]*(?:[-*_=]{3,}|`{3}\w*)[ \t]*"
PACKAGING = [re.compile(p, re.I) for p in (
    rf"\A(?:[#*_ \t]*{OPENER}[*_ \t]*|{RULE}|[ \t]*)\n",                       # a first line
    rf"\n{RULE}\n\s*[#*_ \t]*{CLOSER}(?:(?!\n{RULE}\n)[\s\S])*\Z",             # a closing remark after a rule
    rf"\n\s*\n[#*_ \t]*{CLOSER}(?:(?!\n\s*\n)[\s\S])*\Z",                      # a closing remark as last paragraph
    rf"(?:\n|\A){RULE}\Z",                                                     # a last line
    r"\A[#*_ \t]*(?:(?:new|updated|revised) )?(?:persona |system )*prompt[*_ \t]*:[*_ \t]*")]  # 'System prompt: You are'


@dataclass
class Sample:
    """One interaction of the batch: the user's answer, the agent's simulated one, and the feedback on the difference."""
    query: str
    expected: str
    answer: object  # what `agent.answer` returned; [Response] is its text
    feedback: str
    degenerate: bool


@dataclass
class Iteration:
    """One call of OPTIMIZATION. `reason` says why an update was not accepted; `after` is then the persona `before`."""
    before: str
    samples: list
    reply: str
    after: str
    accepted: bool
    reason: str = ""


@dataclass
class Alignment:
    """What alignment did: `final` is the persona P*, `iterations` its record."""
    initial: str
    final: str
    iterations: list = field(default_factory=list)


def fill(template, values):
    """A prompt of Appendix A as messages: its first paragraph, which says who the model is, as system message, the rest as user
    message, with values in its [Placeholders], in one pass, so that brackets inside a value stay as they are."""
    role, _, rest = template.partition("\n\n")
    filled = re.sub("|".join(re.escape(f"[{name}]") for name in values), lambda m: values[m[0][1:-1]], rest)
    return [{"role": "system", "content": role}, {"role": "user", "content": filled}]


def is_degenerate(feedback, *answers):
    """Whether nothing can be learned from feedback: it is empty or only an answer ('3', 'Expected Answer: 3.', 'dark comedy'),
    that is, fewer than three words are left beside it, or it has run into a loop ('travel psychology, travel psychology, ..').
    Words are what blanks part: feedback in a script without blanks counts as degenerate."""
    words = re.findall(r"\w+", feedback.lower())
    looping = len(words) > 100 and len(set(words)) < len(words) / 5
    own = {w for w in words if w.isalpha()} - FILLER - set(re.findall(r"\w+", " ".join(answers).lower()))
    return looping or len(own) < 3


def unwrap(reply):
    """The prompt inside an update reply: without 'Certainly! Here is ..', headings such as '**Updated system prompt:**',
    rules, fences and closing remarks round it. What stands between them is not touched."""
    text, last = reply.strip(), None
    while text != last:
        last = text
        for packaging in PACKAGING:
            text = packaging.sub("", text, count=1).strip()
    return text[1:-1].strip() if text[:1] == text[-1:] == '"' and text.count('"') == 2 else text


def judge(reply, before):
    """(persona, '') if an update reply can replace the persona `before`, else (before, reason)."""
    after = unwrap(reply.text)
    words, old = len(after.split()), len(before.split())
    reason = ("the update was refused" if reply.finish == "content_filter" or REFUSAL.match(after) else
              "the update was cut off at the token limit" if reply.finish == "length" else
              "the update is empty" if not words else
              f"the update has {words} words, over {MAX_WORDS}" if words > MAX_WORDS else
              f"the update has {words} words, over {MAX_CHANGE} times the persona before it"
              if words > MAX_CHANGE * max(old, SHORT) else
              f"the update has {words} words, the persona before it {old}" if words * MAX_CHANGE < old else
              "the update only repeats the persona" if after == before else "")
    return (before, reason) if reason else (after, "")


def _update(before, samples, llm):
    """P* = LLM_update(gradients, P): one call over all usable feedback, numbered; the Iteration that it makes."""
    useful = [s.feedback for s in samples if not s.degenerate]
    if not useful:
        return Iteration(before, samples, "", before, False, "no usable feedback")
    feedback = "\n\n".join(f"{i}. {text}" for i, text in enumerate(useful, 1))
    reply = llm.chat(fill(UPDATE_PROMPT, {"Current Persona": before, "Aggregated Feedback": feedback}), max_tokens=2048)
    after, reason = judge(reply, before)
    return Iteration(before, samples, reply.text, after, not reason, reason)


def align(agent, llm, n=3, iterations=1):
    """Algorithm 1 on the last n labelled episodes of `agent.memory`; sets `agent.persona` to P* and returns the record.

    Iterations repeat over the same batch, each from the persona that the one before left. A simulated answer must not see
    its own gold answer, so its tools read `memory.before(i)` without any episode that asks the same. The calls of one step
    run side by side."""
    episodes = list(agent.memory)
    batch = [i for i, e in enumerate(episodes) if e.response][-n:] if n > 0 else []
    record = Alignment(agent.persona, agent.persona)
    if not batch:
        return record

    def sample(i):
        """r_hat = the agent's answer as of episode i; then the textual gradient LLM_grad(q, r_hat, r)."""
        twin, episode, known = copy.copy(agent), episodes[i], agent.memory.before(i)
        known.drop([j for j in range(i) if episodes[j].query.lower().split() == episode.query.lower().split()])
        twin.tools = [tool.over(known) for tool in agent.tools]
        answer = twin.answer(episode.query)
        values = {"Question": episode.query, "Ground Truth": episode.response, "Response": answer.text}
        feedback = llm.chat(fill(GRADIENT_PROMPT, values)).text.strip()
        return Sample(episode.query, episode.response, answer, feedback,
                      is_degenerate(feedback, episode.response, answer.text))

    with ThreadPoolExecutor(len(batch)) as pool:
        for _ in range(iterations):
            step = _update(agent.persona, list(pool.map(sample, batch)), llm)
            record.iterations.append(step)
            agent.persona = record.final = step.after
    return record


def marked(before, after):
    """`after` with what it took out of `before` as [-..-] and what it put in as {+..+}, word by word."""
    def wrap(words, start, end):
        text = "".join(words)
        return text and text[:-len(text.lstrip())] + start + text.lstrip() + end

    old, new = (re.findall(r"\s*\S+", text) for text in (before, after))
    return "".join("".join(new[k:m]) if kind == "equal" else wrap(old[i:j], "[-", "-]") + wrap(new[k:m], "{+", "+}")
                   for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes())


def tell(answer):
    """An answer (`asdict` of persona_agent.Answer) as readable text: every Thought, Action and Observation, then the answer."""
    names = {"thought": "Thought", "action": "Action", "input": "Action Input", "observation": "Observation"}
    lines = [f"{names[key]}: {step[key]}" for step in answer["steps"] for key in names if step[key] is not None]
    return "\n".join([*lines, f"Answer: {answer['text']!r} ({answer['status']})"])


def story(record):
    """An alignment (`asdict` of an Alignment) as readable text: persona, simulations, feedback and what came of them."""
    parts = [f"--- persona, initial\n{record['initial']}"]
    for n, step in enumerate(record["iterations"], 1):
        for s in step["samples"]:
            parts.append(f"--- iteration {n}, simulated\n{s['query']}\n{tell(s['answer'])}\nthe user's: {s['expected']!r}\n"
                         f"--- feedback{', degenerate: dropped' if s['degenerate'] else ''}\n{s['feedback'] or '(empty)'}")
        parts.append(f"--- persona after iteration {n}, the changes marked\n{marked(step['before'], step['after'])}"
                     if step["accepted"] else
                     f"--- persona unchanged: {step['reason']}; the update reply was\n{step['reply'] or '(no call)'}")
    return "\n\n".join(parts)
