"""LaMP: the four tasks, the data, the methods, the cache, the run and the command line.

A line belongs here if it would be different for another benchmark, or is about running many users.
Gold labels are read here and go to the scoring in metrics.py alone: no request to a model holds
the gold of an evaluated query.
"""

import io
import json
import os
import random
import re
import shlex
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from hashlib import sha256
from itertools import chain, islice
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

import align
import memory
import metrics
import persona_agent
import tools
from align import Alignment, bare
from memory import Episode, EpisodicMemory, MemoryBank, summarize
from persona_agent import (
    FAILURES,
    PERSONA,
    Answer,
    Bedrock,
    Client,
    OpenAICompatible,
    PersonaAgent,
    Reply,
    ServiceError,
    Usage,
    check_address,
)
from tools import RAG, WIKI_DOWN, Wiki, WikiUnreachable

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "tests/sample"


class Problem(ServiceError):
    """What ends a run, as one line that says what, why and what to do. Like a dead server it is
    `fatal`: neither the loop nor a question's row keeps it."""


# ------------------------------------------------------------------------------------- tasks


@dataclass
class Task:
    """A LaMP task as data. An item of LaMP-2N: {"id": "0001", "title": "Bake Sale", "text": "A
    town ..", "category": "food & drink", "date": "2014-03-05"}; a question: 'Which category does
    this article relate to .. categories: [..] article: <text>'."""

    name: str
    title: str
    folder: str  # of the official release, below the root or below time/
    oppu: str  # folder of the OPPU release
    labels: tuple  # in the order of the official scorer
    form: str  # of an input; {} are its parts, the second is its own text
    fields: tuple  # of an item, as shown
    text: str  # the one that is an input's own text
    label: str  # the one with the answer (LaMP-1: the cited title, where the data have it)
    example: str  # a retrieved item in LaMP's own prompts (LaMP/prompts/prompts.py)
    summary: str  # S_t of Eq. 3: ours, asking what PAG's prompts ask
    options: bool = False  # a question brings its own two options, the parts from the fourth on

    def titles(self, question: str) -> dict:
        """{label: option} of a question of LaMP-1."""
        return dict(zip(self.labels, _cut(self, question)[3:]))

    def content(self, question: str) -> str:
        """What LaMP's retrieval searches with."""
        return " ".join(self.titles(question).values()) or _cut(self, question)[1]


def _cut(task, text):
    """The parts of an input that stand for {}; [] where it is no question of this task."""
    _, *markers, end = task.form.split("{}")
    parts = []
    for marker in markers:
        part, found, text = text.partition(marker)
        parts.append(part)
    # A marker that is missing leaves nothing to the others: the last one tells.
    return [*parts, text.removesuffix(end)] if found else []


def _own_text(task, question):
    """An input's own text in any spelling: what makes two questions the same."""
    parts = _cut(task, question) or ["", question]
    return bare(parts[1])


TASKS = {
    "lamp1": Task(
        "lamp1",
        "LaMP-1: Personalized Citation Identification",
        "LaMP_1",
        "citation",
        metrics.CITATIONS,
        '{}paper with the title "{}", which reference{}[1]: "{}" [2]: "{}"',
        ("title", "abstract"),
        "title",
        "citation",
        example='"{title}"',
        summary="""\
These are papers that one researcher has written, with a paper each of them cites \
where that is known. Write a profile of the researcher: research interests, topics and \
methods, and what kind of work they tend to cite.""",
        options=True,
    ),
    "lamp2m": Task(
        "lamp2m",
        "LaMP-2M: Personalized Movie Tagging",
        "LaMP_2/new",
        "movie_tagging",
        metrics.MOVIE_TAGS,
        "{}] description: {}",
        ("description",),
        "description",
        "tag",
        example='the tag for the movie: "{description}" is "{tag}" ',
        summary="""\
These are movies that one user has tagged. Write a profile of the user: the tag \
they give most often, the films they watch, and how they choose between tags that would \
both fit.""",
    ),
    "lamp2n": Task(
        "lamp2n",
        "LaMP-2N: Personalized News Categorization",
        "LaMP_2",
        "news_categorize",
        metrics.NEWS_CATEGORIES,
        "{}] article: {}",
        ("title", "text"),
        "text",
        "category",
        example='the category for the article: "{text}" is "{category}" ',
        summary="""\
These are articles that one journalist has written, with their categories. Write \
a profile of the journalist: the category they write in most often, their subjects, and \
how they choose between categories that would both fit.""",
    ),
    "lamp3": Task(
        "lamp3",
        "LaMP-3: Personalized Product Rating",
        "LaMP_3",
        "product_rating",
        metrics.RATINGS,
        "{}without further explanation. review: {}",
        ("text",),
        "text",
        "score",
        example='{score} is the score for "{text}" ',
        summary="""\
These are product reviews that one user has written, with the scores they gave. \
Write a profile of the user: the scores they give most often to positive and to negative \
reviews, what they care about, and how they write.""",
    ),
}


# ------------------------------------------------------------------------------------- data


@dataclass
class Query:
    """A question with its answer, and whose it is. date: the newest one of the profile that came
    with it; size: that profile's length. examples: what in-context learning shows before it."""

    id: str
    input: str
    gold: str
    user: str
    date: str
    size: int
    examples: tuple = ()


@dataclass
class User:
    """history: oldest first, without anything that would give an evaluated query away; `leaks`
    counts what was taken out."""

    id: str
    history: list
    queries: list
    leaks: int


@contextmanager
def _reading(path):
    """What is wrong with a file becomes a Problem that names it."""
    try:
        yield
    except Exception as e:
        what = f"{type(e).__name__}: {str(e)[:200]}"
        raise Problem(f"{path} cannot be read as LaMP's JSON in UTF-8 ({what})") from None


