"""LaMP: data, bad data, what each method asks (by the stand-in's rules), leaks, answers."""

import json
import re
import tracemalloc
from contextlib import redirect_stdout
from io import StringIO

import pytest

from align import bare
from lamp import METHODS, SAMPLE, TASKS, Cache, Cached, Problem, _locate, cli, load, read_answer
from tests import standin
from tests.conftest import Scripted
from tools import Wiki

INPUTS = {  # OWN: an input's own text
    "lamp1": 'For a paper with the title "OWN", which reference? [1]: "Yes OWN" [2]: "No OWN"',
    "lamp2m": "Which tag? tags: [comedy, action] description: OWN",
    "lamp2n": "Which category? categories: [crime, women] article: OWN",
    "lamp3": "Which score? Answer without further explanation. review: OWN",
}
GOLD = {"lamp1": "[1]", "lamp2m": "comedy", "lamp2n": "crime", "lamp3": "3"}
FOLDERS = {"lamp1": "LaMP_1", "lamp2m": "LaMP_2/new", "lamp2n": "LaMP_2", "lamp3": "LaMP_3"}
OPPU = ["citation", "movie_tagging", "news_categorize", "product_rating"]
LAMPS_WORDS = {  # LaMP/prompts/prompts.py
    "lamp1": '"{title}"',
    "lamp2m": 'the tag for the movie: "{description}" is "{tag}" ',
    "lamp2n": 'the category for the article: "{text}" is "{category}" ',
    "lamp3": '{score} is the score for "{text}" ',
}
EARLY = [("lamp2m", "A", "tag: comedy | A"), ("lamp1", "A", "citation: Yes A | A")]
EARLY += [("lamp1", '"A"', 'citation: Yes "A" | "A"')]
cases = pytest.mark.parametrize


def item(text, task="lamp2m", **more):
    labels = {"tag": "action", "category": "crime", "score": "3", "citation": f"cited by {text}"}
    own = {"lamp1": "title", "lamp2m": "description"}.get(task, "text")
    return {"title": "T", "abstract": "on it", **labels, own: text, **more}


def asks(name, profile=(), task="lamp2m", **more):
    return {"id": name, "input": INPUTS[task].replace("OWN", name), "profile": profile, **more}


