"""LaMP: the four tasks, the data, the methods, the runner and the command line.

`python lamp.py --task lamp1` runs PersonaAgent on the bundled sample against a stand-in server; `--help` has the rest.
Gold labels are read here and go to the scoring in metrics.py alone: no request to a model holds the gold of an evaluated query.
"""
import argparse
import functools
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import align
import memory as memories
import metrics
import persona_agent
import tools
from memory import Episode, EpisodicMemory, MemoryBank, summarize
from metrics import Folder, Ledger, Problem
from persona_agent import (Answer, Bedrock, Cached, Client, Meter, OpenAICompatible, PersonaAgent, Step, Usage, complete,
                           initial_persona, react)
from tools import RAG, WIKI_DOWN, Cache, ContextOverflow, ServiceError, Wiki

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "tests" / "sample"


# ---------------------------------------------------------------------------------------------------- tasks

@dataclass(frozen=True)
class Task:
    """A LaMP task as data. `pattern` finds in an input the text that history items are compared with (`key`) and, in
    LaMP-1, the two options (`a`, `b`); a history item becomes a full question by putting its own text in their place."""
    name: str
    title: str
    folder: str      # of the official release, below the root or below time/
    labels: tuple    # in the order of the official scorer
    pattern: str
    fields: tuple    # of a history item
    text: str        # the one of them that is compared with `key`
    label: str       # the item's field with the answer (LaMP-1: the title that the paper cites, where the data have it)
    example: str     # one retrieved item in LaMP's own prompts (LaMP/prompts/prompts.py)
    summary: str     # S_t of Eq. 3 (ours, asking what PAG's prompts ask)
    options: str = ""  # the groups of `pattern` that hold a question's own options

    def match(self, text):
        return re.search(self.pattern, text, re.S)

    def key(self, text):
        """What makes two questions the same: the input's own text, in one spelling."""
        return norm(self.match(text)["key"])


TASKS = {t.name: t for t in (
    Task("lamp1", "LaMP-1: Personalized Citation Identification", "LaMP_1", metrics.CITATIONS,
         r'paper with the title "(?P<key>.*)", which reference is related\?.*?\[1\]: "(?P<a>.*)" \[2\]: "(?P<b>.*)"',
         ("title", "abstract"), "title", "citation", '"{title}"',
         "These are papers that one researcher has written, with a paper each of them cites where that is known. Write a "
         "profile of the researcher: research interests, topics and methods, and what kind of work they tend to cite.", "ab"),
    Task("lamp2m", "LaMP-2M: Personalized Movie Tagging", "LaMP_2/new", metrics.MOVIE_TAGS,
         r"\] description: (?P<key>.*)", ("description",), "description", "tag",
         'the tag for the movie: "{description}" is "{tag}" ',
         "These are movies that one user has tagged. Write a profile of the user: the tag they give most often, the films "
         "they watch, and how they choose between tags that would both fit."),
    Task("lamp2n", "LaMP-2N: Personalized News Categorization", "LaMP_2", metrics.NEWS_CATEGORIES,
         r"\] article: (?P<key>.*)", ("title", "text"), "text", "category",
         'the category for the article: "{text}" is "{category}" ',
         "These are articles that one journalist has written, with their categories. Write a profile of the journalist: the "
         "category they write in most often, their subjects, and how they choose between categories that would both fit."),
    Task("lamp3", "LaMP-3: Personalized Product Rating", "LaMP_3", metrics.RATINGS,
         r"without further explanation\. review: (?P<key>.*)", ("text",), "text", "score", '{score} is the score for "{text}" ',
         "These are product reviews that one user has written, with the scores they gave. Write a profile of the user: the "
         "scores they give most often to positive and to negative reviews, what they care about, and how they write."))}


# ---------------------------------------------------------------------------------------------------- data

Query = namedtuple("Query", "id input gold")  # texts
FAULT = "{}, record {}: {}"


@dataclass
class User:
    """history: oldest first, without anything that would give an evaluated query away; `leaks` counts what was taken out."""
    id: str
    history: list
    queries: list
    leaks: int = 0


def records(path, only=None):
    """Stream (number, (start, end) in characters, element) of a JSON array of any size: what is held is one element.

    only: {number: (start, end)} from an earlier pass; nothing else is parsed then."""
    decode, chunk = json.JSONDecoder().raw_decode, 1 << 20
    with open(path, encoding="utf-8-sig") as file:
        passed, number = 0, 0  # characters of the file before the buffer
        for n, (start, end) in sorted((only or {}).items()):
            while passed < start:
                passed += len(file.read(min(chunk, start - passed)))
            yield n, (start, end), json.loads(file.read(end - start))
            passed = end
        if only is not None:
            return
        buffer = file.read(chunk)
        at = len(buffer) - len(buffer.lstrip()) + 1
        if buffer[at - 1:at] != "[":
            raise Problem(f"{path} is not a JSON array, it starts with {buffer[:30]!r}: download it again, or check the path.")
        while True:
            at = re.compile(r"[\s,]*").match(buffer, at).end()
            if buffer.startswith("]", at):
                return
            try:
                record, end = decode(buffer, at)
                yield number, (passed + at, passed + end), record
                at, number = end, number + 1
            except json.JSONDecodeError as e:
                cut = e.pos > len(buffer) - 10 or e.msg.startswith("Unterminated")  # only the buffer ends, or the file
                more = cut and file.read(max(chunk, len(buffer) - at))  # doubles, so that a large record is not parsed too often
                if not more:
                    raise Problem(f"{path} is not complete JSON ({e.msg} before byte {file.tell():,} of "
                                  f"{os.path.getsize(path):,}), perhaps half written: download it again.") from None
                passed, buffer, at = passed + at, buffer[at:] + more, 0