def _records(path):
    """The elements of a JSON array, one at a time: a good file is never held whole."""
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        buffer = ""
        at = 0
        while True:
            # What stands before a record: '[' or ', ' and line ends.
            at = re.compile(r"[\s,\[]*").match(buffer, at).end()
            try:
                record, at = json.JSONDecoder().raw_decode(buffer, at)
            except json.JSONDecodeError:
                # Perhaps only the buffer ends: a million characters more, or twice as many as there
                # are, so that a large record is not parsed too often.
                more = file.read(max(1 << 20, len(buffer) - at))
                if not more:
                    break
                buffer = buffer[at:] + more
                at = 0
            else:
                yield record
        if buffer[at:].strip() != "]":
            left = f"left over: {buffer[at:][:30]!r}"
            raise ValueError(f"no array, or one that does not end where the file ends; {left}")


def _read_gold(task, path):
    """{query id: gold} of an official outputs or an OPPU label file; {} where there is none."""
    if not path.exists():
        return {}
    with _reading(path):
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        gold = {str(answer["id"]): answer["output"] for answer in data["golds"]}
        if len(gold) < len(data["golds"]):
            raise ValueError("it holds two golds for one id")
        if not f"LaMP_{task.name[4:].upper()}".startswith(data["task"]):
            raise ValueError(f"it holds gold for {data['task']}, not {task.name}")
    return gold


def _locate(task, data):
    """(path of the questions, {query id: gold}) of each partition, the one to evaluate last. Raises
    Problem.

    Gold stands beside {split}_questions.json in {split}_outputs.json (official; a partition
    without it is passed over), and in *history.json itself or in *_label.json beside it (OPPU)."""
    root = Path(data)
    layouts = (
        f"time/{task.folder}/*/*_questions.json",
        f"{task.folder}/*/*_questions.json",
        f"{task.oppu}/*history.json",
        "*/*_questions.json",
        "*_questions.json",
        "*history.json",
    )
    parts = []
    for layout in layouts:
        with _reading(root):
            files = sorted(root.glob(layout), reverse=True)  # train before dev
            if root.is_file():
                files = [root]
        for path in files:
            stem = path.stem.removesuffix("_questions")
            gold = {}
            for ending in ("outputs", "label"):
                gold |= _read_gold(task, path.with_name(f"{stem}_{ending}.json"))
            if gold or stem == path.stem:
                parts.append((path, gold))
        if parts:
            return parts
    raise Problem(f"--data {data}: no {task.name} questions with gold there (README, 'Real data')")


def _field(item, name):
    """A text or label as LaMP spells it: 'comedy ' -> 'comedy', 4.0 -> '4'; '' of what is none."""
    value = item.get(name) if isinstance(item, dict) else None
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return re.sub(r"^(\d)\.0+$", r"\1", text)


@lru_cache(1 << 16)  # a large file holds millions of dates, but few different ones
def _day(date):
    """'2012-03-06' -> (2012, 3, 6), '2012' -> (2012,), '' -> (): LaMP's own order of dates."""
    return tuple(map(int, re.findall(r"\d{1,9}", date)))


def _queries(task, part, remarks):
    """The usable queries of a partition, each with its profile; remarks gets what is wrong with
    the others."""
    path, golds = part
    for number, record in enumerate(_records(path)):
        try:
            profile = record["profile"] + []  # fails where it is no list
            dates = [str(item.get("date") or "") for item in profile if isinstance(item, dict)]
            newest = max(dates, key=_day, default="")
            user = _field(record, "user_id") or f"record {record.get('id', number)}"
            for query in record.get("query", [record]):
                name, question = str(query["id"]), str(query["input"])
                gold = _field(golds, name) or _field(query, "gold")
                if gold in task.labels and _cut(task, question):
                    yield Query(name, question, gold, user, newest, len(profile)), profile
                else:
                    remarks.append(f"query {name}: gold {gold!r}, question {question[:60]!r}")
        except Exception as e:
            remarks.append(f"record {number}: {type(e).__name__} {e}")


def _choose(task, part, users, queries_per_user, remarks):
    """{user id: latest queries, oldest first} of the users with the longest history."""
    found = {}
    ids = set()
    for query, _ in _queries(task, part, remarks):
        if query.id in ids:
            raise Problem(f"{part[0]}: two queries have the id {query.id}")
        ids.add(query.id)
        found.setdefault(query.user, []).append(query)
    if not ids:
        raise Problem(f"{part[0]}: no query that can be used {remarks[:1]}")
    for queries in found.values():
        queries.sort(key=lambda query: (_day(query.date), query.size))
        del queries[:-queries_per_user]
    longest = sorted(found, key=lambda name: -found[name][0].size)
    return {name: found[name] for name in longest[:users]}


