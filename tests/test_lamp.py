"""LaMP's data in every layout, the methods' messages, and the command line end to end over the stand-in server."""
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import lamp
from lamp import METHODS, SAMPLE, TASKS, Folder, Problem, Setup, answer_query, cli, load, rag_prompt
from memory import EpisodicMemory, summarize
from metrics import read_lines, score
from persona_agent import PersonaAgent
from tests import standin
from tools import RAG, Tool

SECRET = ("dystopia", "psychology", "fantasy")  # labels that stand in none of the made-up questions
ALL = ",".join(METHODS)
MOVIE = ("Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
         "explanation. tags: [comedy, action] description: ")
REVIEW = ("What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without further "
          "explanation. review: ")
PAPER = ('For an author who has written the paper with the title "{}", which reference is related? Just answer with [1] or [2] '
         'without explanation. [1]: "{}" [2]: "{}"')


def movie(n, tag="action", **more):
    return {"id": f"i{n}", "description": f"film number {n}", "tag": tag, **more}


def write(folder, questions, gold, split="dev", task="LaMP_2"):
    """An official partition: questions file and outputs file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_questions.json").write_text(json.dumps(questions))
    (folder / f"{split}_outputs.json").write_text(json.dumps(
        {"task": task, "golds": [{"id": k, "output": v} for k, v in gold.items()]}))
    return folder


def question(id, profile, user=None, text=None):
    return {"id": id, "input": MOVIE + (text or f"query {id}"), "profile": profile, **({"user_id": user} if user else {})}


class Recorder(standin.Handler):
    """The stand-in, keeping every body it is sent in `server.bodies`; `server.fail(body)` may name a status to fail with."""

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw)
        self.server.bodies.append((self.path, body))
        status = self.server.fail(body)
        if status:
            return self.send({"error": {"message": "no such luck", "type": "invalid_request_error"}}, status)
        self.answer(body)

    def do_GET(self):
        self.server.bodies.append((self.path, None))
        super().do_GET()


@pytest.fixture
def server():
    running = standin.start(handler=Recorder)
    running.bodies, running.fail = [], lambda body: None
    running.flags = ["--base-url", f"http://127.0.0.1:{running.server_port}/v1", "--model", "m", "--embed-model", "e",
                     "--wiki-base-url", f"http://127.0.0.1:{running.server_port}"]
    yield running
    running.shutdown()


def chats(server):
    return [body for path, body in server.bodies if path.endswith("/chat/completions")]


def results(root, method="personaagent"):
    file, = Path(root).glob(f"*/{method}*/results.json")
    return json.loads(file.read_text())


# ---------------------------------------------------------------------------------------------------- data

@pytest.mark.parametrize("task", TASKS)
def test_sample_loads_whole(task):
    users, remarks = load(TASKS[task], SAMPLE)
    assert [len(u.queries) for u in users] == [3] * 6 and remarks == []
    assert all(len(u.history) == 20 and all(e.response in TASKS[task].labels for e in u.history) for u in users)


def test_history_item_becomes_the_question_the_agent_would_get():
    users, _ = load(TASKS["lamp2m"], SAMPLE)
    episode = users[0].history[0]
    assert TASKS["lamp2m"].match(episode.query)["key"] in episode.text
    assert episode.query.startswith("Which tag does this movie relate to")
    assert re.match(rf"\d{{4}}-\d\d-\d\d \| tag: {episode.response} \| ", episode.text)


def test_users_with_the_longest_history_come_first(tmp_path):
    write(tmp_path, [question(f"q{n}", [movie(i) for i in range(n)], user=n) for n in (2, 5, 3)], dict.fromkeys(["q2", "q5", "q3"], "action"))
    assert [u.id for u in load(TASKS["lamp2m"], tmp_path, users=2)[0]] == ["5", "3"]


def test_latest_queries_by_newest_profile_date_then_length(tmp_path):
    days = {"a": "2012-01-09", "b": "2011-12-30", "c": "2012-01-10", "d": "2012-01-10"}
    asked = [question(k, [movie(1, date=day)] + [movie(2, date="2000-01-01")] * (k == "d"), user=7) for k, day in days.items()]
    write(tmp_path, asked, dict.fromkeys(days, "action"))
    user, = load(TASKS["lamp2m"], tmp_path)[0]
    assert [q.id for q in user.queries] == ["a", "c", "d"]
    assert [q.id for q in load(TASKS["lamp2m"], tmp_path, queries_per_user=1)[0][0].queries] == ["d"]


@pytest.mark.parametrize("dates, order", [
    (["2012-03-06", "2011-12-01", "2012-03-05"], ["i1", "i2", "i0"]), ([2010, 2002, 2005], ["i1", "i2", "i0"]),
    ([None, None, None], ["i0", "i1", "i2"])])
def test_history_is_in_date_order_or_file_order(tmp_path, dates, order):
    write(tmp_path, [question("q", [movie(i, date=d) for i, d in enumerate(dates)])], {"q": "action"})
    assert [e.metadata["id"] for e in load(TASKS["lamp2m"], tmp_path)[0][0].history] == order


def test_max_history_keeps_the_newest(tmp_path):
    write(tmp_path, [question("q", [movie(i) for i in range(5)])], {"q": "action"})
    assert [e.metadata["id"] for e in load(TASKS["lamp2m"], tmp_path, max_history=2)[0][0].history] == ["i3", "i4"]


def test_limit_counts_queries_over_all_users(tmp_path):
    write(tmp_path, [question(f"q{u}{n}", [movie(1)], user=u) for u in (1, 2) for n in range(3)],
          {f"q{u}{n}": "action" for u in (1, 2) for n in range(3)})
    assert [len(u.queries) for u in load(TASKS["lamp2m"], tmp_path, limit=4)[0]] == [3, 1]


def test_item_with_the_text_or_id_of_an_evaluated_query_is_removed_and_counted(tmp_path):
    profile = [movie(1), movie(2, description="Query  Q"), {**movie(3), "id": "q"}, movie(4)]
    write(tmp_path, [question("q", profile)], {"q": "action"})
    user, = load(TASKS["lamp2m"], tmp_path)[0]
    assert [e.metadata["id"] for e in user.history] == ["i1", "i4"] and user.leaks == 2


def test_own_paper_is_removed_from_a_lamp1_history(tmp_path):
    items = [{"id": str(n), "title": t, "abstract": "a", "citation": f"cited {t}"} for n, t in enumerate(["Mine", "Other"])]
    write(tmp_path, [{"id": "q", "input": PAPER.format("Mine", "cited Mine", "x"), "profile": items}], {"q": "[1]"}, task="LaMP_1")
    user, = load(TASKS["lamp1"], tmp_path)[0]
    assert [e.metadata["id"] for e in user.history] == ["1"] and user.leaks == 1


def test_drawn_negative_is_another_users_and_never_offered_by_an_evaluated_query():
    users, _ = load(TASKS["lamp1"], SAMPLE)
    raw = json.loads((SAMPLE / "time/LaMP_1/dev/dev_questions.json").read_text())
    owners = {}
    for record in raw:
        for item in record["profile"]:
            owners.setdefault(item["citation"], set()).add(str(record["user_id"]))
    for user in users:
        offered = {TASKS["lamp1"].match(q.input)[g] for q in user.queries for g in "ab"}
        for episode in user.history:
            options = TASKS["lamp1"].match(episode.query)
            right, drawn = (options["a"], options["b"]) if episode.response == "[1]" else (options["b"], options["a"])
            assert user.id in owners[right] and user.id not in owners[drawn] and drawn not in offered


def test_seed_changes_the_drawn_negatives_and_nothing_else():
    first, same, other = (load(TASKS["lamp1"], SAMPLE, seed=s)[0][0].history for s in (0, 0, 1))
    assert [e.query for e in first] == [e.query for e in same] != [e.query for e in other]
    assert [e.text for e in first] == [e.text for e in other]
    assert len({e.response for e in first}) == 2


def test_lamp1_without_citations_is_unlabelled_but_remembered(tmp_path):
    items = [{"id": "1", "title": "T", "abstract": "about graphs", "date": 2003}]
    write(tmp_path, [{"id": "q", "input": PAPER.format("Mine", "a", "b"), "profile": items}], {"q": "[1]"}, task="LaMP_1")
    episode, = load(TASKS["lamp1"], tmp_path)[0][0].history
    assert (episode.response, episode.text) == ("", "2003 | T | about graphs")


def test_earlier_lamp1_queries_are_labelled_history(tmp_path):
    asked = [{"id": k, "input": PAPER.format(f"Paper {k}", f"yes {k}", f"no {k}"), "user_id": 1,
              "profile": [{"id": "1", "title": "T", "abstract": "x", "date": year}]} for k, year in (("a", 2001), ("b", 2002))]
    write(tmp_path / "train", asked[:1], {"a": "[1]"}, "train", "LaMP_1")
    write(tmp_path / "dev", asked[1:], {"b": "[2]"}, "dev", "LaMP_1")
    user, = load(TASKS["lamp1"], tmp_path)[0]
    assert [q.id for q in user.queries] == ["b"]
    assert [(e.query, e.response) for e in user.history if e.response] == [(asked[0]["input"], "[1]")]
    assert user.history[0].text == "2001 | citation: yes a | Paper a"


def test_oppu_layout_splits_queries_into_history_and_evaluation(tmp_path):
    record = {"user_id": "u", "profile": [{"id": "0", "text": "good", "score": "4"}],
              "query": [{"id": f"q{n}", "input": REVIEW + f"text {n}", "gold": str(n)} for n in range(1, 6)]}
    (tmp_path / "user_top_100_history.json").write_text(json.dumps([record]))
    for data in (tmp_path, tmp_path / "user_top_100_history.json"):
        user, = load(TASKS["lamp3"], data)[0]
        assert [(q.id, q.gold) for q in user.queries] == [("q3", "3"), ("q4", "4"), ("q5", "5")]
        assert [e.response for e in user.history] == ["4", "1", "2"]


def test_score_of_a_long_review_is_still_seen_where_the_review_is_cut(tmp_path, scripted, embed):
    items = [{"id": str(n), "text": "long " * 400, "score": str(n)} for n in range(1, 5)]
    (tmp_path / "history.json").write_text(json.dumps([{"user_id": "u", "profile": items, "query": [
        {"id": "q", "input": REVIEW + "short", "gold": "3"}]}]))
    history, llm = load(TASKS["lamp3"], tmp_path)[0][0].history, scripted(["a profile"])
    memory = EpisodicMemory(embed)
    memory.add(history)
    summarize(llm, history, "")
    for shown in (RAG(memory, 4)("long"), llm.calls[0]["messages"][0]["content"]):
        assert all(f"score: {n} | long" in shown for n in range(1, 5))


def test_user_split_takes_each_record_for_a_user(tmp_path):
    write(tmp_path / "LaMP_2/new/dev", [question("a", [movie(1)]), question("b", [movie(2)])], {"a": "action", "b": "comedy"})
    assert [len(u.queries) for u in load(TASKS["lamp2m"], tmp_path)[0]] == [1, 1]


def test_time_split_is_preferred_and_the_last_partition_with_gold_evaluated(tmp_path):
    write(tmp_path / "LaMP_2/new/dev", [question("user-split", [movie(1)])], {"user-split": "action"})
    write(tmp_path / "time/LaMP_2/new/train", [question("early", [movie(1, date="2001-01-01")], 5)], {"early": "action"}, "train")
    write(tmp_path / "time/LaMP_2/new/dev", [question("late", [movie(1, date="2001-01-01")], 5)], {"late": "action"})
    user, = load(TASKS["lamp2m"], tmp_path)[0]
    assert [q.id for q in user.queries] == ["late"]
    assert [e.metadata["id"] for e in user.history] == ["i1", "early"]


def test_malformed_record_is_told_and_does_not_stop_the_good_ones(tmp_path):
    bad = {"id": "110", "input": "x Overwhelmed by her schedule", "profile": []}
    write(tmp_path, [bad, question("q", [movie(1)])], {"110": "comedy", "q": "action"})
    users, remarks = load(TASKS["lamp2m"], tmp_path)
    assert [q.id for u in users for q in u.queries] == ["q"]
    assert len(remarks) == 1 and "record 110" in remarks[0] and "not a lamp2m question" in remarks[0]


def test_item_without_its_fields_is_told_and_left_out(tmp_path):
    write(tmp_path, [question("q", [{"id": "1", "description": "no tag"}, movie(2), "text"])], {"q": "action"})
    users, remarks = load(TASKS["lamp2m"], tmp_path)
    assert len(users[0].history) == 1 and "no usable tag" in remarks[0] and len(remarks) == 2


@pytest.mark.parametrize("user", [None, "", "missing"])
def test_records_without_a_user_id_are_users_of_their_own(tmp_path, user):
    asked = [question(k, [movie(1)]) | ({} if user == "missing" else {"user_id": user}) for k in "ab"]
    write(tmp_path, asked, {"a": "action", "b": "comedy"})
    assert [len(u.queries) for u in load(TASKS["lamp2m"], tmp_path)[0]] == [1, 1]


def test_query_id_that_occurs_twice_is_refused(tmp_path):
    write(tmp_path, [question("q", [movie(1)], user) for user in (1, 2)], {"q": "action"})
    with pytest.raises(Problem, match="query id 'q' occurs more than once"):
        load(TASKS["lamp2m"], tmp_path)


@pytest.mark.parametrize("gold, kept", [("horror", False), ("Action", False), (None, False), (["action"], False), (" action ", True)])
def test_gold_that_is_no_label_is_told_and_left_out(tmp_path, gold, kept):
    write(tmp_path, [question("q", [movie(1)]), question("fine", [movie(1)])], {"q": gold, "fine": "action"})
    users, remarks = load(TASKS["lamp2m"], tmp_path)
    assert ("q" in [q.id for u in users for q in u.queries], bool(remarks)) == (kept, not kept)


def test_options_that_are_no_labels_are_told_but_not_their_order(tmp_path):
    write(tmp_path, [question("q", [movie(1)])], {"q": "action"})
    assert not load(TASKS["lamp2m"], tmp_path)[1]
    file = next(tmp_path.rglob("*_questions.json"))
    file.write_text(file.read_text().replace("[comedy, action]", "[horror, comedy, drama]"))
    assert load(TASKS["lamp2m"], tmp_path)[1] == ["the questions offer options that are no labels of lamp2m: drama, horror"]


def test_score_given_as_a_number_is_a_label(tmp_path):
    (tmp_path / "history.json").write_text(json.dumps([{"user_id": 1, "profile": [{"text": "t", "score": 4.0}], "query": [
        {"id": 7, "input": REVIEW + "x", "gold": 4.0}]}]))
    user, = load(TASKS["lamp3"], tmp_path)[0]
    assert (user.queries[0].gold, user.history[0].response) == ("4", "4")


def test_equal_titles_in_other_spelling_are_never_drawn_against_each_other(tmp_path):
    asked = [{"id": f"q{u}", "user_id": u, "input": PAPER.format(f"Mine {u}", "Deep  Learning", "b"), "profile": [
        {"id": "1", "title": f"T{u}", "abstract": "", "citation": c}]} for u, c in ((1, "own"), (2, "deep learning"), (3, "OWN"), (4, "x"))]
    write(tmp_path, asked, {f"q{u}": "[1]" for u in (1, 2, 3, 4)}, task="LaMP_1")
    users = {u.id: u.history[0].query for u in load(TASKS["lamp1"], tmp_path)[0]}
    assert '"x"' in users["1"] and '"x"' in users["3"] and not any("deep learning" in q for i, q in users.items() if i != "2")


def test_quotes_inside_titles_do_not_break_lamp1():
    match = TASKS["lamp1"].match(PAPER.format('The "right" way', 'On "what"', 'It is "so" [2]: not'))
    assert match["key"] == 'The "right" way' and match["a"] == 'On "what"'


@pytest.mark.parametrize("answer, label", [
    ("The reference is \"Sea  birds\".", "[2]"), ("[1]", "[1]"), ("It is about rain and forests or sea birds.", None),
    ("\"Rain and forests\" is related to it.", "[1]"), ("Subsea birdsong", None), ("It is not \"Sea birds\".", None), ("A paper on whales.", None)])
def test_lamp1_answer_may_name_one_of_the_two_titles(answer, label):
    assert lamp.read_answer(TASKS["lamp1"], PAPER.format("Mine", "Rain and forests", "Sea birds"), answer) == label


def test_lamp1_title_with_a_no_of_its_own_is_no_denial():
    asked = PAPER.format("Mine", "No free lunch theorems", "Graphs")
    answers = ["It cites No free lunch theorems.", "Not No free lunch theorems.", "paragraphs on something"]
    assert [lamp.read_answer(TASKS["lamp1"], asked, a) for a in answers] == ["[1]", None, None]


def test_record_whose_id_holds_a_colon_is_told_and_left_out(tmp_path):
    write(tmp_path, [question("u:1", None), question("q", [movie(1)])], {"u:1": "action", "q": "action"})
    users, remarks = load(TASKS["lamp2m"], tmp_path)
    assert len(users) == 1 and "record u:1: no 'profile' list" in remarks[0]


def test_large_file_is_read_in_pieces(tmp_path):
    many = [{"id": str(n), "text": "é😀x" * 1700} for n in range(700)]
    (tmp_path / "many.json").write_text("\ufeff \n" + json.dumps(many, indent=1, ensure_ascii=False), encoding="utf-8")
    found = list(lamp.records(tmp_path / "many.json"))
    assert [record for _, _, record in found] == many and [n for n, _, _ in found] == list(range(700))
    some = {n: span for n, span, _ in found if n % 97 == 5}
    assert [(n, r["id"]) for n, _, r in lamp.records(tmp_path / "many.json", some)] == [(n, str(n)) for n in some]


# ---------------------------------------------------------------------------------------------------- methods

def first_prompt(task, embed):
    user = load(TASKS[task], SAMPLE)[0][0]
    memory = EpisodicMemory(embed)
    memory.add(user.history[:2])
    return rag_prompt(TASKS[task], user.queries[0].input, memory, 2), user.queries[0].input


@pytest.mark.parametrize("task, start", [
    ("lamp2m", r'the tag for the movie: ".*?" is "[\w -]+" , and the tag for the movie: ".*?" is "[\w -]+" \. Which tag does'),
    ("lamp2n", r'the category for the article: ".*?" is "[\w& ]+" , and the category for the article: ".*?" is "[\w& ]+" \. Which c'),
    ("lamp3", r'[1-5] is the score for ".*?" , and [1-5] is the score for ".*?" \. What is the score'),
    ("lamp1", r'For an author who has written the paper with the title, and "[^"]+", and "[^"]+" "[^"]+", which reference')])
def test_rag_prompt_is_lamps_own_construction(task, start, embed):
    prompt, text = first_prompt(task, embed)
    assert re.match(start, prompt, re.S)
    assert prompt.endswith(text if task != "lamp1" else text.split(" the title ")[1])


AGENTS = {"react", "membank", "personaagent", "no-alignment", "no-persona", "no-memory", "no-action"}
PERSONA = {"personaagent", "no-alignment", "no-memory", "no-action"}
SENT = {  # what stands in the requests of which methods, and in those of no other
    "the user's items": {"rag-1", "rag-4", "pag-4", "membank", "personaagent", "no-alignment", "no-persona", "no-action"},
    "other users' items": {"icl"},
    "User history, oldest first": {"pag-4", "personaagent", "no-alignment", "no-action"},
    "Most frequent answers": {"pag-4", "membank", "personaagent", "no-alignment", "no-action"},  # the stand-in's profile
    "MUST use at least TWO tools": PERSONA, "You are a helpful assistant. Answer": {"react", "membank", "no-persona"},
    "What you know of the user: ": {"membank"}, "Summarize these interactions": {"membank"}, "Merge these desc": {"membank"},
    "User summary: nothing is known": {"no-memory"},
    "Wiki: Use this tool": AGENTS - {"no-action"}, "RAG: Retrieve": {"personaagent", "no-alignment", "no-persona"},
    "No tools are available": {"no-action"}, "meticulous and critical": {"personaagent", "no-action"},
    "prompt engineering assistant": {"personaagent", "no-action"}, "Final Answer": AGENTS}


@pytest.fixture(scope="module")
def requests_by_method(tmp_path_factory):
    """{method: every message list that it sends for the three queries of the sample's first user}."""
    sent = {}
    for method in METHODS:
        running = standin.start(handler=Recorder)
        running.bodies, running.fail = [], lambda body: None
        root = f"http://127.0.0.1:{running.server_port}"
        assert cli(["--task", "lamp2m", "--method", method, "--limit", "3", "--model", "m", "--embed-model", "e", "--base-url",
                    root + "/v1", "--wiki-base-url", root, "--output", str(tmp_path_factory.mktemp("runs"))]) == 0
        sent[method] = [json.dumps(body["messages"]) for body in chats(running)][1:]
        running.shutdown()
    return sent


@pytest.mark.parametrize("part", SENT)
def test_requests_hold_what_the_methods_definition_says(requests_by_method, part):
    first, *others = load(TASKS["lamp2m"], SAMPLE)[0]
    known = {"the user's items": [e.metadata["example"][25:60] for e in first.history],
             "other users' items": [e.metadata["example"][25:60] for u in others for e in u.history]}
    signs = [json.dumps(sign)[1:-1] for sign in known.get(part, [part])]
    assert {m for m, sent in requests_by_method.items() if any(sign in text for text in sent for sign in signs)} == SENT[part]


@pytest.mark.parametrize("method, calls", [("prompt", 3), ("icl", 3), ("rag-1", 3), ("rag-4", 3), ("pag-4", 4)])
def test_direct_method_makes_one_call_a_query(requests_by_method, method, calls):
    assert len(requests_by_method[method]) == calls


@pytest.mark.parametrize("method, examples", [("rag-1", 1), ("rag-4", 4), ("pag-4", 4)])
def test_retrieval_baseline_shows_its_own_number_of_items(requests_by_method, method, examples):
    assert {t.count("the tag for the movie:") for t in requests_by_method[method] if "oldest first" not in t} == {examples}


@pytest.mark.parametrize("method, calls", [("react", 1), ("no-persona", 2), ("no-alignment", 2), ("no-memory", 2)])
def test_only_a_baseline_may_answer_with_a_bare_label_before_any_tool(scripted, method, calls):
    user = load(TASKS["lamp2m"], SAMPLE)[0][0]
    agent = PersonaAgent(scripted(["comedy", "Final Answer: comedy"]), None, "", [Tool("Wiki", "", str)])
    row = answer_query(Setup(TASKS["lamp2m"], METHODS[method], agent.llm, None, {}, {}), agent, user, user.queries[0])
    assert (row["prediction"], len(agent.llm.calls)) == ("comedy", calls)


def test_membank_asks_eleven_times_for_a_user_and_never_again(server, tmp_path):
    command = ["--task", "lamp2m", "--method", "membank", "--limit", "3", "--output", str(tmp_path), *server.flags]
    for made in (11, 0):
        server.bodies.clear()
        assert cli(command) == 0
        file, = tmp_path.glob("*/*/predictions.jsonl")
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))  # two queries are left to answer
        asked = [m["content"] for b in chats(server) for m in b["messages"][:1]]
        assert sum(text.startswith(("Summarize these", "Describe the pers", "Merge these")) for text in asked) == made
        assert sum("Related memories:\n- 20" in text for text in asked) >= 4