def locate(task, data):
    """[(questions file, outputs file | None)], the partition to evaluate last. None: an OPPU file, which holds its gold.

    Official layout: DATA[/time]/<folder>/{train,dev}/{split}_questions.json beside {split}_outputs.json; OPPU layout: a
    file *history.json. `data` may be the root, a folder further down, or a file."""
    root = Path(data)
    if not root.exists():
        raise Problem(f"--data {data} does not exist. README.md says where LaMP comes from.")
    for base in ([root / "time" / task.folder, root / task.folder, root] if root.is_dir() else [root]):
        files = [base] if base.is_file() else [f for s in ("train", "dev") for f in (
            base / s / f"{s}_questions.json", base / f"{s}_questions.json") if f.exists()] or sorted(base.glob("*history.json"))
        pairs = [(f, f.with_name(f.name.replace("_questions", "_outputs")) if "_questions" in f.name else None) for f in files]
        usable = [p for p in pairs if not p[1] or p[1].exists()]
        if usable:
            return usable
        if pairs:
            raise Problem(f"{pairs[-1][0]} has no gold beside it: put {pairs[-1][1].name} there (LaMP has it for train and dev).")
    raise Problem(f"{data} holds no {task.name} data: neither [time/]{task.folder}/dev/dev_questions.json nor a *history.json.")


def read_gold(task, path):
    """{id: gold} of an official outputs file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        gold = {str(g["id"]): g["output"] for g in data["golds"]}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise Problem(f"{path} is not a LaMP outputs file ({type(e).__name__}: {e}): download it again.") from None
    if data.get("task") != task.folder.split("/")[0]:
        raise Problem(f"{path} holds gold for {data.get('task')}, not for {task.folder.split('/')[0]}: check --data and --task.")
    return gold


def date_of(item):
    """'2012-03-06' -> (2012, 3, 6), 2012 -> (2012,), no date -> (): orders dates as the official code does."""
    return day(str(item.get("date", ""))) if isinstance(item, dict) else ()


@functools.lru_cache(1 << 16)  # a large file holds millions of dates, but few different ones
def day(text):
    return tuple(map(int, re.findall(r"\d+", text)))


def entries(task, parts, faults, only=None):
    """(user, Query, profile, order in time, place in the files) of each usable query; `faults` gets (path, record, what) of
    the others.

    A part with gold None has OPPU's records: {user_id, profile, query: [{id, input, gold}]}. only: per part, as in `records`."""
    for part, (path, gold) in enumerate(parts):
        for number, span, record in records(path, only and only[part]):
            record = record if isinstance(record, dict) else {}
            profile, asked = record.get("profile"), [record] if gold is not None else record.get("query")
            if not isinstance(profile, list) or not isinstance(asked, list):
                faults.append((path, record.get("id", number), "no 'profile' list, or no 'query' list beside it"))
                continue
            newest, user = max(map(date_of, profile), default=()), record.get("user_id")
            for place, q in enumerate(asked):
                q = q if isinstance(q, dict) else {}
                given = q.get("gold") if gold is None else gold.get(str(q.get("id")))
                answer = label_text(given)
                wrong = ("no 'input' or no 'id'" if "id" not in q or not isinstance(q.get("input"), str) else
                         f"this is not a {task.name} question: {q['input'][:60]!r}" if not task.match(q["input"]) else
                         "no gold" if given is None else
                         f"the gold {given!r} is none of {task.name}'s labels" if answer not in task.labels else None)
                if wrong:
                    faults.append((path, q.get("id", number), wrong))
                else:
                    owner = f"record {record.get('id', number)}" if user in (None, "") else str(user)
                    yield (owner, Query(str(q["id"]), q["input"], answer), profile, (part, newest, len(profile) + place),
                           (number, span))


def load(task, data, users=100, queries_per_user=3, max_history=None, limit=None, seed=0):
    """(users, those with the longest history first, beyond `limit` without queries; remarks on the data).

    Two passes, so that no file is held whole: the first chooses, the second reads what was chosen. Per user the latest
    queries of the last partition with gold; history is the profile of the first of these, and earlier queries."""
    parts, faults, seen = [(path, outputs and read_gold(task, outputs)) for path, outputs in locate(task, data)], [], {}
    for user, query, profile, order, place in entries(task, parts, faults):
        seen.setdefault(user, []).append((order, query.id, len(profile), place))
    ids = Counter(e[1] for all_ in seen.values() for e in all_)
    if ids and ids.most_common(1)[0][1] > 1:
        raise Problem(f"the query id {ids.most_common(1)[0][0]!r} occurs more than once in {data}: give each query its own id.")
    told = {str(record) for _, record, _ in faults}
    for path, gold in parts:
        lost = [i for i in gold or () if i not in ids and i not in told]
        if lost:
            raise Problem(f"gold for {len(lost)} ids that {path} lacks (first: {lost[0]}): the files do not belong together.")
    latest = {u: [e for e in sorted(all_, key=lambda e: e[0]) if e[0][0] == len(parts) - 1][-queries_per_user:]
              for u, all_ in seen.items()}
    chosen = sorted((u for u in latest if latest[u]), key=lambda u: -latest[u][0][2])[:users]
    if not chosen:
        raise Problem(f"no usable {task.name} query in {parts[-1][0]}. {FAULT.format(*faults[0]) if faults else 'It is empty'}")
    raw = {u: [] for u in chosen}  # user -> [(order, Query, profile of the first evaluated query)]
    places = [dict(place for u in chosen for order, _, _, place in seen[u] if order[0] == part) for part in range(len(parts))]
    for user, query, profile, order, _ in entries(task, parts, [], places):
        raw[user].append((order, query, profile if query.id == latest[user][0][1] else []))
    raw = {u: sorted(raw[u], key=lambda e: e[0]) for u in chosen}
    found = build_users(task, {u: (raw[u][:-len(latest[u])], raw[u][-len(latest[u]):]) for u in chosen}, max_history, seed, faults)
    for user in found:
        user.queries = user.queries[:limit]
        limit = None if limit is None else limit - len(user.queries)
    skipped = [f"skipped: {FAULT.format(*fault)}" for fault in faults[:5]]
    skipped += [f"skipped: {len(faults) - 5} more"] if len(faults) > 5 else []
    listed = re.search(r"(?:tags|categories): \[(.*?)\]", found[0].queries[0].input)  # in any order
    other = sorted({option.strip() for option in listed[1].split(",")} - {*task.labels}) if listed else []
    return found, skipped + [
        f"the questions offer options that are no labels of {task.name}: {', '.join(other)}"] * bool(other)