def load(
    task: Task,
    data: str | Path,
    users: int = 100,
    queries_per_user: int = 3,
    max_history: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> tuple:
    """(users, those with the longest history first; what was left out). Raises Problem.

    Two passes, so that no file is held whole: the first chooses from the last partition, the
    second reads all of the chosen users. History is the profile of a user's first evaluated query,
    and earlier queries. limit: of queries in all; users beyond it have none."""
    parts = _locate(task, data)
    remarks: list = []
    chosen = _choose(task, parts[-1], users, queries_per_user, remarks)
    items: dict = {name: [] for name in chosen}
    for part in parts:
        for query, profile in _queries(task, part, []):
            late = chosen.get(query.user, [])
            if query in late[:1] and part is parts[-1]:
                items[query.user][:0] = [(item, None) for item in profile]
            elif late and query not in late:
                items[query.user].append((_item(task, query), query))
    cited = [_field(item, task.label) for item, _ in chain(*items.values())]
    titles = {bare(title): title for title in cited}
    offered = [task.titles(query.input).values() for query in chain(*chosen.values())]
    for title in chain([""], *offered):
        titles.pop(bare(title), None)
    found = []
    for name, queries in chosen.items():
        history, leaks = _history(task, queries, items[name], titles, seed, remarks)
        found.append(User(name, history[-max_history:], queries[:limit], leaks))
        limit = limit and max(limit - len(queries), 0)
    return found, remarks


def _item(task, query):
    """An earlier query as an item of a history."""
    return {
        "id": query.id,
        "date": query.date,
        task.text: _cut(task, query.input)[1],
        task.label: task.titles(query.input).get(query.gold, query.gold),
    }


def _history(task, queries, items, titles, seed, remarks):
    """A user's episodes, oldest first, and how many more there were with an evaluated query's id or
    text. An earlier query that stands there already is no episode of its own.

    items: each with the earlier query that it was, or None. titles: {spelled bare: title}, without
    those that an evaluated query offers; what only others cite are LaMP-1's negatives."""
    ids = {query.id for query in queries}
    asked = {_own_text(task, query.input) for query in queries}
    own = {bare(_field(item, task.label)) for item, _ in items}
    rivals = sorted((titles[name] for name in titles.keys() - own), key=str.lower)
    first = queries[0]
    history = []
    known = set()
    leaks = 0
    for item, earlier in items:
        label = _field(item, task.label)
        if not _field(item, task.text) or not (label or task.options):
            remarks.append(f"item {str(item)[:60]!r} of user {first.user}: no text or no label")
            continue
        episode = _episode(task, first, item, label, earlier, rivals, seed)
        plain = _own_text(task, episode.query)  # of what would really be asked
        if plain in asked or _field(item, "id") in ids:
            leaks += 1
        elif not earlier or plain not in known:
            history.append(episode)
        if label:
            known.add(plain)
    history.sort(key=lambda episode: _day(str(episode.metadata["date"])))
    return history, leaks


def _episode(task, first, item, label, earlier, rivals, seed):
    """A history item as an Episode. An earlier query keeps its question and answer. A labelled item
    asks the user's first question with its own text in place; in LaMP-1 its cited title stands
    against one of `rivals` (Appendix E). Unlabelled: no answer."""
    text = str(item[task.text])
    question = text
    answer = ""
    if earlier:
        question = earlier.input
        answer = earlier.gold
    elif label and (rivals or not task.options):
        parts = _cut(task, first.input)
        parts[1] = text
        answer = label
        if task.options:
            rng = random.Random(f"{seed} {first.user} {bare(text)}".encode("utf-8", "replace"))
            pair = [label, rng.choice(rivals)]
            rng.shuffle(pair)
            parts[3:] = pair
            answer = task.labels[pair.index(label)]
        question = task.form.format(*parts)
    # The answer first: a long text is cut where it is shown.
    shown = [item.get("date"), label and f"{task.label}: {label}"]
    shown += [item.get(name) for name in task.fields]
    words = " ".join(text.split(" ")[:368])  # as OPPU cuts them
    example = task.example.format_map({task.text: words, task.label: label})
    metadata = {"date": item.get("date"), "example": example}
    return Episode(question, answer, metadata, " | ".join(str(part) for part in shown if part))


# ------------------------------------------------------------------------------------- methods


@dataclass
class Method:
    """What a method gives the model: in a ReAct loop where it has tools or is aligned, else in one
    call."""

    system: str = ""  # the first system prompt; without a loop it stands before the question
    profile: bool = False  # P^u, for {profile} there
    own: int = 0  # the user's top-K items in LaMP's own prompt
    others: int = 0  # labelled items of other users before the prompt
    tools: tuple = ()
    aligned: bool = False  # the persona is rewritten by Algorithm 1 first
    bank: bool = False  # MemoryBank's portrait and recall for {profile} and {memories} there
    # A bare label is an answer before any tool was used: no rule asks these baselines for tools.
    eager: bool = False

    @property
    def embeds(self) -> bool:
        return self.own > 0 or "RAG" in self.tools or self.aligned or self.bank


# ours: the system prompt of an agent without a persona
NEUTRAL = "You are a helpful assistant. Answer the question."
# ours, for membank
BANK = f"""\
{NEUTRAL} What you know of the user: {{profile}}

Related memories:
{{memories}}"""
# ours: the profile where there is none
UNKNOWN = "nothing is known."
BOTH = ("Wiki", "RAG")
METHODS = {
    # the bare input
    "prompt": Method(),
    # in-context learning; whose examples the paper means is our inference
    "icl": Method(others=4),
    # LaMP's retrieval augmentation, in LaMP's own words
    "rag-1": Method(own=1),
    "rag-4": Method(own=4),
    # profile-augmented generation (Richardson et al., 2023)
    "pag-4": Method("{profile}", own=4, profile=True),
    # Yao et al. (2023): nothing of the user, as the paper's numbers suggest
    "react": Method(NEUTRAL, tools=("Wiki",), eager=True),
    # MemoryBank (Zhong et al., 2024)
    "membank": Method(BANK, tools=("Wiki",), bank=True, eager=True),
    # the paper's method
    "personaagent": Method(PERSONA, profile=True, tools=BOTH, aligned=True),
    # Table 3: the same with one part taken out
    "no-alignment": Method(PERSONA, profile=True, tools=BOTH),
    "no-persona": Method(NEUTRAL, tools=BOTH),
    "no-memory": Method(PERSONA, tools=("Wiki",)),
    "no-action": Method(PERSONA, profile=True, aligned=True),
}
EVERY = list(METHODS)
GROUPS = {"table2": EVERY[:8], "table3": EVERY[7:], "all": EVERY}


def _give_examples(task, users, seed):
    """Give each query its examples: seeded questions of other users with their answers, none of
    which has the text of a query of its user."""
    k = METHODS["icl"].others
    pool = []
    for user in users:
        pool += [(user, episode) for episode in user.history if episode.response]
    for user in users:
        asked = {_own_text(task, query.input) for query in user.queries}
        for query in user.queries:
            rng = random.Random(f"{seed} {query.id}".encode("utf-8", "replace"))
            found = (
                f"{episode.query}\n{episode.response}"
                for owner, episode in rng.sample(pool, min(len(pool), 50 * k))
                if owner is not user and _own_text(task, episode.query) not in asked
            )
            query.examples = tuple(islice(found, k))


def _rag_prompt(task, question, store, k):
    """LaMP's own construction: retrieved items before the input, in LaMP-1 behind its first word
    'title'."""
    found = store.search(task.content(question), k)
    joined = ", and ".join(episode.metadata["example"] for episode, _ in found)
    if not found:
        return question
    if task.options:
        return question.replace("title", f"title, and {joined}", 1)
    return f"{joined}. {question}"


def read_answer(task: Task, question: str, text: str) -> str | None:
    """The label that an answer gives, or None; in LaMP-1 it may also name just one of the titles,
    where it denies nothing outside them."""
    if task.labels == metrics.RATINGS:
        return metrics.parse_rating(text)
    label = metrics.parse_label(text, task.labels)
    if label or not task.options:
        return label
    rest = " ".join(text.lower().split())
    named = []
    # The longer title first: it may hold the other one.
    for option, title in sorted(task.titles(question).items(), key=lambda pair: -len(pair[1])):
        form = rf"(?<!\w){re.escape(' '.join(title.lower().split()))}(?!\w)"
        rest, times = re.subn(form, "", rest)
        if times:
            named.append(option)
    return named[0] if len(named) == 1 and not metrics.DENIES.search(rest) else None


# ------------------------------------------------------------------------------------- the cache


class Cache:
    """Answers by source and whole request in one SQLite file, which threads and processes share, on
    a network file system too (no write-ahead log). What is stored first stays.

    mode: 'rwc'; 'rw' answers from the file alone; 'memory' keeps nothing after the process. source:
    who answers. A fault of the file is a Problem: nothing is paid for that cannot be kept.
    """

    def __init__(self, path, mode="rwc"):
        self.path = path
        self.offline = mode == "rw"  # not 'ro': what a killed writer left must be rolled back
        self._lock = threading.Lock()
        with self._using():
            uri = f"{Path(path).absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, timeout=60, check_same_thread=False, uri=True)
            others = "SELECT count(*) FROM sqlite_master WHERE name NOT LIKE '%replies%'"
            if self._db.execute(others).fetchone() != (0,):
                raise sqlite3.DatabaseError("it is no cache, or one of an earlier version")
            columns = "request BLOB PRIMARY KEY, source TEXT, answer"
            self._db.execute(f"CREATE TABLE IF NOT EXISTS replies ({columns})")

    @contextmanager
    def _using(self):
        try:
            with self._lock:
                yield
        except sqlite3.Error as e:
            advice = "free what it needs, or name another --cache"
            raise Problem(f"the cache {self.path} cannot be used ({e}): {advice}") from None

    def _one(self, query, value):
        with self._using():
            row = self._db.execute(query, (value,)).fetchone()
        return row[0] if row else None

    def get(self, source: str, request: Any) -> Any:
        """The stored answer, text or bytes; None where there is none."""
        return self._one("SELECT answer FROM replies WHERE request = ?", _key(source, request))

    def answers(self, source: str, requests: list, ask: Any) -> list:
        """The answers to the requests. Those that are not stored come from ask(some of them), in
        batches of up to 64, each of which is kept as soon as it is there; offline they raise."""
        for start in range(0, len(requests), 64):
            batch = [r for r in requests[start : start + 64] if self.get(source, r) is None]
            if not batch:
                continue
            if self.offline:
                raise NotKept(f"{self.path} lacks an answer of {source}", 0)
            rows = [(_key(source, r), source, answer) for r, answer in zip(batch, ask(batch))]
            with self._using(), self._db:
                self._db.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", rows)
        return [self.get(source, request) for request in requests]

    def count(self, source: str) -> int:
        """How many answers of a source are stored."""
        return self._one("SELECT count(*) FROM replies WHERE source = ?", source)

    def dimension(self, source: str) -> int:
        """Of the embeddings stored of a source, in half precision; 0 where there are none."""
        query = "SELECT length(answer) / 2 FROM replies WHERE source = ? LIMIT 1"
        return self._one(query, source) or 0


def _key(source, request):
    return sha256(json.dumps([source, request]).encode()).digest()


class NotKept(ServiceError, WikiUnreachable):
    """Offline, an answer that the cache lacks: an outage of its model or of Wikipedia."""


@dataclass
class Cached:
    """A model whose every answer is kept in a Cache and not asked again. A chat's request is
    provider, model, messages, temperature, stop, token limit and seed."""

    llm: Any
    cache: Cache
    provider: str = "openai"
    seed: int = 0

    def __post_init__(self):
        self.chats = f"{self.provider}/{self.llm.model}"
        self.embeddings = f"embeddings {self.llm.embed_model}"

    def chat(self, messages: list, stop: list | None = None, max_tokens: int = 0) -> Reply:
        """As the model's; `usage.kept` tells an answer that was in the cache."""
        limit = max_tokens or self.llm.max_tokens
        request = [messages, self.llm.temperature, stop, limit, self.seed]
        kept = self.cache.get(self.chats, request) is not None

        def _ask(_):
            return [json.dumps(asdict(self.llm.chat(messages, stop, limit)))]

        (found,) = self.cache.answers(self.chats, [request], _ask)
        reply = json.loads(found)
        usage = Usage(**reply.pop("usage"))
        usage.kept = kept
        return Reply(**reply, usage=usage)

    def embed(self, texts: list) -> np.ndarray:
        """As the model's, as unit rows, kept in half precision (cosines move by less than 1e-4).

        Raises Problem where the cache holds another dimension than the model gives."""
        rows = self.cache.answers(self.embeddings, texts, self._embed)
        return np.array([np.frombuffer(row, np.float16) for row in rows], np.float32)

    def _embed(self, texts):
        """Embeddings of the model as they are stored."""
        rows = np.asarray(self.llm.embed(texts), float)
        held = self.cache.dimension(self.embeddings)
        if held not in (0, rows.shape[1]):
            raise Problem(
                f"{self.cache.path} holds {self.embeddings} of {held} dimensions, "
                f"the server gives {rows.shape[1]}"
            )
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not norms.all():
            warnings.warn(f"{self.embeddings}: all zero for some texts", stacklevel=2)
        unit = (rows / (norms + 1e-300)).astype(np.float16)
        return [row.tobytes() for row in unit]


class CachedWiki(Wiki):
    """Wikipedia with every look-up kept, but not its outages: they are asked anew."""

    cache: Cache

    def look_up(self, topic: str) -> str:
        ask = partial(map, super().look_up)  # of a list of topics
        (found,) = self.cache.answers(f"pages {self.base_url}", [topic], ask)
        return found


class Meter:
    """A model's `chat`, counted."""

    def __init__(self, llm):
        self.llm = llm
        self.usage = Usage()
        self._lock = threading.Lock()

    def chat(self, *args: Any, **kwargs: Any) -> Reply:
        """As the model's."""
        reply = self.llm.chat(*args, **kwargs)
        with self._lock:
            self.usage += reply.usage
            self.usage.cut += reply.finish == "length"
            self.usage.lost += reply.finish in FAILURES
        return reply


# ------------------------------------------------------------------------------------- one user


def evaluate(settings: Namespace, user: User) -> dict:
    """{method: [line of personas.jsonl, *rows of predictions.jsonl]} of one user.

    From plain data to plain data: any executor can run it, in any process. A failure, of the wire
    or of ours, is a row with the error and stops nothing else. Raises Problem, and ServiceError
    where no other request can succeed."""
    llm, wiki = _connected(json.dumps(vars(settings)), os.getpid())
    store = EpisodicMemory(llm.embed)  # filled by the first method to need it
    both = (wiki, RAG(store, settings.top_k))
    found = {}
    for name in settings.method:
        method = METHODS[name]
        allowed = [tool for tool in both if tool.name in method.tools]
        agent = PersonaAgent(llm, store, "", allowed, settings.max_steps, method.eager)
        found[name] = _try_method(settings, method, user, agent)
    return found


@lru_cache(1)
def _connected(settings_json, pid):
    """`connect`, once in each process: one that was forked has this memory, but another `pid`."""
    return connect(Namespace(**json.loads(settings_json)))


def _try_method(settings, method, user, agent):
    """What came of making the agent ready for the user, then of each query, asked of a copy."""
    line = _attempt({"user_id": user.id}, agent, _prepare, settings, method, user)

    def _ask(query):
        row = {"user_id": user.id, "id": query.id}
        if "error" in line:
            return {**line, **row, "usage": asdict(Usage())}
        return _attempt(row, replace(agent), _answer, settings, method, query)

    with ThreadPoolExecutor(settings.workers) as pool:
        return [line, *pool.map(_ask, user.queries)]


def _attempt(row, agent, work, *given):
    """`row` with what work(agent, *given) gives, or with its error; and the cost of the agent's
    calls, whose model is a Meter from now on. An error is raised where no other request can succeed
    either."""
    agent.llm = Meter(agent.llm)
    try:
        row |= work(agent, *given)
    except Exception as e:
        if getattr(e, "fatal", False):
            raise
        row["error"] = f"{type(e).__name__}: {e}"
    return {**row, "usage": asdict(agent.llm.usage)}


def _prepare(agent, settings, method, user):
    """Profile, persona and, where the method has it, alignment."""
    profile = ""
    if method.embeds and not len(agent.memory):
        agent.memory.add(user.history)
    if method.bank:
        agent.memory = MemoryBank(agent.llm, agent.memory)
        profile = agent.memory.portrait
    if method.profile:
        profile = summarize(agent.llm, user.history, TASKS[settings.task].summary)
    start = agent.persona = method.system.replace("{profile}", profile or UNKNOWN)
    record = Alignment(start, start)
    if method.aligned:
        record = align.align(agent, agent.llm, settings.batch, settings.iterations)
    return {"history": len(user.history), "profile": profile, **asdict(record)}


def _answer(agent, settings, method, query):
    """The answer to one query."""
    task = TASKS[settings.task]
    prompt = query.input
    if method.own:
        prompt = _rag_prompt(task, prompt, agent.memory, method.own)
    if method.bank:
        memories = agent.memory.recall(task.content(query.input), settings.top_k)
        agent.persona = agent.persona.replace("{memories}", memories)
    asked = prompt
    if method.tools or method.aligned:
        answer = agent.answer(prompt)
        if method.bank:  # what it recalled stands nowhere else
            asked = f"{agent.persona}\n\n{prompt}"
    else:
        parts = [agent.persona, *query.examples[: method.others], prompt]
        asked = "\n\n".join(filter(None, parts))
        reply = agent.llm.chat([{"role": "user", "content": asked}])
        answer = Answer(reply.text, [], FAILURES.get(reply.finish, "answered"), reply.usage)
    return {
        "question": asked,
        "gold": query.gold,
        "prediction": read_answer(task, query.input, answer.text),
        **asdict(answer),
    }


def connect(settings: Namespace) -> tuple:
    """The model and Wikipedia, each with the cache, for the options of `model_options`, resolved,
    and `seed`, `workers`, `cache` and `offline`. Raises ServiceError."""
    client: type[Client] = OpenAICompatible
    if settings.provider == "bedrock" and not settings.offline:  # offline no client is ever asked
        client = Bedrock
    given = vars(settings)
    options = {part.name: given[part.name] for part in fields(client) if part.name in given}
    address = WIKIPEDIA
    mode = "rwc"
    if settings.offline:
        mode = "rw"
    if settings.model == STAND_IN:
        if not (HERE / "tests/standin.py").exists():
            raise Problem("the stand-in comes with a source checkout: name a --model")
        from tests import standin

        address = f"http://127.0.0.1:{standin.start().server_port}"
        options |= {"base_url": f"{address}/v1", "api_key": "none"}
        mode = "memory"  # an old stand-in never answers for a new one
    llm = client(**options)
    llm.hasty = True
    with suppress(OSError):  # then the cache says what is wrong
        os.makedirs(os.path.dirname(settings.cache), exist_ok=True)
    wiki = CachedWiki(settings.wiki_base_url or address)
    wiki.cache = Cache(settings.cache, mode)
    return Cached(llm, wiki.cache, settings.provider, settings.seed), wiki


# ------------------------------------------------------------------------------------- a run


def run(settings: Namespace, users: list, folders: dict, origin: dict, pool: Executor) -> dict:
    """Evaluate the users in an executor: {method: results.json}.

    Each method's files are written whole whenever another tenth of the users is done, and at the
    end, however it ends: with what this start reached, the rest is in the cache."""
    done: dict = {}
    futures = {}
    used = Usage()
    try:
        for user in users:
            futures[pool.submit(evaluate, settings, user)] = user.id
        for job in as_completed(futures):
            found = done[futures[job]] = job.result()
            used += total(chain(*found.values()))
            print(
                f"{len(done)}/{len(users)} users, {used.calls} calls ({used.kept} from the cache), "
                f"{(used.input + used.output) // 1000}k tokens",
                file=sys.stderr,
            )
            if len(done) * 10 % len(users) < 10:  # another tenth is done
                _save(users, done, folders, origin)
    except BrokenExecutor as e:
        raise Problem(f"a worker process died ({e}): the same command goes on from there") from None
    finally:
        for job in futures:
            job.cancel()
        results = _save(users, done, folders, origin)
    return results


def total(parts: Iterable) -> Usage:
    """The cost of rows and lines."""
    usage = Usage()
    for part in parts:
        usage += Usage(**part["usage"])
    return usage


def _save(users, done, folders, origin):
    """Write the files of every method, rows in the order of the users: {method: results.json}."""
    task = TASKS[origin["task"]]
    results = {}
    for name, folder in folders.items():
        outcomes = [done[user.id][name] for user in users if user.id in done]
        lines = [line for line, *_ in outcomes]
        rows = list(chain(*(own for _, *own in outcomes)))
        found = [row for row in rows if "error" not in row]
        errors = [row["error"] for row in rows if "error" in row]
        finished = len(outcomes) == len(users)
        results[name] = {
            "method": name,
            "complete": finished and not errors,
            **origin,
            "users": {"n": len(users), "leaks_removed": sum(user.leaks for user in users)},
            "errors": errors,
            "usage": {"personas": asdict(total(lines)), "answers": asdict(total(rows))},
            **_scores(task, found, finished),
            "aligned": sum(bool(line.get("iterations")) for line in lines),
            "updated": sum(line.get("final") != line.get("initial") for line in lines),
            # simulations of the alignment met it, too
            "wikipedia_outages": sum(WIKI_DOWN in str(part) for part in [*lines, *found]),
        }
        _write(folder / "predictions.jsonl", rows)
        _write(folder / "personas.jsonl", lines)
        for file, key in (("gold.json", "gold"), ("lamp.json", "prediction")):
            golds = [{"id": row["id"], "output": row[key] or ""} for row in found]
            _write(folder / file, {"task": task.folder[:6], "golds": golds})
        _write(folder / "results.json", results[name])  # the last: who finds it finds all
    return results


def _scores(task, rows, finished):
    """What answers come to; with intervals at the end."""
    gold = [row["gold"] for row in rows]
    pred = [row["prediction"] for row in rows]
    text = [row["text"] for row in rows]
    owners = [row["user_id"] for row in rows]
    right = sum(map(eq, gold, pred))
    return {
        "metrics": {"n": len(rows), "right": right, **metrics.score(gold, pred, task.labels)},
        "intervals": metrics.interval(owners, gold, pred, task.labels) if finished else {},
        "strict": metrics.score(gold, text, task.labels),
        "unparsed": pred.count(None),
        "status": Counter(row["status"] for row in rows),
    }


def _write(path, data):
    """Replace a file by data as JSON, or by a line for each of them, when the new one is whole."""
    if path.suffix == ".jsonl":
        text = "".join(f"{json.dumps(row)}\n" for row in data)
    else:
        text = re.sub(r": NaN\b", ": null", json.dumps(data, indent=1))
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)  # ASCII, as json.dumps makes it
        part.replace(path)
    except OSError as e:
        raise Problem(f"{path} cannot be written ({e.strerror}); the answers are kept") from None