def write(folder, records, golds=None, task="lamp2m", split="dev"):
    """A partition as in the official release; golds: {id: gold}, the same for all by default."""
    golds = golds or {record["id"]: GOLD[task] for record in records}
    outputs = [{"id": name, "output": gold} for name, gold in golds.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_questions.json").write_text(json.dumps(records))
    text = json.dumps({"task": FOLDERS[task][:6], "golds": outputs})
    (folder / f"{split}_outputs.json").write_text(text)


def read(folder, records=None, task="lamp2m", **options):
    if records:
        write(folder, records, None, task)
    return load(TASKS[task], folder, **options)[0]


def texts(user):
    return [episode.text.split(" | ")[-1] for episode in user.history]


def ids(users):
    return [[query.id for query in user.queries] for user in users]


def sample(task):
    file = SAMPLE / "time" / FOLDERS[task] / "dev/dev_questions.json"
    return json.loads(file.read_text(encoding="utf-8"))


@cases("task", TASKS)
def test_the_sample_loads_whole(task):
    found, remarks = load(TASKS[task], SAMPLE)
    sizes = [(len(user.queries), len(user.history), user.leaks) for user in found]
    assert (sizes, remarks) == ([(3, 20, int(task == "lamp1"))] * 6, [])  # own papers
    assert {e.response for user in found for e in user.history} <= set(TASKS[task].labels)


@cases("task", TASKS)
@cases("root", ["", "time/"])
def test_the_official_layout_is_found_from_root_folder_and_file(tmp_path, task, root):
    home = f"LaMP/{root}{FOLDERS[task]}"
    write(tmp_path / home / "dev", [asks("q", (), task)], task=task)
    for data in ("LaMP", f"LaMP/{root}", home, f"{home}/dev", f"{home}/dev/dev_questions.json"):
        assert ids(read(tmp_path / data, task=task)) == [["q"]], data


@cases("task, folder", list(zip(TASKS, OPPU)))
@cases("inside", [True, False], ids=["gold inside", "gold beside"])
def test_an_oppu_user_is_found_and_the_last_queries_are_evaluated(tmp_path, task, folder, inside):
    file = tmp_path / "data" / folder / "user_top_100_history.json"
    file.parent.mkdir(parents=True)
    asked = [{**asks(str(n), (), task), "id": n, "gold": f" {GOLD[task]} "} for n in range(5)]
    if not inside:
        golds = [{"id": str(query["id"]), "output": query.pop("gold")} for query in asked]
        labels = {"task": f"LaMP_{task[4:].upper()}", "golds": golds}
        file.with_name(f"{file.stem}_label.json").write_text(json.dumps(labels))
    file.write_text(json.dumps([{"user_id": 1, "profile": [item("x", task)], "query": asked}]))
    for data in (tmp_path / "data", file.parent, file):
        (user,) = read(data, task=task)
        assert [(q.id, q.gold) for q in user.queries] == [(n, GOLD[task]) for n in "234"]
        assert len(user.history) == 3


def test_the_latest_partition_with_gold_is_evaluated_of_the_time_split_if_there(tmp_path):
    time = tmp_path / "time/LaMP_2/new"
    for split in ("train", "dev", "test"):
        write(time / split, [asks(split)], split=split)
        write(tmp_path / "LaMP_2/new" / split, [asks(f"user's {split}")], split=split)
    (time / "test/test_outputs.json").unlink()
    assert [[*golds] for _, golds in _locate(TASKS["lamp2m"], tmp_path)] == [["train"], ["dev"]]
    assert ids(read(tmp_path)) == [["dev"]]
    (time / "dev/dev_outputs.json").unlink()
    assert ids(read(tmp_path)) == [["train"]]


@cases("task, name, text", EARLY)
def test_earlier_queries_are_labelled_history_if_not_in_the_profile(tmp_path, task, name, text):
    seen, new = item("seen", task, date="2001-02-03"), item("new", task, citation=None, date=2002)
    early = [asks(name, [seen], task, user_id=1) for name in ("seen", name)]
    write(tmp_path, early, None, task, "train")
    (user,) = read(tmp_path, [asks("q", [seen, new], task, user_id=1)], task)
    known, episode, last = user.history
    assert (episode.query, episode.response) == (early[1]["input"], GOLD[task])
    assert episode.text == f"2001-02-03 | {text}" and "seen" in known.text and "new" in last.text
    assert last.response == {"lamp1": "", "lamp2m": "action"}[task]


SHOWN = [("lamp2m", "action", "tag: action"), ("lamp2n", "crime", "category: crime | T")]
SHOWN += [("lamp3", score, "score: 4") for score in ("4", " 4 ", 4, 4.0, "4.0")]
LONG = [asks(name, [item("x")] * n, user_id=name) for name, n in (("a", 2), ("b", 3), ("c", 1))]
LATE = [("a", "2012-01-09", 2000), ("b", 2011, 2000), ("d", "2012-01-10", 2), ("c", "2012-01-10")]
LATE = [asks(name, [item("x", date=day) for day in days], user_id=7) for name, *days in LATE]
MANY = [asks(f"{user}{n}", user_id=user) for user in (1, 2, 3) for n in range(3)]
CHOSEN = [(LONG, {"users": 2}, [["b"], ["a"]])]  # the longest history first
CHOSEN += [(LATE, {}, [["a", "c", "d"]]), (LATE, {"queries_per_user": 1}, [["d"]])]  # by date, size
CHOSEN += [(MANY, {"limit": 4}, [["10", "11", "12"], ["20"], []])]
CHOSEN += [([asks("a", user_id=u), asks("b", user_id=u)], {}, [["a", "b"]]) for u in (9, "u", 0)]
CHOSEN += [([asks("a", user_id=u), asks("b", user_id=u)], {}, [["a"], ["b"]]) for u in (None, "")]
DATES = [(["2012-3-10", "2012-03-09", "2012-03-9"], "bca"), (["2010", 2002, "2005-01-01"], "bca")]
DATES += [([2010, 2010, 2009], "cab"), ([None, None, None], "abc"), (["soon", "", "now"], "abc")]


@cases("task, label, shown", SHOWN)
def test_an_item_becomes_the_question_that_the_agent_would_get(tmp_path, task, label, shown):
    profile = [item("X", task, date=2001, **{TASKS[task].label: label})]
    (episode,) = read(tmp_path, [asks("q", profile, task)], task)[0].history
    assert episode.text == f"2001 | {shown} | X" and f": {episode.response}" in shown
    assert episode.query == INPUTS[task].replace("OWN", "X")


@cases("records, options, expected", CHOSEN)
def test_users_and_queries_are_chosen(tmp_path, records, options, expected):
    assert ids(read(tmp_path, records, **options)) == expected


@cases("dates, order", DATES)
def test_history_is_in_the_order_of_dates_else_of_the_file(tmp_path, dates, order):
    records = [asks("q", [item(text, date=date) for text, date in zip("abc", dates)])]
    assert "".join(texts(read(tmp_path, records)[0])) == order
    assert "".join(texts(read(tmp_path, records, max_history=2)[0])) == order[1:]


@cases("more", [{"date": [1]}, {"date": "9" * 5000}, {"answer": "?"}, {"description": "!"}])
def test_a_strange_item_is_kept(tmp_path, more):
    assert len(texts(read(tmp_path, [asks("q", [item("x", **more), item("good")])])[0])) == 2


def test_a_record_longer_than_any_buffer_is_read_whole(tmp_path):
    long = 'é😀"\\\n' * 150_000
    records = [asks("q", [item(long), item("short")]), asks("r")]
    write(tmp_path, records)
    data = "\ufeff \n" + json.dumps(records, indent=1, ensure_ascii=False)
    (tmp_path / "dev_questions.json").write_text(data, encoding="utf-8")
    assert texts(read(tmp_path)[0]) == [long, "short"]


def test_memory_grows_with_the_users_kept_and_not_with_the_file(tmp_path):
    long = [item("word " * 20_000)] * 3
    write(tmp_path, [asks("kept", long * 2), *(asks(str(n), long) for n in range(82))])  # 26 MB
    tracemalloc.start()
    (user,) = read(tmp_path, users=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6 and len(user.history) == 6


FINE = json.dumps([asks("q", [item("x")]), asks("r")]).encode()
GOLDS = b'{"task": "LaMP_2", "golds": [{"id": "q", "output": "action"}, {"id": "r", "output": 7}]}'
DEEP, LONG_NUMBER = b"[" * 100_000, b"1" * 5000
BAD_FILES = {  # questions, golds
    "truncated": (FINE[:-60], GOLDS[:-20]),
    "truncated behind a record": (FINE[:-1], GOLDS[:-1]),
    "text after the end": (FINE + b" and more", GOLDS + b" and more"),
    "UTF-16": (FINE.decode().encode("utf-16"), GOLDS.decode().encode("utf-16")),
    "Latin-1": (FINE.replace(b"x", b"caf\xe9"), GOLDS.replace(b"action", b"caf\xe9")),
    "nesting": (DEEP, b'{"golds":' + DEEP),
    "nesting in a record": (b'[{"id":"q","profile":[{"a":' + DEEP, b"{" + DEEP),
    "a long number": (b'[{"id": %s}]' % LONG_NUMBER, GOLDS.replace(b"7", LONG_NUMBER)),
    "a folder": (None, None),
    "HTML": (b"<!DOCTYPE html><html>not found</html>", b"<!DOCTYPE html><html></html>"),
    "an id twice": (FINE.replace(b'"r"', b'"q"'), GOLDS.replace(b'"r"', b'"q"')),
    "nothing usable": (b"[]", b'{"task": "LaMP_2"}'),
    "of another task": (FINE.replace(b"] descr", b" review"), GOLDS.replace(b"LaMP_2", b"LaMP_3")),
}
BAD = asks("bad")
BAD_RECORDS = ["text", None, *({k: v for k, v in BAD.items() if k != key} for key in BAD)]
BAD_RECORDS += [BAD | {"profile": profile} for profile in (None, "text")]
BAD_RECORDS += [BAD | {"input": text} for text in (7, "x No instruction", INPUTS["lamp3"])]
BAD_ITEMS = ["text", None, 7, {"id": "1", "tag": "action"}, {"id": "1", "description": "no tag"}]
BAD_ITEMS += [item(" "), item("x", tag=["action"]), item({"text": "x"}), item("x", tag=None)]
LEFT_OUT = [([record], [], "comedy") for record in BAD_RECORDS]
LEFT_OUT += [([], [bad], "comedy") for bad in BAD_ITEMS]
LEFT_OUT += [([BAD], [], gold) for gold in ("horror", "Comedy", None, ["comedy"])]


@cases("fault", BAD_FILES)
@cases("place, name", [(0, "dev_questions.json"), (1, "dev_outputs.json")])
def test_a_bad_file_is_one_problem_that_names_it(tmp_path, fault, place, name):
    write(tmp_path, json.loads(FINE))
    (tmp_path / name).unlink()
    if fault == "a folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(BAD_FILES[fault][place])
    with pytest.raises(Problem, match=rf"\A.*{re.escape(str(tmp_path / name))}.*\Z"):
        read(tmp_path)


@cases("bad_records, bad_items, gold", LEFT_OUT)
def test_what_is_bad_is_left_out_and_told(tmp_path, bad_records, bad_items, gold):
    records = [asks("q", [item("a"), *bad_items, item("b")]), *bad_records, asks("r")]
    write(tmp_path, records, {"q": "action", "bad": gold, "r": "action"})
    found, remarks = load(TASKS["lamp2m"], tmp_path)
    assert (ids(found), texts(found[0]), len(remarks)) == ([["q"], ["r"]], ["a", "b"], 1)


def run(output, task, methods, *flags, reply=standin.reply_to):
    """The command line over a model: the model, with what it was asked and what was printed."""
    model, printed = Scripted(reply), StringIO()
    model.model = model.embed_model = "stand-in"
    model.temperature, model.max_tokens, model.texts = 0.1, 1024, []

    def embed(texts):
        model.texts += texts
        return [standin.embed(text) for text in texts]

    model.embed = embed
    flags = ["--task", task, "--method", methods, "--output", output, *flags]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        cached = Cached(model, Cache("none", "memory"))
        patch.setattr("lamp.connect", lambda settings: (cached, Wiki()))
        patch.setattr(Wiki, "look_up", lambda wiki, topic: f"{topic} is a topic.")
        assert cli([str(flag) for flag in flags]) == 0
    model.printed = printed.getvalue()
    model.chats = [[m["content"] for m in call["messages"]] for call in model.calls]
    model.sent = {*model.texts, *map("\n".join, model.chats)}
    return model


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """{method: what it asks for the three queries of the first user of LaMP-2M's sample}"""
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(folder, "lamp2m", name, "--limit", 3, "--seed", 1) for name in METHODS}


PROFILED = {"pag-4", "personaagent", "no-alignment", "no-action"}
PERSONA = {"personaagent", "no-alignment", "no-memory", "no-action"}
ALIGNED, NEUTRAL = {"personaagent", "no-action"}, {"react", "membank", "no-persona"}
SENT = {  # what stands in the chats of which methods, and in those of no other
    "an item of the user's": {"rag-1", "rag-4", "membank", "no-persona"} | PROFILED,
    "an item of another user's": {"icl"},
    "User history, oldest first": PROFILED,
    "User summary: Most frequent answers": PERSONA - {"no-memory"},
    "User summary: nothing is known": {"no-memory"},
    "MUST use at least TWO tools": PERSONA,
    "You are a helpful assistant. Answer": NEUTRAL,
    "What you know of the user: Most frequent": {"membank"},
    "Related memories:\n- 20": {"membank"},
    "Wiki: Use this tool": (PERSONA | NEUTRAL) - {"no-action"},
    "RAG: Retrieve": {"personaagent", "no-alignment", "no-persona"},
    "No tools are available": {"no-action"},
    "meticulous and critical": ALIGNED,
}
# a profile, a turn a tool and one to answer, 5 * 2 + 1 for the bank; alignment's turns and prompts
CALLS = dict(zip(METHODS, (3, 3, 3, 3, 4, 6, 11 + 6, 1 + 12 + 1 + 9, 1 + 9, 9, 6, 1 + 6 + 1 + 3)))


@cases("part", SENT)
def test_requests_hold_what_the_methods_definition_says(asked, part):
    mine, *others = map(texts, read(SAMPLE))
    known = {"an item of the user's": mine, "an item of another user's": sum(others, [])}
    signs = [sign[:60] for sign in known.get(part, [part])]
    found = {name: "\n".join(sum(model.chats, [])) for name, model in asked.items()}
    assert {name for name in found if any(sign in found[name] for sign in signs)} == SENT[part]


@cases("method", METHODS)
def test_a_method_makes_the_calls_of_its_definition_and_says_so_before(asked, method):
    planned = re.search(r"about (\d+) chat calls", asked[method].printed)[1]
    assert len(asked[method].chats) == int(planned) == CALLS[method]


def test_icl_shows_four_answered_questions_of_other_users(asked):
    known = {f"{e.query}\n{e.response}" for user in read(SAMPLE)[1:] for e in user.history}
    for (prompt,) in asked["icl"].chats:
        *examples, own = prompt.split("\n\n")
        assert len(set(examples)) == 4 and set(examples) <= known and own.startswith("Which tag")


@cases("task", TASKS)
def test_rag_asks_and_searches_in_lamps_own_words(tmp_path, task):
    model = run(tmp_path, task, "rag-1,rag-4", "--limit", 1, "--top-k", 2)
    raw = sample(task)[0]
    query = raw["input"]
    words = [LAMPS_WORDS[task].format(**item) for item in raw["profile"]]
    for k, (prompt,) in zip((1, 4), model.chats):
        shown = [text for text in words if text in prompt and text not in query]
        joined = ", and ".join(sorted(shown, key=prompt.index))
        lamp1 = query.replace("title ", f"title, and {joined} ", 1)
        expected = lamp1 if task == "lamp1" else f"{joined}. {query}"
        assert (prompt, len(shown)) == (expected, k)
    titles = " ".join(re.findall(r'\]: "(.*?)"', query))
    assert (titles or query.split(": ")[-1]) in model.texts


@cases("method, calls", [("react", 3), ("membank", 3), ("no-persona", 6)])
def test_only_the_baselines_may_answer_with_a_bare_label_before_any_tool(tmp_path, method, calls):
    replies = ["comedy", "Final Answer: comedy"]
    model = run(tmp_path, "lamp2m", method, "--limit", 3, reply=lambda chat: replies[len(chat) > 2])
    assert sum(chat[0].startswith("You are a helpful") for chat in model.chats) == calls


def test_a_simulated_answer_reads_the_past_only_and_no_copy_of_itself(tmp_path):
    films = ["Film one", "Film two", "Film three", "Film four", "Film five", "FILM two!"]
    write(tmp_path, [asks("Film", [item(film, date=2001 + n) for n, film in enumerate(films)])])
    model = run(tmp_path / "out", "lamp2m", "personaagent", "--data", tmp_path, "--top-k", 50)
    read = {}
    for chat in model.chats:
        if chat[-1].startswith("Observation: - "):
            read[chat[1].split(": ")[-1]] = set(re.findall(r"- .* \| (.*)", chat[-1]))
    past = {"Film four": {*films[:3]}, "Film five": {*films[:4]}, "Film": {*films}}
    assert read == {**past, "FILM two!": {films[0], *films[2:5]}}


def test_two_spellings_of_a_cited_paper_ask_the_same(tmp_path):
    items = [item(text, "lamp1", citation="C") for text in ("A pan. Don't!", "A PAN, DON’T")]
    rivals = [item(f"other {n}", "lamp1", citation=f"rival {n}") for n in range(9)]
    users = read(tmp_path, [asks("Q", items, "lamp1"), asks("R", rivals, "lamp1")], "lamp1")
    one, other = (bare(episode.query) for episode in users[1].history)
    assert one == other and "rival" in one


TEXT = "The baker's café sells bread & rolls. Really fine!"
PAIRS = [("&", "&amp;"), ("'", "’"), (".", ""), (". ", ".<br />"), (" ", "\u00a0\n "), ("fi", "ﬁ")]
PAIRS += [("ak", "a\u00adk"), ("ea", "e\u200b\u2060a"), ("é", "e\u0301")]  # soft, no width, NFD
SPELLINGS = [TEXT, TEXT.upper(), *(TEXT.replace(*pair) for pair in PAIRS)]
SPELLINGS += ["".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in TEXT)]