def build_users(task, raw, max_history, seed, faults):
    """User objects: history as episodes in time order, without any item that has an evaluated query's id or text.

    raw: {user: (earlier, evaluated)}, lists of (order in time, Query, profile), oldest first."""
    items = {u: history_items(task, u, *raw[u], faults) for u in raw}
    cited = {u: {norm(i[task.label]): i[task.label] for i in items[u] if i.get(task.label)} for u in raw}
    offered = {norm(task.match(q.input)[g]) for _, evaluated in raw.values() for _, q, _ in evaluated for g in task.options}
    found = []
    for user, (_, evaluated) in raw.items():
        queries, keys = [q for _, q, _ in evaluated], {task.key(q.input) for _, q, _ in evaluated}
        kept = [i for i in items[user] if norm(i[task.text]) not in keys and str(i.get("id")) not in {q.id for q in queries}]
        pool = {n: title for u in cited if u != user for n, title in cited[u].items()} if task.options else {}
        others = [pool[n] for n in sorted(pool.keys() - cited[user].keys() - offered)]
        history = [episode_of(task, item, queries[0].input, others, random.Random(f"{seed} {user} {item[task.text]}".encode(
            "utf-8", "replace"))) for item in kept][-(max_history or 0):]
        if any(e.response and task.key(e.query) in keys for e in history):
            raise RuntimeError(f"an evaluated query is left in the history of user {user}")
        found.append(User(user, history, queries, len(items[user]) - len(kept)))
    return found


def history_items(task, user, earlier, evaluated, faults):
    """The profile's items, then earlier queries that it does not hold yet; by date where there are dates."""
    items = []
    for item in evaluated[0][2]:
        item = item if isinstance(item, dict) else {}
        needed = [task.text] if task.options else [task.text, task.label]  # LaMP-1 as published tells no citations
        missing = [f for f in needed if not label_text(item.get(f))]
        if missing:
            faults.append((f"an item of user {user}'s profile", evaluated[0][1].id, f"no usable {' and no '.join(missing)}"))
        else:
            items.append({**item, task.label: label_text(item.get(task.label))})
    known = {norm(i[task.text]) for i in items if i.get(task.label)}
    for (_, newest, _), query, _ in earlier:
        at = task.match(query.input)
        if norm(at["key"]) not in known:
            label = at["ab"[task.labels.index(query.gold)]] if task.options and query.gold in task.labels else query.gold
            items.append({"id": query.id, task.text: at["key"], task.label: label, "date": "-".join(f"{n:02}" for n in newest),
                          None: (query.input, query.gold)})  # a key that no JSON object has
    return sorted(items, key=date_of) if any(map(date_of, items)) else items


def label_text(value):
    """A label as LaMP spells it: 'comedy ' -> 'comedy', 4.0 -> '4'; '' for what is neither text nor number."""
    return re.sub(r"(?<=^\d)\.0+$", "", str(value).strip()) if isinstance(value, (str, int, float)) else ""


def norm(text):
    return " ".join(str(text).lower().split())


def episode_of(task, item, pattern, others, rng):
    """A history item as an Episode: its question is the input `pattern` with the item's own text in place.

    In LaMP-1 the cited title stands against one of `others`, titles that only other users cite (Appendix E)."""
    label, (query, response) = item.get(task.label), item.get(None) or (str(item[task.text]), "")
    if not response and label and (others or not task.options):
        pair = [label, rng.choice(others)] if task.options else []
        rng.shuffle(pair)
        response = str(task.labels[pair.index(label)] if pair else label)
        match, query = task.match(pattern), pattern
        for group, value in sorted({"key": item[task.text], **dict(zip("ab", pair))}.items(), key=lambda gv: -match.start(gv[0])):
            query = query[:match.start(group)] + str(value) + query[match.end(group):]
    shown = [item.get("date"), f"{task.label}: {label}" if label else None, *(item.get(f) for f in task.fields)]
    example = task.example.format_map({f: " ".join(str(v).split(" ")[:368]) for f, v in item.items() if f})  # cut as in OPPU
    return Episode(query, response, {"id": item.get("id"), "date": item.get("date"), "example": example},
                   " | ".join(str(part) for part in shown if part))  # the answer first: long texts are cut where they are shown


# ---------------------------------------------------------------------------------------------------- methods

@dataclass(frozen=True)
class Method:
    """What a method gives the model. system: of a ReAct loop over `tools`, 'persona' (Appendix B) or 'neutral'; '' is one
    call without a loop. profile: P^u, in the persona or before the prompt. own: the user's top-K items in LaMP's own prompt;
    others: labelled items of other users before it. aligned: the persona is rewritten by Algorithm 1 first."""
    system: str = ""
    profile: bool = False
    own: int = 0
    others: int = 0
    tools: tuple = ()
    aligned: bool = False
    bank: bool = False  # MemoryBank's portrait and recall in the system prompt
    eager: bool = False  # a bare label is an answer before any tool was used: baselines owe nothing to Appendix B's rules

    @property
    def embeds(self):
        return bool(self.own) or "RAG" in self.tools or self.aligned or self.bank