def _cost(found):
    """What a results.json says was used."""
    return total({"usage": part} for part in found["usage"].values())


def table(results: dict) -> str:
    """What `run` returns, {method: results.json}, as an aligned text table."""
    wide = max(map(len, ["method", *results]))
    lines = []
    for method, found in results.items():
        n, right, first, second = found["metrics"].values()
        errors = len(found["errors"])
        aligned = updated = "-"
        if found["aligned"]:
            aligned = f"{found['aligned']} of {found['users']['n']}"
            updated = found["updated"]
        used = _cost(found)
        asked = max(n + errors, 1)
        lines.append(
            f"{method:<{wide}} {n:>4} {right:>6} {first:>9.3f} {second:>9.3f} "
            f"{found['unparsed']:>9} {found['status']['forced']:>7} {errors:>7} {aligned:>10} "
            f"{updated:>8} {used.calls / asked:>12.1f} {(used.input + used.output) / asked:>13.0f}"
        )
    *_, metric, other = found["metrics"]
    head = f"{'method':<{wide}}    n  right {metric:>9} {other:>9}  unparsed  forced  errors"
    return "\n".join([f"{head}    aligned  updated  calls/query  tokens/query", *lines])


# ------------------------------------------------------------------------------ command line

WIKIPEDIA = "https://en.wikipedia.org"
STAND_IN = "stand-in"
NO_MODEL = """\
NO LANGUAGE MODEL is involved: a stand-in answers by counting words (tests/standin.py). The scores \
say nothing about the method.
Connect a model: --model gpt-4o-mini with OPENAI_API_KEY set, or --base-url \
http://localhost:11434/v1 --model M --embed-model E"""
IDLE = """\
--provider, --base-url, --embed-model, --embed-base-url, --cache and --offline need a model: add \
--model (its name, as the server has it)"""
NO_SERVER = """\
no server to talk to: set OPENAI_API_KEY (OpenAI), --base-url (a local server), or AWS_REGION and \
AWS_BEARER_TOKEN_BEDROCK, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (Bedrock)"""
# settings that are not compared: they change no answer, or stand in the path
FREE = [
    "task",
    "method",
    "provider",
    "base_url",
    "embed_base_url",
    "wiki_base_url",
    "workers",
    "output",
    "cache",
    "offline",
]