def test_icl_shows_four_answered_questions_before_the_users_own(requests_by_method):
    assert {text.count("Which tag does this movie relate to") for text in requests_by_method["icl"]} == {5}


def test_icl_never_shows_an_evaluated_query_of_this_user(tmp_path, server):
    twin = [movie(n, description="query q") for n in range(3)] + [movie(9)]
    write(tmp_path, [question("q", [movie(1)], 1), question("other", twin, 2)], {"q": "comedy", "other": "action"})
    cli(["--task", "lamp2m", "--method", "icl", "--data", str(tmp_path), "--output", str(tmp_path / "out"), *server.flags])
    text, = [b["messages"][0]["content"] for b in chats(server) if b["messages"][0]["content"].endswith("query q")]
    assert text.count("query q") == 1 and "film number 9" in text


def test_alignment_makes_one_gradient_per_interaction_and_one_update(requests_by_method):
    counts = Counter("meticulous" in t and "gradient" or "prompt engineering" in t and "update" for t in requests_by_method["personaagent"])
    assert (counts["gradient"], counts["update"]) == (3, 1)


def test_gold_of_an_evaluated_query_is_never_sent(server, tmp_path):
    write(tmp_path, [question(f"q{n}", [movie(i) for i in range(4)], 1) for n in range(3)], dict(zip(("q0", "q1", "q2"), SECRET)))
    assert cli(["--task", "lamp2m", "--data", str(tmp_path), "--method", ALL, "--output", str(tmp_path / "out"), *server.flags]) == 0
    assert len(server.bodies) > 30 and not [b for b in server.bodies if any(s in json.dumps(b) for s in SECRET)]