METHODS = {
    # the bare input: one call, nothing of the user
    "prompt": Method(),
    # in-context learning: 4 seeded questions of other users with their answers, one call (whose they are is our inference)
    "icl": Method(others=4),
    # LaMP's retrieval augmentation: the items most similar to the input's content, in LaMP's own words, one call
    "rag-1": Method(own=1),
    "rag-4": Method(own=4),
    # profile-augmented generation (Richardson et al., 2023): the profile before rag-4's prompt, one call
    "pag-4": Method(own=4, profile=True),
    # Yao et al. (2023) as the paper's numbers suggest it: a neutral agent with Wikipedia, nothing of the user
    "react": Method("neutral", tools=("Wiki",), eager=True),
    # MemoryBank (Zhong et al., 2024) as memory of the neutral agent with Wikipedia; it summarizes 5 periods of the history
    "membank": Method("neutral", tools=("Wiki",), bank=True, eager=True),
    # the method: profile -> persona -> alignment -> ReAct over Wikipedia and episodic memory
    "personaagent": Method("persona", profile=True, tools=("Wiki", "RAG"), aligned=True),
    # Table 3: the same agent with one part taken out
    "no-alignment": Method("persona", profile=True, tools=("Wiki", "RAG")),
    "no-persona": Method("neutral", tools=("Wiki", "RAG")),
    "no-memory": Method("persona", tools=("Wiki",)),
    "no-action": Method("persona", profile=True, aligned=True),
}
GROUPS = {"table2": list(METHODS)[:8], "table3": list(METHODS)[7:], "all": list(METHODS)}
NEUTRAL = "You are a helpful assistant. Answer the question."  # ours: the system prompt of an agent without a persona
UNKNOWN = "nothing is known."  # ours: the profile in Appendix B's prompt where there is none
BANK = "{neutral} What you know of the user: {portrait}\n\nRelated memories:\n{memories}"  # ours, for membank


def retrieval_query(task, text):
    """The part of an input that LaMP's retrieval searches with."""
    return " ".join(task.match(text)[group] for group in task.options or ["key"])


def rag_prompt(task, text, memory, k):
    """LaMP's own construction: the retrieved items before the input, in LaMP-1 behind its first word 'title'."""
    found = memory.search(retrieval_query(task, text), k)
    joined = ", and ".join(episode.metadata["example"] for episode, _ in found)
    return text if not found else text.replace("title", f"title, and {joined}", 1) if task.options else f"{joined}. {text}"


def examples(task, user, pool, seed, k):
    """{query id: k seeded questions of other users with their answers, none with the text of one of this user's queries}.

    pool: (user id, Episode) of all that is labelled."""
    own = {task.key(q.input) for q in user.queries}
    drawn = {q.id: random.Random(f"{seed} {q.id}").sample(pool, min(len(pool), 50 * k)) for q in user.queries}
    return {i: [f"{e.query}\n{e.response}" for owner, e in found if owner != user.id and task.key(e.query) not in own][:k]
            for i, found in drawn.items()}


# one user's work as plain data. link: see `connect`; opts: settings by name; examples: of `icl`; done: {method: ids answered
# before}; lines: {method: the user's line of personas.jsonl}
Job = namedtuple("Job", "task methods link opts user examples done lines", defaults=[None] * 4)
Setup = namedtuple("Setup", "task method llm wiki opts examples")  # of one method in one process


def fill_memory(llm, history):
    """The history as episodic memory."""
    memory = EpisodicMemory(llm.embed, lambda texts: llm.embed(texts, query=True))
    memory.add(history)
    return memory


def build_agent(setup, user, shared, line, emit):
    """One user's PersonaAgent: memory, profile, persona and, where asked for, alignment; `bank` is its MemoryBank or None.

    shared: what the methods have in common for this user, the memory and the profile. line: what an earlier start of this run
    wrote to personas.jsonl; the persona is then taken from it, else a new line goes to emit(file, line)."""
    method, llm, opts = setup.method, setup.llm, setup.opts
    meter = Meter(llm)
    with ThreadPoolExecutor(1) as side:  # the profile does not wait for the embeddings
        filling = side.submit(fill_memory, llm, user.history) if method.embeds and "memory" not in shared else None
        if method.profile and not line and "profile" not in shared:
            shared["profile"] = summarize(meter, user.history, setup.task.summary), meter.usage
    if filling:
        shared["memory"] = filling.result()
    memory = shared.get("memory")
    bound = [tool for tool in (setup.wiki, RAG(memory, opts["top_k"])) if tool.name in method.tools]
    bank = MemoryBank(meter, memory, made=line and (line["profile"], line["bank"])) if method.bank else None
    if not line:
        profile, used = (bank.portrait, meter.usage) if bank else shared["profile"] if method.profile else ("", Usage())
        start = {"persona": initial_persona(profile or UNKNOWN), "neutral": NEUTRAL, "": profile}[method.system]
        meter = Meter(llm)
        learner = PersonaAgent(meter, memory, start, bound, opts["max_steps"])
        record = align.align(learner, meter, opts["batch"], opts["iterations"]) if method.aligned else align.Alignment(start, start)
        line = {"user_id": user.id, "history": len(user.history), "labelled": sum(bool(e.response) for e in user.history),
                "profile": profile, "bank": bank and bank.summaries, **asdict(record),
                "usage": {"profile": asdict(used), "alignment": asdict(meter.usage)}}
        if method.profile or method.system:
            emit("personas.jsonl", line)
    agent = PersonaAgent(llm, memory, line["final"], bound, opts["max_steps"])
    agent.bank = bank
    return agent