def positive(text: str) -> int:
    """A whole number of at least 1. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run_options(parser: ArgumentParser):
    """What is evaluated, and how."""
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--method", default="personaagent", help="a comma list of methods, or table2, table3, all")
    add("--data", help="LaMP folder or file, official or OPPU layout (the bundled sample)")
    add("--users", type=positive, default=100, help="how many, those with the longest history")
    add("--queries-per-user", type=positive, default=3, help="the latest of each")
    add("--max-history", type=positive, default=0, help="keep only the newest items (cold start)")
    add("--limit", type=positive, help="queries in all")
    add("--seed", type=int, default=0, help="of what is drawn; another one asks the model anew")
    add("--top-k", type=positive, default=4, help="K memories per retrieval of the agent")
    add("--batch", type=positive, default=3, help="n interactions of the alignment batch")
    add("--iterations", type=positive, default=1, help="of the alignment")
    add("--max-steps", type=positive, default=8, help="replies before an answer is forced")
    add("--workers", type=positive, default=8, help="requests in flight")
    add("--output", default="runs", help="root of <task>/<method>[-changed settings]")
    add("--cache", help="file of all answers (<output>/cache.sqlite)")
    add("--offline", action="store_true", help="answer from the cache alone: no key, no server")


def model_options(parser: ArgumentParser):
    """Which models answer, and where."""
    add = parser.add_argument_group("model").add_argument
    add("--provider", choices=["openai", "bedrock"], help="openai: any server with its API")
    add("--model", default=STAND_IN, help="chat model; without it a stand-in answers, not a model")
    add("--embed-model", help="OpenAI: text-embedding-3-small, Bedrock: Titan V2, else name it")
    add("--base-url", help="of an OpenAI-compatible server, up to /v1")
    add("--embed-base-url", help="where the embedding model is served, if elsewhere")
    add("--temperature", type=float, default=0.1, help="from 0 to 2")
    add("--max-tokens", type=positive, default=1024, help="of an answer, a profile, a feedback")
    add("--wiki-base-url", help="root of another Wikipedia")


def arguments(argv: list) -> Namespace:
    """The command line, checked and with nothing left open; `method` becomes a list of names."""
    parser = ArgumentParser(
        "lamp.py",
        description="PersonaAgent and its baselines on LaMP; examples stand in README.md.",
        allow_abbrev=False,
    )
    run_options(parser)
    model_options(parser)
    settings = parser.parse_args(argv)
    names = chain(*(GROUPS.get(part, [part]) for part in settings.method.split(",")))
    settings.method = list(dict.fromkeys(names))
    try:
        resolve(settings)
        check_address(settings.wiki_base_url or WIKIPEDIA, "--wiki-base-url")
        for name in settings.method:
            if name not in METHODS:
                raise Problem(f"--method {name}: choose from {', '.join([*METHODS, *GROUPS])}")
            if METHODS[name].embeds and not settings.embed_model:
                raise Problem(f"--embed-model is missing: {name} retrieves memories")
        if settings.data == "" or not 0 <= settings.temperature <= 2:
            raise Problem("--data is empty, or --temperature is not from 0 to 2")
    except ServiceError as e:
        parser.error(str(e))
    settings.cache = os.path.abspath(settings.cache or f"{settings.output}/cache.sqlite")
    return settings


def resolve(settings: Namespace):
    """Fill in the provider and the embedding model where they were left open; before `cache` is,
    which the stand-in refuses. Raises ServiceError."""
    if settings.model == STAND_IN:  # whatever keys the environment holds
        server = settings.provider or settings.base_url or settings.embed_base_url
        if server or settings.embed_model or settings.cache or settings.offline:
            raise Problem(IDLE)
        settings.embed_model = STAND_IN
        settings.provider = "openai"
        return
    address = settings.base_url or os.environ.get("OPENAI_BASE_URL")
    embeds = settings.embed_base_url or address or "https://api.openai.com/v1"
    check_address(address or WIKIPEDIA, "--base-url (or OPENAI_BASE_URL)")
    check_address(embeds, "--embed-base-url")
    openai = address or os.environ.get("OPENAI_API_KEY")
    if not settings.provider:
        aws = {"AWS_BEARER_TOKEN_BEDROCK", "AWS_ACCESS_KEY_ID"} & os.environ.keys()
        settings.provider = "bedrock" if aws and not openai else "openai"
    usual = None
    if settings.provider == "bedrock":
        name = "AWS_ENDPOINT_URL_BEDROCK_RUNTIME"
        check_address(os.environ.get(name) or WIKIPEDIA, name)
        usual = "amazon.titan-embed-text-v2:0"
    elif not openai and not settings.offline:
        raise Problem(NO_SERVER)
    elif "api.openai.com" in embeds:
        usual = "text-embedding-3-small"
    settings.embed_model = settings.embed_model or usual


def _digest(data):
    return sha256(repr(data).encode()).hexdigest()[:16]


def _origin(settings, argv):
    """What results.json says of its making."""
    # --git-dir: else git would look upwards and find another project's commit
    git = f"git -C {shlex.quote(str(HERE))} --git-dir=.git describe --always --dirty --abbrev=40"
    failed, commit = subprocess.getstatusoutput(git)
    return {
        "task": settings.task,
        "settings": vars(settings),
        "command": shlex.join(["python", "lamp.py", *argv]),
        "commit": None if failed else commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _prompts(task):
    """What is said to a model in a run of this task, and how its replies are read."""
    prompts = [BANK, UNKNOWN, TASKS[task]]
    for module in (memory, tools, persona_agent, align):
        prompts += [v for k, v in vars(module).items() if k.isupper() and isinstance(v, str)]
    return prompts


def _folder(settings, name):
    """<output>/<task>/<method>[-changed settings]; a Problem where it holds another run."""
    usual = vars(arguments(["--task", settings.task]))
    compared = {key: value for key, value in vars(settings).items() if key not in FREE}
    for key, value in compared.items():
        if value != usual.get(key, value):
            text = Path(value).resolve().name if key == "data" else str(value)
            safe = re.sub(r"[^-.0-9A-Za-z]+", "_", text)
            if safe != text or len(safe) > 40:  # short, and still not another one's name
                safe = f"{safe[-30:]}-{_digest(value)[:6]}"
            name += f"-{key}={safe}"
    folder = Path(settings.output, settings.task, name)
    made = folder / "results.json"
    if made.exists():
        with _reading(made):
            before = json.loads(made.read_text())["settings"]
        for key, value in compared.items():
            if before.get(key) != value and key != "data":  # data_hash tells it, however spelled
                differ = f"{key} {before.get(key)!r}, not {value!r}"
                raise Problem(f"{folder} holds a run with {differ}: name another --output")
    return folder


def printable(text: str) -> str:
    """`text` without control characters, which a model or a server may have put there."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def _expected(settings, users, method):
    """About how many chat calls a method makes, where each tool is used once."""
    turns = len(method.tools) + 1
    each = method.profile + 11 * method.bank
    if method.aligned:
        each += settings.iterations * (settings.batch * (turns + 1) + 1)
    return len(users) * each + turns * sum(len(user.queries) for user in users)