# ---------------------------------------------------------------------------------------------------- runs

@pytest.mark.parametrize("task", TASKS)
def test_first_command_runs_whole_and_says_that_no_model_was_involved(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key that must not be used")
    assert cli(["--task", task, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out.strip()
    assert out.startswith("NO LANGUAGE MODEL") and out.split("\n")[-2].startswith("NO LANGUAGE MODEL")
    found = results(tmp_path)
    assert found["complete"] and found["stand_in"] and found["metrics"]["n"] == 18 and found["errors"] == found["unparsed"] == 0
    assert found["users"]["aligned"] == found["users"]["updated"] == 6 and found["answers_with_two_tools"] == 18
    assert all(name in out for name in score([], [], TASKS[task].labels))


def test_run_folder_holds_every_output(tmp_path):
    cli(["--task", "lamp3", "--output", str(tmp_path)])
    folder = tmp_path / "lamp3/personaagent"
    row, person = read_lines(folder / "predictions.jsonl")[0], read_lines(folder / "personas.jsonl")[0]
    assert set(row) == {"user_id", "id", "question", "gold", "prediction", "text", "status", "steps", "usage", "seconds"}
    assert {"profile", "initial", "final", "iterations"} <= set(person) and len(read_lines(folder / "personas.jsonl")) == 6
    predicted, gold = (json.loads((folder / f).read_text()) for f in ("lamp.json", "gold.json"))
    assert predicted["task"] == gold["task"] == "LaMP_3"
    assert [g["id"] for g in predicted["golds"]] == [g["id"] for g in gold["golds"]] and len(gold["golds"]) == 18
    assert {"command", "commit", "time"} <= set(results(tmp_path)["provenance"])


def test_official_scorers_result_on_lamp_json_is_the_reported_metric(tmp_path):
    cli(["--task", "lamp3", "--output", str(tmp_path)])
    predicted, gold = (json.loads((tmp_path / "lamp3/personaagent" / f).read_text()) for f in ("lamp.json", "gold.json"))
    errors = [abs(float(p["output"]) - float(g["output"])) for p, g in zip(predicted["golds"], gold["golds"])]
    assert results(tmp_path)["metrics"]["MAE"] == pytest.approx(sum(errors) / 18, abs=1e-12)


def test_same_command_again_calls_nothing_and_keeps_everything(server, tmp_path):
    command = ["--task", "lamp1", "--limit", "6", "--output", str(tmp_path), *server.flags]
    cli(command)
    before = results(tmp_path)["metrics"]
    server.bodies.clear()
    assert cli(command) == 0
    assert len(chats(server)) == 1 and results(tmp_path)["metrics"] == before  # the one call that tries the server


def test_run_cut_off_in_the_middle_goes_on_without_a_second_alignment(server, tmp_path):
    command = ["--task", "lamp1", "--limit", "6", "--output", str(tmp_path), *server.flags]
    cli(command)
    file, = tmp_path.glob("*/*/predictions.jsonl")
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:2]) + whole[2][:40])
    server.bodies.clear()
    assert cli(command) == 0
    assert sorted(json.loads(line)["id"] for line in file.read_text().splitlines()) == sorted(json.loads(r)["id"] for r in whole)
    assert not any("meticulous" in json.dumps(body) for body in chats(server))