def read_answer(task, question, text):
    """The label that an answer gives, or None; in LaMP-1 it may also name just one of the two titles, without its number."""
    label = metrics.parse(text, task.labels)
    if label or not task.options:
        return label
    titles = [rf"(?<!\w){re.escape(norm(task.match(question)[group]))}(?!\w)" for group in task.options]
    named = [label for label, title in zip(task.labels, titles) if re.search(title, norm(text))]
    denied = metrics.DENIED.search(re.sub("|".join(titles), "", norm(text)))  # a title may hold a 'no' of its own
    return named[0] if len(named) == 1 and not denied else None


def answer_query(setup, agent, user, query, result=None):
    """The line of predictions.jsonl for one query; `result` where its answer is known already."""
    start, prompt, method = time.monotonic(), query.input, setup.method
    if not result:
        prompt = rag_prompt(setup.task, prompt, agent.memory, method.own) if method.own else prompt
        prompt = "\n\n".join([*setup.examples[query.id], prompt]) if method.others else prompt
        prompt = f"{agent.persona}\n\n{prompt}" if agent.persona and not method.system else prompt
        system = agent.persona
        if method.bank:
            recalled = agent.bank.recall(retrieval_query(setup.task, query.input), setup.opts["top_k"])
            system = BANK.format(neutral=NEUTRAL, portrait=agent.bank.portrait, memories=recalled)
        result = complete(agent.llm, prompt) if not method.system else react(
            agent.llm, system, prompt, agent.tools, agent.max_steps, method.eager)
        prompt = f"{system}\n\n{prompt}" if method.bank else prompt  # what was recalled stands nowhere else
    return {"user_id": user.id, "id": query.id, "question": prompt, "gold": query.gold,
            "prediction": read_answer(setup.task, query.input, result.text), **asdict(result),
            "seconds": round(time.monotonic() - start, 3)}


def evaluate(job, emit=None):
    """All methods' answers to one user's queries: rows (method, file, line) of the run folders, returned as a list, or handed
    to emit(method, file, line) as each is ready.

    From plain data to plain data, so that any executor can run it in any process. A failure, of the wire or of ours, is a
    line of errors.jsonl for each query that it hit, and stops nothing else. A prompt that is too long for the model is the
    method's own failure: an empty answer."""
    rows, shared, (llm, wiki) = [], {}, connect(job.link, os.getpid())
    emit = emit or (lambda *row: rows.append(row))
    for name, line in job.lines.items():
        if METHODS[name].profile:  # the profile of an earlier start serves all methods
            shared["profile"] = line["profile"], Usage(**line["usage"]["profile"])
    for name in job.methods:
        queries = [q for q in job.user.queries if q.id not in job.done[name]]
        if queries:
            _evaluate(Setup(TASKS[job.task], METHODS[name], llm, wiki, job.opts, job.examples), job.user, queries, shared,
                      job.lines.get(name), functools.partial(emit, name))
    return rows


def _evaluate(setup, user, queries, shared, line, emit):
    """`evaluate` for one method."""
    def attempt(stage, queries, work):
        try:
            return work()
        except Problem:  # a line cannot be written
            raise
        except ContextOverflow as e:
            empty = Answer("", [Step(f"(no reply: {e})")], "overflow", Usage())
            for query in queries:
                emit("predictions.jsonl", answer_query(setup, None, user, query, empty))
        except Exception as e:
            for query in queries:
                emit("errors.jsonl", {"user_id": user.id, "id": query.id, "stage": stage, "error": f"{type(e).__name__}: {e}"})

    agent = attempt("persona", queries, lambda: build_agent(setup, user, shared, line, emit))
    if agent:
        with ThreadPoolExecutor(min(len(queries), setup.llm.workers)) as pool:
            list(pool.map(lambda q: attempt("answer", [q], lambda: emit("predictions.jsonl", answer_query(setup, agent, user, q))),
                          queries))


# ---------------------------------------------------------------------------------------------------- a run

def run(base, users, shown, folders, origin, pool, llm):
    """Evaluate the users in an executor, each a Job made from `base`, writing each line as it comes: {method: results.json}.

    shown: {user id: `examples`}. folders: {method: Folder}; what they hold is resumed. origin: what results.json says of its
    making. llm: told to stop at Ctrl-C: it finishes the requests in flight and sends no more."""
    task, start, waiting = TASKS[base.task], time.time(), set()
    ledger = Ledger(folders, task.labels, [q.id for u in users for q in u.queries])
    for m, folder in folders.items():
        folder.write("results.json", {"complete": False, "method": m, **origin})
    jobs = [base._replace(user=u, examples=shown[u.id], done={m: set(rows) for m, rows in ledger.rows.items()},
                          lines={m: lines[u.id] for m, lines in ledger.lines.items() if u.id in lines}) for u in reversed(users)]
    live = [ledger.add] if isinstance(pool, ThreadPoolExecutor) else []  # across processes the lines come when the user is done
    try:
        while jobs or waiting:
            try:
                while jobs:
                    waiting.add(pool.submit(evaluate, jobs.pop(), *live))
                done = wait(waiting, 1, FIRST_COMPLETED)[0]  # no longer: a Ctrl-C just before a wait does not end it
                while done:  # and let go of each
                    future = done.pop()
                    waiting.discard(future)
                    for row in () if future.cancelled() else future.result():
                        ledger.add(*row)
            except KeyboardInterrupt:
                if ledger.stopping:
                    raise
                ledger.stopping = llm.http.stopped = True
                jobs.clear()
                for future in waiting:
                    future.cancel()
                print("\nstopping: requests in flight are finished, and what needs no more of them is saved; Ctrl-C again stops "
                      "at once", file=sys.stderr)
    except BaseException:
        llm.http.stopped = True  # nothing more is paid for that cannot be kept
        for future in waiting:
            future.cancel()
        raise
    started = {"seconds": round(time.time() - start, 1), "embedding": asdict(llm.embed_usage),
               "options the model refused": [name for name, sent in llm.options.items() if not sent]}
    started |= {"cache": {"found": llm.cache.found, "asked": llm.cache.asked}} if base.link.cache else {}
    results = {}
    for m, folder in folders.items():
        results[m] = {**results_of(task, users, folder), "this_start": started, "method": m, **origin}
        folder.write("results.json", results[m])
    if ledger.stopping:
        raise KeyboardInterrupt
    return results