@cases("spelling", SPELLINGS)
@cases("task", TASKS)
def test_an_item_with_an_evaluated_text_in_any_spelling_is_taken_out(tmp_path, task, spelling):
    others = [item("before", task), item("after", task)]
    for text, copy in ((TEXT, spelling), (spelling, TEXT)):
        late = {**asks(text, others, task, user_id=1), "id": "q"}
        held = {**late, "profile": [item(copy, task), *others]}
        write(tmp_path / "b", [asks(copy, (), task, user_id=1)], None, task, "train")
        found = read(tmp_path / "a", [held], task) + read(tmp_path / "b", [late], task)
        assert [(len(user.history), user.leaks) for user in found] == [(2, 1)] * 2


@cases("task, label", [("lamp1", "citation"), ("lamp2m", "tag")])
def test_what_would_give_an_answer_away_reaches_no_request(tmp_path, task, label):
    copies = [item(text, task, **{label: "secret"}) for text in SPELLINGS]
    own, their = ([item(f"{who} {n}", task) for n in range(5)] for who in ("own", "their"))
    profile = [*copies, item("other", task, **{label: "secret", "id": "q"}), *own]
    mine = {**asks(TEXT, profile, task, user_id=1), "id": "q"}
    write(tmp_path, [mine, asks("else", copies + their, task, user_id=2)], task=task)
    model = run(tmp_path / "out", task, "all", "--data", tmp_path, "--limit", 1)
    sent = "".join(model.sent)
    assert "own 3" in sent and "their" in sent and "secret" not in sent
    assert "13 items removed" in model.printed