def test_folder_in_use_by_another_run_is_refused(tmp_path, capsys):
    command = ["--task", "lamp2m", "--method", "prompt", "--limit", "1", "--output", str(tmp_path)]
    held = Folder(tmp_path / "lamp2m/prompt-limit=1", {})
    (held.path / "results.json").unlink(missing_ok=True)
    assert cli(command) == 2 and "is in use by another run" in capsys.readouterr().err
    held.held.close()
    assert cli(command) == 0


def test_profile_of_an_earlier_start_serves_a_method_that_comes_later(server, tmp_path):
    command = ["--task", "lamp2m", "--limit", "3", "--output", str(tmp_path), *server.flags, "--method"]
    cli([*command, "no-alignment"])
    server.bodies.clear()
    cli([*command, "no-alignment,personaagent"])
    assert not any("User history, oldest first" in json.dumps(body) for body in chats(server))
    assert results(tmp_path)["usage"]["profile"]["calls"] == 1


def test_membank_takes_earlier_queries_with_dates(tmp_path):
    asked = [question(f"q{n}", [movie(1, date="2011-03-06")], user=1) for n in range(5)]
    write(tmp_path, asked, {f"q{n}": "action" for n in range(5)})
    assert cli(["--task", "lamp2m", "--method", "membank", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert load(TASKS["lamp2m"], tmp_path)[0][0].history[1].metadata["date"] == "2011-03-06"


def test_failure_of_one_user_is_counted_left_out_and_tried_again(server, tmp_path, capsys):
    text = load(TASKS["lamp2m"], SAMPLE)[0][1].queries[0].input
    server.fail = lambda body: 400 if text in json.dumps(body.get("messages", "")) else None
    command = ["--task", "lamp2m", "--method", "prompt", "--output", str(tmp_path), *server.flags]
    assert cli(command) == 1
    found = results(tmp_path, "prompt")
    assert (found["errors"], found["metrics"]["n"]) == (1, 17) and "1 QUERIES FAILED" in capsys.readouterr().out
    server.fail = lambda body: None
    assert cli(command) == 0 and results(tmp_path, "prompt")["metrics"]["n"] == 18


def test_failure_in_alignment_is_recorded_for_the_users_queries(server, tmp_path):
    server.fail = lambda body: 400 if "prompt engineering" in json.dumps(body.get("messages", "")) else None
    assert cli(["--task", "lamp2m", "--limit", "3", "--output", str(tmp_path), *server.flags]) == 1
    assert results(tmp_path)["errors"] == 3 and results(tmp_path)["metrics"]["n"] == 0


def test_profile_too_long_for_the_model_is_the_methods_own_failure(server, tmp_path):
    server.fail = lambda body: 413 if "oldest first" in json.dumps(body.get("messages", "")) else None
    assert cli(["--task", "lamp2m", "--limit", "3", "--output", str(tmp_path), *server.flags]) == 0
    found = results(tmp_path)
    assert (found["metrics"]["n"], found["metrics"]["right"], found["status"]["overflow"], found["errors"]) == (3, 0, 3, 0)


def test_lone_surrogates_in_the_data_break_nothing(tmp_path):
    write(tmp_path, [question("q", [movie(1, description="cut \ud83d"), movie(2)], text="film \ude00")], {"q": "action"})
    assert cli(["--task", "lamp2m", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out")["metrics"]["n"] == 1


@pytest.mark.parametrize("file, text", [("predictions.jsonl", '{"id": 1\n{}\n'), ("results.json", "[]"), ("results.json", "{")])
def test_damaged_run_folder_is_refused_in_one_line(tmp_path, capsys, file, text):
    command = ["--task", "lamp2m", "--limit", "1", "--method", "prompt", "--output", str(tmp_path)]
    cli(command)
    (tmp_path / "lamp2m/prompt-limit=1" / file).write_text(text)
    assert cli(command) in (1, 2) and capsys.readouterr().err.count("\n") == 1


def test_unreachable_wikipedia_is_counted_and_said_loudly(server, tmp_path, capsys):
    flags = server.flags[:-1] + ["http://127.0.0.1:9"]
    lamp.tools.time.sleep, slept = lambda s: None, lamp.tools.time.sleep
    try:
        assert cli(["--task", "lamp2m", "--limit", "3", "--output", str(tmp_path), *flags]) == 0
    finally:
        lamp.tools.time.sleep = slept
    assert results(tmp_path)["failed_wiki_calls"] == 6 and "WIKIPEDIA WAS NOT REACHED: 6" in capsys.readouterr().out


def test_show_tells_one_query_as_a_story(tmp_path, capsys):
    cli(["--task", "lamp2m", "--limit", "3", "--output", str(tmp_path)])
    query = load(TASKS["lamp2m"], SAMPLE)[0][0].queries[0]
    capsys.readouterr()
    assert not cli(["--show", query.id, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    for part in ("--- profile", "--- persona, initial", "--- iteration 1, simulated", "--- feedback", "--- persona after iteration 1",
                 query.input, "Thought: ", "Action: RAG", "Observation: - ", f"the user's: {query.gold!r}, ", " calls, "):
        assert part in out


def test_show_tells_the_methods_that_are_named_or_all(tmp_path, capsys):
    cli(["--task", "lamp2m", "--method", "prompt,rag-4", "--limit", "1", "--output", str(tmp_path)])
    query = load(TASKS["lamp2m"], SAMPLE)[0][0].queries[0]
    for chosen, told in (([], ["prompt", "rag-4"]), (["--method", "rag-4"], ["rag-4"])):
        capsys.readouterr()
        assert not cli(["--show", query.id, "--output", str(tmp_path), *chosen])
        assert re.findall(r"=== .*/(.*)-limit=1: query", capsys.readouterr().out) == told
    assert cli(["--show", "nobody", "--output", str(tmp_path)]) == 2 and "no query 'nobody' in the 2 runs" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- report

def test_report_keeps_runs_over_other_queries_apart(tmp_path, capsys):
    for limit in ("3", "9"):
        cli(["--task", "lamp2m", "--method", "prompt", "--limit", limit, "--output", str(tmp_path)])
    capsys.readouterr()
    cli(["--report", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("###") == 2 and "limit 3, NO" in out and "limit 9, NO" in out and "None" not in out


def test_report_has_a_row_per_run_with_paired_differences_and_costs(tmp_path, capsys):
    for task in ("lamp1", "lamp3"):
        cli(["--task", task, "--method", "prompt,rag-4,no-alignment", "--output", str(tmp_path)])
    capsys.readouterr()
    assert not cli(["--report", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("### LaMP-1") == out.count("### LaMP-3") == 1 and out.count("NO LANGUAGE MODEL") == 2
    assert "paper" not in out and "no-persona" not in out and "| personaagent" not in out
    found = json.loads((tmp_path / "lamp1/prompt/results.json").read_text())
    assert f"| prompt | 18 | {found['metrics']['accuracy']:.3f} | {found['metrics']['macro-F1']:.3f} | " in out
    assert re.search(r"\| rag-4 \| 18 \| [\d.]+ \| [\d.]+ \|  \| [+-][\d.]+, \d+ won, \d+ lost, p [\d.]+ \| 0 \| 0 \| 0 \|", out)
    assert re.search(r"\| no-alignment \| 0\.3, \d+ \(0\) \+ \d+, [\d.]+ \| 0\.0, 0 \(0\) \+ 0, 0\.0 \| 3\.0, \d+ \(0\) \+ \d+, ", out)


def test_report_shows_the_papers_figures_beside_real_data_and_intervals_for_ten_users(tmp_path, server, capsys):
    asked = [question(f"q{n}", [movie(i) for i in range(3)], user=n) for n in range(12)]
    write(tmp_path, asked, {f"q{n}": ("action", "comedy")[n % 2] for n in range(12)})
    cli(["--task", "lamp2m", "--method", "rag-4", "--data", str(tmp_path), "--output", str(tmp_path / "out"), *server.flags])
    capsys.readouterr()
    cli(["--report", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert re.search(r"\| rag-4 \| 12 \| [\d.]+ \[[\d.]+, [\d.]+\] \| 0\.427 \| [\d.]+ \[[\d.]+, [\d.]+\] \| 0\.386 \|", out)


def test_report_knows_no_figures_of_the_papers_for_a_method_or_a_task_of_ones_own(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", METHODS["prompt"])
    assert cli(["--task", "lamp2m", "--method", "mine", "--limit", "1", "--data", str(SAMPLE), "--output", str(tmp_path), *server.flags]) == 0
    monkeypatch.delitem(METHODS, "mine")
    capsys.readouterr()
    cli(["--report", str(tmp_path)])
    assert re.search(r"\| mine \| 1 \| [\d.]+ \|  \| [\d.]+ \|  \|", capsys.readouterr().out)


def test_report_puts_varied_settings_into_rows_of_one_table(tmp_path, capsys):
    for k in ("1", "2"):
        cli(["--task", "lamp2m", "--method", "no-alignment", "--limit", "2", "--top-k", k, "--output", str(tmp_path)])
    capsys.readouterr()
    cli(["--report", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("###") == 1 and "| no-alignment, top_k 1 | 2 |" in out and "| no-alignment, top_k 2 | 2 |" in out


def test_report_of_a_run_that_is_not_finished_counts_what_there_is(tmp_path, capsys):
    cli(["--task", "lamp2m", "--method", "prompt", "--output", str(tmp_path)])
    folder = tmp_path / "lamp2m/prompt"
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(lines[:5]))
    made = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({"complete": False, **{k: made[k] for k in (
        "task", "method", "stand_in", "settings")}}))
    (folder / "errors.jsonl").write_text(json.dumps({"id": "x"}) + "\n")
    capsys.readouterr()
    assert not cli(["--report", str(tmp_path)])
    assert re.search(r"\| prompt \(unfinished\) \| 5 \| .* \| 1 \|\n", capsys.readouterr().out)


def test_report_has_a_row_per_model_and_keeps_the_stand_in_apart(tmp_path, server, capsys):
    command = ["--task", "lamp2m", "--method", "prompt", "--limit", "2", "--output", str(tmp_path)]
    for flags in ([], server.flags, [*server.flags, "--model", "other"]):
        cli([*command, *flags])
    capsys.readouterr()
    cli(["--report", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("### LaMP-2M") == 2 and out.count("NO LANGUAGE MODEL") == 1
    assert "| prompt, model m | 2 |" in out and "| prompt, model other | 2 |" in out
    assert out.count("No intervals: a bootstrap over users tells nothing below 10 users.") == 2


def test_report_of_a_foreign_results_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"score": 1}')
    assert cli(["--report", str(tmp_path)]) == 1 and capsys.readouterr().err.count("\n") == 1


def test_report_of_nothing_is_refused(tmp_path, capsys):
    assert cli(["--report", str(tmp_path)]) == 2 and "no run with answers" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("flag, value, count, expected", [
    ("--batch", "2", lambda s: sum("meticulous" in json.dumps(b) for b in chats(s)), 2),
    ("--iterations", "2", lambda s: sum("prompt engineering" in json.dumps(b) for b in chats(s)), 2),
    ("--top-k", "2", lambda s: {len(re.findall(r"- [\d-]+ \| tag: ", m["content"])) for b in chats(s) for m in b["messages"]
                                if m["content"].startswith("Observation: - ")}, {2}),
    ("--max-steps", "1", lambda s: sum("No more actions" in b["messages"][-1]["content"] for b in chats(s)), 6),
    ("--temperature", "0.7", lambda s: {b["temperature"] for b in chats(s)}, {0.7}),
    ("--model", "other", lambda s: {b["model"] for b in chats(s)}, {"other"}),
    ("--embed-model", "other", lambda s: {b["model"] for p, b in s.bodies if p.endswith("/embeddings")}, {"other"}),
    ("--max-history", "5", lambda s: {b["messages"][0]["content"].count("\n- ") for b in chats(s)
                                      if "oldest first" in b["messages"][0]["content"]}, {5})])
def test_flag_acts(server, tmp_path, flag, value, count, expected):
    assert cli(["--task", "lamp2m", "--limit", "3", "--output", str(tmp_path), *server.flags, flag, value]) == 0
    assert count(server) == expected
    changed, = (tmp_path / "lamp2m").iterdir()
    assert f"-{flag[2:].replace(chr(45), chr(95))}={value}" in changed.name


@pytest.mark.parametrize("flag, value, answered", [("--users", "2", 6), ("--queries-per-user", "2", 12), ("--limit", "7", 7)])
def test_flag_chooses_how_many_queries(server, tmp_path, flag, value, answered):
    assert cli(["--task", "lamp2m", "--method", "prompt", "--output", str(tmp_path), *server.flags, flag, value]) == 0
    assert results(tmp_path, "prompt")["metrics"]["n"] == answered == len(chats(server)) - 1


def test_seed_flag_acts(server, tmp_path):
    sent = []
    for seed in "12":
        server.bodies.clear()
        cli(["--task", "lamp1", "--limit", "1", "--output", str(tmp_path), *server.flags, "--seed", seed])
        sent.append({b["messages"][1]["content"] for b in chats(server) if len(b["messages"]) > 1})
    assert sent[0] != sent[1]


def dial(flags):
    """The client that a command line connects to."""
    args = lamp.arguments(flags)
    return lamp.dial(lamp.Link(*(getattr(args, field) for field in lamp.Link._fields)))[1]


def test_workers_bound_the_requests_in_flight():
    assert dial(["--task", "lamp1", "--workers", "3"]).http.slots._initial_value == 3


@pytest.mark.parametrize("flags, has, expected", [
    (["--model", "m", "--provider", "bedrock", "--region", "eu-west-1"], {"OPENAI_API_KEY": "k"}, "bedrock-runtime.eu-west-1"),
    (["--model", "m"], {"AWS_REGION": "us-east-2"}, "bedrock-runtime.us-east-2"),
    (["--model", "m"], {"OPENAI_API_KEY": "k", "AWS_REGION": "us-east-2"}, "api.openai.com"),
    (["--model", "m", "--base-url", "http://x/v1", "--embed-model", "e"], {"AWS_REGION": "us-east-2"}, "http://x/v1"),
    ([], {"OPENAI_API_KEY": "k", "AWS_REGION": "us-east-2"}, "127.0.0.1")])
def test_flags_and_environment_choose_the_provider(monkeypatch, flags, has, expected):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_BEDROCK_RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_BEARER_TOKEN_BEDROCK": "token", **has}.items():
        monkeypatch.setenv(name, value)
    assert expected in dial(["--task", "lamp1", *flags]).base_url


def test_embeddings_may_live_elsewhere(server, tmp_path):
    other = standin.start(handler=Recorder)
    other.bodies, other.fail = [], lambda body: None
    assert cli(["--task", "lamp2m", "--limit", "1", "--method", "rag-4", "--output", str(tmp_path), *server.flags,
                "--embed-base-url", f"http://127.0.0.1:{other.server_port}/v1"]) == 0
    assert {p for p, _ in other.bodies} == {"/v1/embeddings"} and {p for p, _ in server.bodies} == {"/v1/chat/completions"}
    other.shutdown()


def test_base_url_alone_takes_the_one_model_there_is(server, tmp_path):
    assert cli(["--task", "lamp2m", "--limit", "1", "--method", "prompt", "--output", str(tmp_path), *server.flags[:2]]) == 0
    assert {b["model"] for b in chats(server)} == {"stand-in"}


# ---------------------------------------------------------------------------------------------------- bad input

def bad_data(tmp_path, name):
    """A data folder with one fault, by name."""
    if name == "half":
        write(tmp_path, [question("q", [movie(1)])], {"q": "action"})
        whole = (tmp_path / "dev_questions.json").read_text()
        (tmp_path / "dev_questions.json").write_text(whole[:len(whole) // 2])
    elif name == "html":
        write(tmp_path, [], {})
        (tmp_path / "dev_questions.json").write_text("<!DOCTYPE html><html>not found</html>")
    elif name == "no input":
        write(tmp_path, [{"id": "q", "profile": []}], {"q": "action"})
    elif name == "strange gold":
        write(tmp_path, [question("q", [movie(1)])], {"q": "action", "ghost": "comedy"})
    elif name == "no gold":
        (write(tmp_path, [question("q", [movie(1)])], {}) / "dev_outputs.json").unlink()
    elif name == "half gold":
        (write(tmp_path, [question("q", [movie(1)])], {}) / "dev_outputs.json").write_text('{"task": "LaMP_2", "go')
    elif name == "other task":
        write(tmp_path, [question("q", [movie(1)])], {"q": "action"}, task="LaMP_3")
    elif name == "news":
        write(tmp_path, [{"id": "q", "input": MOVIE.replace("description", "article") + "x", "profile": []}], {"q": "crime"})
    return str(tmp_path)


@pytest.mark.parametrize("fault, says", [
    ("half", "dev_questions.json is not complete JSON"), ("html", "is not a JSON array, it starts with '<!DOCTYPE"),
    ("no input", "record q: no 'input'"), ("strange gold", "gold for 1 ids that"), ("no gold", "has no gold beside it: put dev_outputs.json"),
    ("half gold", "dev_outputs.json is not a LaMP outputs file"), ("other task", "holds gold for LaMP_3, not for LaMP_2"),
    ("news", "this is not a lamp2m question"), ("empty", "holds no lamp2m data")])
def test_bad_data_gets_one_line_and_exit_1(tmp_path, capsys, fault, says):
    assert cli(["--task", "lamp2m", "--data", bad_data(tmp_path, fault), "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and str(tmp_path) in err


def test_empty_profile_is_answered_without_memory_and_without_alignment(tmp_path, capsys):
    write(tmp_path, [question("q", [])], {"q": "action"})
    assert cli(["--task", "lamp2m", "--method", ALL, "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "labelled for 0 of 1 users" in capsys.readouterr().out


@pytest.mark.parametrize("argv, says", [
    (["--task", "lamp9"], "lamp9"), ([], "--task is missing: choose from lamp1"), (["--task", "lamp1", "--method", "magic"], "magic"),
    (["--task", "lamp1", "--users", "0"], "not a whole number of at least 1"), (["--tusk", "lamp1"], "--tusk"),
    (["--task", "lamp1", "--show", "nobody", "--output", "nowhere"], "no run with answers"),
    (["--task", "lamp1", "--model", "m"], "OPENAI_API_KEY"),
    (["--task", "lamp1", "--model", "m", "--base-url", "http://127.0.0.1:9/v1"], "--embed-model"),
    (["--task", "lamp1", "--output", "/dev/null/x"], "choose another one with --output")])
def test_bad_usage_gets_one_line_and_exit_2(capsys, monkeypatch, argv, says):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert cli(argv) == 2
    err = capsys.readouterr().err
    assert says.lower() in err.lower() and err.count("\n") == 1


@pytest.mark.parametrize("status, says", [(401, "OPENAI_API_KEY"), (404, "Does the server have the model 'm'")])
def test_wrong_key_or_model_ends_the_run_at_once(server, tmp_path, capsys, status, says):
    server.fail = lambda body: status
    assert cli(["--task", "lamp1", "--output", str(tmp_path), *server.flags]) == 1
    err = capsys.readouterr().err
    assert says in err and "no such luck" in err and err.count("\n") == 1 and len(server.bodies) == 1


def test_nothing_listening_ends_the_run_at_once(tmp_path, capsys):
    assert cli(["--task", "lamp1", "--method", "prompt", "--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "nothing listens there" in err and err.count("\n") == 1


def test_folder_of_other_settings_is_refused_with_the_difference(tmp_path):
    Folder(tmp_path, {"top_k": 4}).write("results.json", {"settings": {"top_k": 4}})
    with pytest.raises(Problem, match="top_k was 4, now 8"):
        Folder(tmp_path, {"top_k": 8})


def test_command_prints_no_traceback_when_called_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, "lamp.py", "--task", "lamp9"], cwd=lamp.HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_plan_is_within_a_quarter_of_the_calls_that_are_made(tmp_path, capsys, task):
    cli(["--task", task, "--method", "all", "--output", str(tmp_path)])
    planned = dict(re.findall(r"method +(\S+): about (\d+) chat calls", capsys.readouterr().out))
    for method in METHODS:
        stages = json.loads((tmp_path / task / method / "results.json").read_text())["usage"]
        made = sum(stage["calls"] for stage in stages.values())
        assert 0.75 * made <= int(planned[method]) <= 1.25 * made, method