def embed_personas(folder, llm):
    """Write personas.npz: users (n,), embeddings of their final personas (n, d), and of Appendix B's prompt without a profile."""
    finals = {line["user_id"]: line["final"] for line in metrics.read_lines(folder.path / "personas.jsonl")}
    rows = llm.embed([initial_persona(""), *finals.values()])
    folder.save("personas.npz", users=np.array(list(finals), str), final=rows[1:], initial=rows[0])


def results_of(task, users, folder):
    """What a run came to (metrics.measure) and whom it covered; writes lamp.json and gold.json beside it."""
    found = metrics.measure(folder.path, task.labels, [q.id for u in users for q in u.queries])
    rows = found.pop("rows").values()
    found = {"complete": len(rows) == sum(len(u.queries) for u in users), **found}
    for file, key in (("gold.json", "gold"), ("lamp.json", "prediction")):
        folder.write(file, {"task": task.folder.split("/")[0], "golds": [{"id": r["id"], "output": r[key] or ""} for r in rows]})
    steps = [s for answer in [*rows, *found.pop("simulated")] for s in answer["steps"]]
    found["users"] |= {"n": len(users), "leaks_removed": sum(u.leaks for u in users)}
    return {**found, "failed_wiki_calls": sum(s["observation"] == WIKI_DOWN for s in steps)}


def show(query_id, root, methods):
    """Print one query of every run of `methods` below `root` that answered it, as a story."""
    runs = [run for run in metrics.runs_below([root], TASKS) if run["method"] in methods]
    found = [(run["folder"], run["rows"][query_id]) for run in runs if query_id in run["rows"]]
    if not found:
        raise Problem(f"no query {query_id!r} in the {len(runs)} runs below {root}: --output names another root.", 2)
    for folder, row in found:
        print(f"=== {folder}: query {row['id']} of user {row['user_id']}\n")
        line = {r["user_id"]: r for r in metrics.read_lines(folder / "personas.jsonl")}.get(row["user_id"])
        if line:
            print(f"--- profile (semantic memory)\n{line['profile'] or '(empty)'}\n\n{align.story(line)}\n")
        print(f"--- question\n{row['question']}\n\n{align.tell(row)}, read as {row['prediction']!r}\n"
              f"the user's: {row['gold']!r}, {'RIGHT' if row['prediction'] == row['gold'] else 'WRONG'}\n"
              f"{row['usage']['calls']} calls, {row['usage']['input']} + {row['usage']['output']} tokens, {row['seconds']} s\n")


# ---------------------------------------------------------------------------------------------------- command line

def misused(message):
    raise Problem(f"{message} (--help lists every flag)", 2)


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


FLAGS = {  # group -> [(flag, default, type, help)]; everything above 'run' is a setting that makes a run what it is
    "what": [("--task", None, str, "one of " + ", ".join(TASKS)),
             ("--method", None, str, "a comma list of " + ", ".join([*METHODS, *GROUPS]) + " (personaagent; with --show: all)"),
             ("--data", None, str, "LaMP folder or file, official or OPPU layout (default: the bundled sample)"),
             ("--users", 100, positive, "how many users, those with the longest history"),
             ("--queries-per-user", 3, positive, "the latest queries of each"),
             ("--max-history", None, positive, "keep only the newest items of a history (cold start)"),
             ("--limit", None, positive, "queries in all"),
             ("--seed", 0, int, "of what is drawn: LaMP-1's negatives, icl's examples")],
    "model": [("--provider", None, str, "openai (any server that speaks its API) or bedrock; default: what the environment has"),
              ("--model", None, str, "chat model; without it, --base-url and --provider a stand-in answers, no language model"),
              ("--embed-model", None, str, "embedding model (default on OpenAI: text-embedding-3-small, on Bedrock: Titan V2)"),
              ("--temperature", 0.1, float, "sampling temperature"),
              ("--wiki-base-url", None, str, "host root of another Wikipedia")],
    "method": [("--top-k", 4, positive, "K memories per retrieval of the agent, sharing 2,000 characters"),
               ("--batch", 3, positive, "n interactions of the alignment batch"),
               ("--iterations", 1, positive, "alignment iterations"),
               ("--max-steps", 8, positive, "replies of the ReAct loop before the answer is forced")],
    "run": [("--report", None, str, "print Markdown tables of all runs below these folders, and stop"),
            ("--region", None, str, "of Bedrock (AWS_REGION, AWS_DEFAULT_REGION)"),
            ("--base-url", None, str, "of an OpenAI-compatible server, up to /v1"),
            ("--embed-base-url", None, str, "where the embedding model is served, if elsewhere"),
            ("--workers", 8, positive, "requests in flight"),
            ("--output", "runs", str, "root of the run folders <task>/<method>[-changed settings]"),
            ("--cache", None, str, "keep every answer of the services in this file, and ask for none twice"),
            ("--offline", False, bool, "answer from the cache alone: no key, no server"),
            ("--show", None, str, "print query ID of the runs below --output as a story, and stop")]}