@cases("task", TASKS)
def test_no_request_depends_on_the_gold_of_an_evaluated_query(tmp_path, task):
    sent = []
    for gold in TASKS[task].labels[:2]:
        data = tmp_path / gold
        write(data, sample(task), {record["id"]: gold for record in sample(task)}, task)
        sent.append(run(data / "out", task, "all", "--data", data, "--limit", 2).sent)
    assert sent[0] == sent[1] and len(sent[0]) > 100


def test_a_drawn_negative_is_another_users_and_no_option_of_an_evaluated_query(tmp_path):
    cited = {"A": ["one"], "B": ["ONE.", "yes  ‘a’"], "C": ["three"]}
    rivals = {"A": {"three"}, "B": {"three"}, "C": {"one", "ONE."}}
    records = []
    for name, titles in cited.items():
        profile = [item(f"on {title}", "lamp1", citation=title) for title in titles]
        records.append(asks(name, profile, "lamp1", user_id=name))
    for seed in range(9):
        for user in read(tmp_path, records, "lamp1", seed=seed):
            for episode in user.history:
                options = TASKS["lamp1"].titles(episode.query)
                assert options.pop(episode.response) in cited[user.id]
                assert rivals[user.id].issuperset(options.values())


def test_the_seed_draws_the_negatives_and_nothing_else():
    first, same, other = (read(SAMPLE, task="lamp1", seed=seed)[0].history for seed in (0, 0, 1))
    assert first == same != other and {e.response for e in first} == {"[1]", "[2]"}
    assert [e.text for e in first] == [e.text for e in other]


TITLES = json.loads((SAMPLE.parent / "tables/answers.json").read_text(encoding="utf-8"))["titles"]
TITLES += [["A", "A B", "A B.", "[2]"], ["A B", "A", "A B.", "[1]"], ["C", "D", "C, D.", None]]


@cases("one, two, text, expected", TITLES)
def test_a_lamp1_answer_may_name_just_one_of_the_two_titles(one, two, text, expected):
    asked = INPUTS["lamp1"].replace("Yes OWN", one).replace("No OWN", two)
    assert read_answer(TASKS["lamp1"], asked, text) == expected