def _announce(settings, users, remarks, llm):
    """What is going to happen, before anything costs."""
    sizes = [len(user.history) for user in users]
    labelled = sum(any(episode.response for episode in user.history) for user in users)
    print(
        f"{TASKS[settings.task].title}\n"
        f"data    {settings.data or 'the bundled sample'}: {len(users)} users, "
        f"{sum(len(user.queries) for user in users)} queries, histories of {min(sizes)} to "
        f"{max(sizes)} items (labelled for {labelled} of {len(users)} users), "
        f"{sum(user.leaks for user in users)} items removed that would give an answer away"
    )
    if remarks:
        print(
            f"        {len(remarks)} records or items left out, the first: "
            f"{printable('; '.join(remarks[:5]))}"
        )
    print(f"model   {settings.model}, embeddings {settings.embed_model or '-'}")
    held = llm.cache.count(llm.chats)
    if held:
        print(f"        {held} answers of it are in {settings.cache}; another --cache asks anew")
    for name in settings.method:
        most = f", up to {settings.max_steps + 1} a question" if METHODS[name].tools else ""
        print(f"method  {name}: about {_expected(settings, users, METHODS[name])} chat calls{most}")
    quiet = settings.wiki_base_url or settings.offline or settings.model == STAND_IN
    if not quiet and "WIKIPEDIA_CONTACT" not in os.environ:
        print("        set WIKIPEDIA_CONTACT: Wikipedia allows fewer requests without")
    print(flush=True)