SETTINGS = {flag[2:].replace("-", "_"): default for group in ("what", "model", "method") for flag, default, *_ in FLAGS[group]}
EXAMPLES = """examples:
  python lamp.py --task lamp1                             the bundled sample and the stand-in: no key, no model
  python lamp.py --task lamp2m --model gpt-4o-mini        OpenAI, with OPENAI_API_KEY
  python lamp.py --task lamp3 --data LaMP --method table2 --base-url URL --model M --embed-model E
  python lamp.py --show 6100                              one query of the runs in runs/, as a story"""


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = misused
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, default, kind, text in flags:
            text += f" ({default})" if default not in (None, False) else ""
            if kind is bool:
                group.add_argument(flag, action="store_true", help=text)
                continue
            group.add_argument(flag, default=default, type=kind, help=text, nargs="+" if flag == "--report" else None,
                               metavar="DIR" if flag == "--report" else flag.rsplit("-", 1)[1].upper())
    args = parser.parse_args(argv)
    args.chosen, args.method = args.method, args.method or "personaagent"
    args.method = list(dict.fromkeys(m for part in args.method.split(",") for m in GROUPS.get(part, [part])))
    args.stand_in = not (args.model or args.base_url or args.provider)
    args.embeds = any(METHODS[m].embeds for m in args.method if m in METHODS)
    for flag, value, known in [("--task", args.task, TASKS), *(("--method", m, METHODS) for m in args.method),
                               ("--provider", args.provider or "openai", ("openai", "bedrock"))]:
        if value not in known and args.show is None and not args.report:
            misused(f"{flag} {value or 'is missing'}: choose from {', '.join(known)}")
    if args.stand_in and (args.embed_model or args.embed_base_url or args.region):
        misused("--embed-model, --embed-base-url and --region need a model: add --model, --base-url or --provider")
    for url in filter(None, (args.base_url, args.embed_base_url, args.wiki_base_url)):
        if not re.match(r"https?://[^/@\s]+(/[^@\s]*)?$", url):
            misused("an address must look like http://localhost:11434/v1, without user or password (a key: OPENAI_API_KEY)")
    if args.offline and not (args.cache and (args.model or args.stand_in)):
        misused("--offline needs --cache FILE, and --model with the name that its answers are stored under")
    if args.data == "" or not 0 <= args.temperature <= 2:
        misused("--data is empty" if args.data == "" else "--temperature is a number from 0 to 2")
    return args


Link = namedtuple("Link", "stand_in provider model embed_model temperature base_url embed_base_url region wiki_base_url workers "
                          "cache offline embeds")  # what `connect` needs, as plain data; keys come from the environment


@functools.lru_cache(1)
def connect(link, pid):
    """(model, Wiki), made once in each process, whose id is `pid`."""
    kind, llm, wiki = dial(link)
    if link.cache:
        cache, look_up = Cache(link.cache, link.offline), wiki.run
        source = "Wiki/" + (link.wiki_base_url or ("stand-in" if link.stand_in else wiki.base))
        llm = Cached(llm, cache, kind)
        wiki.run = lambda topic: cache.answers(source, [topic], lambda _: [look_up(topic)])[0]
    return llm, wiki


def dial(link):
    """(provider, client, Wiki) for the flags and the environment; without a model flag the stand-in, whatever keys there are."""
    wiki, rest = Wiki(link.wiki_base_url or "https://en.wikipedia.org"), (link.temperature, link.workers)
    if link.stand_in:
        try:
            from tests import standin
        except ImportError:
            misused("the stand-in is only part of a source checkout: name a model with --model")
        root = f"http://127.0.0.1:{standin.start().server_port}"
        llm = OpenAICompatible("stand-in", "stand-in", root + "/v1", "none", *rest)
        return "openai", llm, Wiki(link.wiki_base_url or root, "loopback")
    base = link.base_url or os.environ.get("OPENAI_BASE_URL")
    openai, aws = base or os.environ.get("OPENAI_API_KEY"), {"AWS_BEARER_TOKEN_BEDROCK", "AWS_ACCESS_KEY_ID"} & set(os.environ)
    if link.provider == "bedrock" or not link.provider and aws and not openai:
        if not link.model:
            misused("Bedrock needs --model, such as us.anthropic.claude-3-5-sonnet-20241022-v2:0")
        embed = link.embed_model or "amazon.titan-embed-text-v2:0"
        return "bedrock", Client(link.model, embed, *rest) if link.offline else Bedrock(link.model, embed, link.region, *rest), wiki
    if not openai and not link.offline:
        misused("no server to talk to: set OPENAI_API_KEY (OpenAI), --base-url (a local server), or AWS_REGION and "
                "AWS_BEARER_TOKEN_BEDROCK or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (Bedrock)")
    llm = OpenAICompatible(link.model, link.embed_model, base, None, *rest, link.embed_base_url)
    if not link.model:
        names = llm.models()
        if len(names) != 1:
            misused(f"{llm.base_url} lists {len(names)} models, choose one with --model: {', '.join(names[:8])}")
        llm.model = names[0]
    if not llm.embed_model and "api.openai.com" in llm.embed_base_url:
        llm.embed_model = "text-embedding-3-small"
    if link.embeds and not llm.embed_model:
        misused("a method here retrieves memories: name the server's embedding model with --embed-model")
    return "openai", llm, wiki


def provenance(args, llm, argv):
    """What results.json says of its making. `settings` are what a run must have in common to be resumed."""
    try:
        describe = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    data, prompts = hashlib.sha256(), hashlib.sha256()
    for path in (f for pair in locate(TASKS[args.task], args.data or SAMPLE) for f in pair if f):
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                data.update(chunk)
    for module in (memories, tools, persona_agent, align):
        prompts.update(json.dumps({k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, str)}).encode())
    prompts.update("\0".join([NEUTRAL, BANK, UNKNOWN, TASKS[args.task].summary, TASKS[args.task].example]).encode())
    settings = {k: getattr(args, k) for k in SETTINGS if k != "method"} | {
        "model": llm.model, "embed_model": llm.embed_model, "data_hash": data.hexdigest()[:16],
        "prompt_hash": prompts.hexdigest()[:16]}
    return {"task": args.task, "stand_in": args.stand_in, "settings": settings, "provenance": {
        "command": shlex.join(["python", "lamp.py", *argv]), "commit": commit, "base_url": llm.base_url,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}}


STAND_IN = """\
NO LANGUAGE MODEL is involved: a stand-in answers by counting words (tests/standin.py). The scores say nothing about the method.
Connect a model: --model gpt-4o-mini with OPENAI_API_KEY set, or --base-url http://localhost:11434/v1 --model M --embed-model E"""


def print_plan(task, args, users, remarks, llm):
    """What is going to happen, before anything costs."""
    if args.stand_in:
        print(STAND_IN + "\n")
    sizes, queries = [len(u.history) for u in users], sum(len(u.queries) for u in users)
    labelled = sum(any(e.response for e in u.history) for u in users)
    print(f"{task.title}\ndata    {args.data or 'the bundled sample'}: {len(users)} users, {queries} queries, histories of "
          f"{min(sizes)} to {max(sizes)} items (labelled for {labelled} of {len(users)} users), "
          f"{sum(u.leaks for u in users)} items removed that would give an answer away")
    print("".join(f"        {remark}\n" for remark in remarks) + f"model   {llm.model}, embeddings {llm.embed_model or '-'}, "
          f"at {llm.base_url}")
    methods = [METHODS[m] for m in args.method]
    if any("Wiki" in m.tools for m in methods) and not os.environ.get("WIKIPEDIA_CONTACT") and not (args.stand_in or args.offline):
        print("        WIKIPEDIA_CONTACT is not set: Wikipedia asks for the operator's contact and allows fewer requests without")
    for name, m in zip(args.method, methods):
        turns = len(m.tools) + 1  # each tool once, then the answer, where all goes well
        calls = (queries * turns + len(users) * (m.profile + 11 * m.bank)
                 + labelled * m.aligned * args.iterations * (args.batch * (turns + 1) + 1))
        print(f"method  {name}: about {calls} chat calls" + (f", up to {args.max_steps + 1} a question" if m.tools else ""))
    print(flush=True)


def main(argv, pool=None):
    """The command line: prints, and returns the exit code. pool: any concurrent.futures.Executor for the users' work."""
    args = arguments(argv)
    if args.report:
        return print(metrics.report(args.report, TASKS, list(METHODS)))
    if args.show is not None:
        return show(args.show, args.output, args.method if args.chosen else METHODS)
    task, methods = TASKS[args.task], [METHODS[m] for m in args.method]
    users, remarks = load(task, args.data or SAMPLE, args.users, args.queries_per_user, args.max_history, args.limit, args.seed)
    labelled = [(u.id, e) for u in users for e in u.history if e.response]
    users = [u for u in users if u.queries]
    link = Link(*(getattr(args, field) for field in Link._fields))
    connect.cache_clear()  # the environment may have changed since another run in this process
    llm, wiki = connect(link, os.getpid())
    origin = provenance(args, llm, argv)
    print_plan(task, args, users, remarks, llm)
    opts = origin["settings"]
    changed = {k: opts[k] for k, default in SETTINGS.items() if k in opts and k != "task" and opts[k] not in (default, "stand-in")}
    changed |= {"data": Path(changed["data"]).resolve().name} if "data" in changed else {}
    name = "".join(f"-{k}={re.sub(r'[^-.0-9A-Za-z]+', '_', str(v))}" for k, v in changed.items())
    folders = {m: Folder(Path(args.output, task.name, m + name), opts) for m in args.method}
    if not args.offline:
        client = llm.llm if args.cache else llm  # alone and not from the cache, so as to fail at once
        client.chat([{"role": "user", "content": "Reply with the word OK."}], max_tokens=16, tries=2)
        client.embed(["OK"], tries=2) if args.embeds else None
    k = max(m.others for m in methods)
    base = Job(task.name, args.method, link, opts)
    try:
        results = run(base, users, {u.id: examples(task, u, labelled, args.seed, k) for u in users}, folders, origin,
                      pool or ThreadPoolExecutor(args.workers), llm)
    finally:
        for folder in folders.values():
            folder.held.close()  # gives the lock back to a program that goes on
    print(metrics.table(results))
    print("".join(f"{m}: {folder.path}\n" for m, folder in folders.items()), end="")
    missed, errors = (sum(r[k] for r in results.values()) for k in ("failed_wiki_calls", "errors"))
    if missed:
        print(f"\nWIKIPEDIA WAS NOT REACHED: {missed} Wiki calls got no page. {wiki.down or ''}")
    if errors:
        first = next(row for f in folders.values() for row in metrics.read_lines(f.path / "errors.jsonl"))["error"]
        print(f"\n{errors} QUERIES FAILED and are not in the metric; the same command tries them again. First: {first}")
    if args.stand_in:
        print("\n" + STAND_IN)
    for m in args.method:
        if METHODS[m].aligned and results[m]["complete"] and not (folders[m].path / "personas.npz").exists():
            embed_personas(folders[m], llm)
    return 1 if errors else 0


def cli(argv):
    """`main` with what a user can cause as one line on stderr. Returns the exit code."""
    try:
        return main(argv)
    except (Problem, ServiceError) as e:
        print(f"lamp.py: {e.args[0]}", file=sys.stderr)
        return (*e.args, 1)[1]
    except BrokenPipeError:  # the reader of our output has seen enough
        return 1
    except KeyboardInterrupt:
        print("\nlamp.py: stopped. What was answered is kept: the same command goes on from there.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = cli(sys.argv[1:])
    try:
        sys.stdout.flush()
    finally:
        os._exit(code or 0)  # does not wait for threads that still wait for an answer