def _conclude(results, wiki):
    """Say loudly what the metric does not show; the exit code."""
    used = Usage()
    errors = []
    outages = 0
    for found in results.values():
        used += _cost(found)
        errors += found["errors"]
        outages += found["wikipedia_outages"]
    if outages:
        print(
            f"\nWIKIPEDIA WAS NOT REACHED in {outages} questions or alignments "
            f"({printable(wiki.down or 'see the rows')}).\n"
            "The same command, with Wikipedia back, asks those anew."
        )
    if used.cut > used.calls / 10:
        print(f"\n{used.cut} REPLIES OF {used.calls} WERE CUT: reasoning may need --max-tokens.")
    if errors:
        print(
            f"\n{len(errors)} QUERIES FAILED and are not in the metric; the same command tries\n"
            f"them again. First: {printable(errors[0])}"
        )
    return 1 if errors else 0


def main(argv: list, pool: Executor | None = None) -> int:
    """The command line; returns the exit code. pool: any executor for the users' work."""
    settings = arguments(argv)
    task = TASKS[settings.task]
    users, remarks = load(
        task,
        settings.data or SAMPLE,
        settings.users,
        settings.queries_per_user,
        settings.max_history,
        settings.limit,
        settings.seed,
    )
    _give_examples(task, users, settings.seed)
    users = [user for user in users if user.queries]
    settings.data_hash = _digest(users)
    settings.prompt_hash = _digest(_prompts(settings.task))
    _connected.cache_clear()  # the environment may have changed since another run in this process
    llm, wiki = _connected(json.dumps(vars(settings)), os.getpid())
    folders = {name: _folder(settings, name) for name in settings.method}
    if settings.model == STAND_IN:
        print(f"{NO_MODEL}\n")
    _announce(settings, users, remarks, llm)
    own = ThreadPoolExecutor(settings.workers)
    try:
        results = run(settings, users, folders, _origin(settings, argv), pool or own)
    finally:
        own.shutdown(wait=False)  # a program that goes on keeps no threads of it
    print(table(results))
    for name, folder in folders.items():
        print(f"{name}: {folder}")
    code = _conclude(results, wiki)
    if settings.model == STAND_IN:
        print(f"\n{NO_MODEL}")
    return code


def cli(argv: list) -> int:
    """`main`, with what a user can cause as one line on stderr; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    try:
        return main(argv)
    except ServiceError as e:
        print(f"lamp.py: {printable(str(e))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has seen enough
        return 1
    except KeyboardInterrupt:
        print("\nlamp.py: stopped; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = cli(sys.argv[1:])
    try:
        sys.stdout.flush()
    finally:
        os._exit(code)  # does not wait for threads that wait for an answer
