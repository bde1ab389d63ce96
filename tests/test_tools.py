"""The tools: Tool itself, Wiki over scripted endpoints, RAG over a small memory."""
from concurrent.futures import ThreadPoolExecutor

import pytest

from memory import Episode, EpisodicMemory
from tests.faults import Answer, Faults, dead_address
from tools import LIMIT, RAG, WIKI_DOWN, ContextOverflow, Http, ServiceError, Tool, Wiki

SEARCH, SUMMARY = "/w/rest.php/v1/search/page", "/api/rest_v1/page/summary/"


@pytest.fixture
def wikipedia(monkeypatch):
    """A Wikipedia with the one page 'Rome', and no back-off except what it asks for."""
    monkeypatch.delenv("WIKIPEDIA_CONTACT", raising=False)
    monkeypatch.setattr("tools.random.uniform", lambda low, high: 0)
    with Faults() as server:
        server.script(found("Rome"), prefix=SEARCH)
        server.script(page("Rome", "The capital of Italy."), prefix=SUMMARY)
        yield server


def found(*titles, **fields):
    """A search result; `fields` are the same in all its pages."""
    fields = {"excerpt": None, "description": None, **fields}
    return Answer({"pages": [{"id": 1, "key": t.replace(" ", "_"), "title": t, **fields} for t in titles]})


def page(title, extract, kind="standard"):
    return Answer({"type": kind, "title": title, "extract": extract})


def wiki(server, contact=None, tries=2):
    return Wiki(server.url, contact, Http(workers=1, tries=tries))


def paths(server):
    return [request.path for request in server.requests]


def fail(error):
    raise error


# Tool

def test_an_exception_becomes_an_observation():
    observation = Tool("Clock", "", lambda text: fail(ValueError("no such zone")))("Mars")
    assert "Clock failed" in observation and "no such zone" in observation


def test_an_input_that_is_too_long_becomes_an_observation():
    observation = Tool("RAG", "", lambda text: fail(ContextOverflow("512 tokens")))("x")
    assert "the input is too long (512 tokens). Try a shorter one." in observation


def test_a_service_error_passes_through():
    with pytest.raises(ServiceError, match="embeddings are down"):
        Tool("RAG", "", lambda text: fail(ServiceError("embeddings are down")))("x")


def test_an_observation_of_the_limit_is_kept_whole():
    assert Tool("Echo", "", str)("x" * LIMIT) == "x" * LIMIT


def test_an_observation_over_the_limit_is_cut_to_it():
    assert Tool("Echo", "", str)("x" * (LIMIT + 1)) == "x" * (LIMIT - 4) + " ..."


def test_a_tool_without_memory_is_the_same_over_any_memory():
    tool = Tool("Echo", "", str)
    assert tool.over(EpisodicMemory(None)) is tool


# Wiki

def test_wiki_gives_title_and_summary(wikipedia):
    assert wiki(wikipedia)("rome") == "Rome: The capital of Italy."


@pytest.mark.parametrize("topic, query, title, key", [
    ("AC/DC", "AC%2FDC", "AC/DC", "AC%2FDC"),
    ("C++", "C%2B%2B", "C++", "C%2B%2B"),
    ("Zürich", "Z%C3%BCrich", "Zürich", "Z%C3%BCrich"),
    ("second world war", "second%20world%20war", "World War II", "World_War_II"),
    ("100% what? & #1", "100%25%20what%3F%20%26%20%231", "What?", "What%3F"),
    ("  two \n words ", "two%20words", "Two words", "Two_words"),
    ("x" * 400, "x" * 250, "X", "X"),
    ("lone \ud83d half", "lone%20%3F%20half", "Half", "Half"),
])
def test_wiki_searches_then_gets_the_summary_with_both_paths_encoded(wikipedia, topic, query, title, key):
    wikipedia.script(found(title, "Another"), prefix=SEARCH)
    wiki(wikipedia)(topic)
    assert paths(wikipedia) == [f"{SEARCH}?q={query}&limit=5", SUMMARY + key]


def test_wiki_names_the_contact_of_the_argument_in_the_user_agent(wikipedia, monkeypatch):
    monkeypatch.setenv("WIKIPEDIA_CONTACT", "other@example.org")
    wiki(wikipedia, contact="me@example.org")("Rome")
    for request in wikipedia.requests:
        assert request.headers["User-Agent"].startswith("PersonaAgent/0.1 (me@example.org) python-requests/")


def test_wiki_takes_the_contact_from_the_environment(wikipedia, monkeypatch):
    monkeypatch.setenv("WIKIPEDIA_CONTACT", "me@example.org")
    wiki(wikipedia)("Rome")
    assert "(me@example.org)" in wikipedia.requests[0].headers["User-Agent"]


@pytest.mark.parametrize("contact, shown", [
    ("Jürgen €", "(J?rgen ?)"), (" me@example.org\r\nX-Evil: 1 ", "(me@example.org X-Evil: 1)")])
def test_wiki_makes_a_header_of_any_contact(wikipedia, contact, shown):
    assert wiki(wikipedia, contact)("Rome") == "Rome: The capital of Italy."
    assert shown in wikipedia.requests[0].headers["User-Agent"] and "X-Evil" not in wikipedia.requests[0].headers


@pytest.mark.parametrize("status", [301, 302])
def test_wiki_follows_a_redirected_summary_with_its_user_agent(wikipedia, status):
    redirect = Answer(status=status, headers={"Location": SUMMARY + "Roma"})
    wikipedia.script(redirect, page("Roma", "A city."), prefix=SUMMARY)
    assert wiki(wikipedia, contact="me@example.org")("Rome") == "Roma: A city."
    assert paths(wikipedia)[1:] == [SUMMARY + "Rome", SUMMARY + "Roma"]
    assert "(me@example.org)" in wikipedia.requests[2].headers["User-Agent"]


def test_wiki_lists_the_meanings_of_an_ambiguous_title(wikipedia):
    wikipedia.script(found("Mercury", "Mercury (planet)", "Freddie Mercury", description="a meaning"), prefix=SEARCH)
    wikipedia.script(page("Mercury", "Mercury may refer to:", "disambiguation"), prefix=SUMMARY)
    observation = wiki(wikipedia)("mercury")
    assert "several topics" in observation
    assert "Mercury (planet) (a meaning); Freddie Mercury (a meaning)" in observation


def test_wiki_offers_at_most_four_other_meanings(wikipedia):
    wikipedia.script(found("Page 0", "Page 1", "Page 2", "Page 3", "Page 4", "Page 5"), prefix=SEARCH)
    wikipedia.script(page("Page 0", "Page 0 may refer to:", "disambiguation"), prefix=SUMMARY)
    observation = wiki(wikipedia)("page")
    assert "Page 4" in observation and "Page 5" not in observation


def test_wiki_says_when_nothing_is_found(wikipedia):
    wikipedia.script(found(), prefix=SEARCH)
    assert "no page about 'qwxz'" in wiki(wikipedia)("qwxz")
    assert len(wikipedia.requests) == 1


@pytest.mark.parametrize("summary", [page("Rome", "", "no-extract"), page("Rome", None), Answer(b"not found", 404)],
                         ids=["empty", "null", "404"])
def test_wiki_without_a_summary_shows_description_and_excerpt_as_plain_text(wikipedia, summary):
    excerpt = '<span class="searchmatch">Rome</span> &amp; Lazio'
    wikipedia.script(found("Rome", description="city", excerpt=excerpt), prefix=SEARCH)
    wikipedia.script(summary, prefix=SUMMARY)
    assert wiki(wikipedia)("Rome") == "Rome: city Rome & Lazio"


def test_wiki_says_when_a_page_has_no_text_at_all(wikipedia):
    wikipedia.script(page("Rome", ""), prefix=SUMMARY)
    assert wiki(wikipedia)("Rome") == "Rome: this page has no summary."


@pytest.mark.parametrize("topic", ["", " \n"])
def test_wiki_without_a_topic_asks_for_one(wikipedia, topic):
    assert "needs a topic" in wiki(wikipedia)(topic)
    assert not wikipedia.requests


def test_wiki_cuts_a_long_summary(wikipedia):
    wikipedia.script(page("Rome", "long " * LIMIT), prefix=SUMMARY)
    assert len(wiki(wikipedia)("Rome")) == LIMIT


def test_wiki_fetches_each_topic_once(wikipedia):
    tool = wiki(wikipedia)
    assert tool("Rome") == tool(" Rome")
    assert len(wikipedia.requests) == 2


def test_wiki_sends_one_request_at_a_time_from_all_threads(wikipedia):
    wikipedia.script(Answer(found("Rome").body, delay=0.02), prefix=SEARCH)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(Wiki(wikipedia.url, http=Http(workers=5)), [f"topic {i}" for i in range(5)]))
    assert (len(wikipedia.requests), wikipedia.most) == (6, 1)  # five searches, all of which find the same page


def test_wiki_waits_as_long_as_a_429_asks_and_then_answers(wikipedia):
    wikipedia.script(Answer(b"Too many requests", 429, {"Retry-After": "0.1"}), found("Rome"), prefix=SEARCH)
    tool = wiki(wikipedia)
    assert tool("Rome") == "Rome: The capital of Italy."
    assert wikipedia.requests[1].time - wikipedia.requests[0].time >= 0.1


def test_wiki_waits_five_seconds_after_a_429_that_does_not_say_how_long(wikipedia, monkeypatch):
    pauses = []
    monkeypatch.setattr("tools.time.sleep", pauses.append)
    wikipedia.script(Answer(b"Too many requests", 429), Answer(status=503), found("Rome"), prefix=SEARCH)
    assert Wiki(wikipedia.url)("Rome") == "Rome: The capital of Italy."
    assert pauses == [5, 0]


@pytest.mark.parametrize("status", [400, 404, 414])
def test_wiki_goes_on_after_a_topic_that_it_cannot_search(wikipedia, status):
    wikipedia.script(Answer({"messageTranslations": {"en": "no"}}, status), found("Rome"), prefix=SEARCH)
    tool = wiki(wikipedia)
    assert "cannot search for '???'" in tool("???")
    assert (tool("Rome"), tool.down) == ("Rome: The capital of Italy.", None)


@pytest.mark.parametrize("search, words", [
    ({"pages": 5}, "Wiki failed"), ({"pages": [{"key": 5}]}, "Wiki failed"), ({"pages": {"key": "x"}}, "no page"),
    ({"pages": ["x", None, {"title": "x"}]}, "no page"), ({"pages": None}, "no page"), ({}, "no page")])
def test_wiki_goes_on_after_a_search_result_of_another_shape(wikipedia, search, words):
    wikipedia.script(Answer(search), found("Rome"), prefix=SEARCH)
    tool = wiki(wikipedia)
    assert words in tool("x")
    assert tool("Rome") == "Rome: The capital of Italy."


@pytest.mark.parametrize("summary, words", [({"extract": ["x"]}, "Wiki failed"), ({"extract": 5}, "Wiki failed"),
                                            ({}, "Rome: this page has no summary.")])
def test_wiki_answers_in_words_to_a_summary_of_another_shape(wikipedia, summary, words):
    wikipedia.script(Answer(summary), prefix=SUMMARY)
    assert words in wiki(wikipedia)("Rome")


@pytest.mark.parametrize("answer, requests", [
    (Answer({"error": {"code": "ratelimited", "info": "slow down"}}), 2), (Answer(["pages"]), 1), (Answer(None), 1),
    (Answer(b"", 302, {"Location": SEARCH}), 31), (Answer(b"Please set a user-agent", 403), 1),
    (Answer(b"Too many requests", 429), 2), (Answer(b"<html>", 502), 2), (Answer(b"<html>Welcome"), 1),
    (Answer(b"{}garbage"), 2), (Answer(action="reset"), 2),
], ids=["an error with 200", "a list", "null", "redirects for ever", "403", "429 for ever", "502 for ever",
        "a web page", "no JSON", "reset"])
def test_wiki_gives_up_for_good_when_it_gets_no_answer(wikipedia, answer, requests):
    wikipedia.script(answer, prefix=SEARCH)
    tool = wiki(wikipedia)
    assert [tool("Rome"), tool("Paris"), tool("Rome")] == [WIKI_DOWN] * 3
    assert len(wikipedia.requests) == requests


def test_wiki_keeps_why_it_gave_up(wikipedia):
    wikipedia.script(Answer(b"Please set a user-agent", 403), prefix=SUMMARY)
    tool = wiki(wikipedia)
    tool("Rome")
    assert "HTTP 403" in tool.down and "Please set a user-agent" in tool.down


def test_wiki_out_of_reach_is_an_observation():
    tool = Wiki(dead_address(), http=Http(workers=1, tries=1))
    assert tool("Rome") == WIKI_DOWN
    assert "nothing listens" in tool.down


def test_wiki_still_gives_what_it_fetched_before_it_went_down(wikipedia):
    wikipedia.script(found("Rome"), Answer(status=403), prefix=SEARCH)
    tool = wiki(wikipedia)
    rome = tool("Rome")
    assert [rome, tool("Paris"), tool("Rome")] == ["Rome: The capital of Italy.", WIKI_DOWN, rome]


# RAG

@pytest.fixture
def memory(embed):
    """A function from texts to a memory of them."""
    def filled(*texts):
        made = EpisodicMemory(embed)
        made.add([Episode(t, "") for t in texts])
        return made
    return filled


def test_rag_shows_the_best_first(memory):
    assert RAG(memory("love", "war", "war and love"))("a war film") == "- war\n- war and love\n- love"


def test_rag_shows_k_episodes(memory):
    assert RAG(memory("love", "war", "war and love"), k=2)("a war film") == "- war\n- war and love"


def test_rag_shows_each_of_several_long_hits_within_the_limit(memory):
    observation = RAG(memory(*[f"war {i} " + "x" * LIMIT for i in range(4)]))("war")
    lines = observation.split("\n")
    assert [line[:7] for line in lines] == [f"- war {i}" for i in range(4)]
    assert len(observation) <= LIMIT and all(line.endswith("x ...") for line in lines)


def test_rag_does_not_cut_what_fits(memory):
    texts = [f"war {i} " + "x" * 400 for i in range(4)]
    assert RAG(memory(*texts))("war") == "\n".join(f"- {t}" for t in texts)


def test_rag_shows_every_hit_even_of_very_many(memory):
    assert RAG(memory(*[f"war {i} " + "x" * 90 for i in range(60)]), k=60)("war").count("- war ") >= 40


def test_rag_does_not_number_its_hits_like_the_options_of_a_question(memory):
    assert "[1]" not in RAG(memory("love", "war"))("a war film")


def test_rag_over_an_empty_memory_says_so(memory):
    assert "memory is empty" in RAG(memory())("war")


@pytest.mark.parametrize("query", ["", " \n"])
def test_rag_without_a_query_asks_for_one(memory, query):
    assert "needs a search query" in RAG(memory("war"))(query)


def test_rag_over_another_memory_reads_that_one_and_keeps_k(memory):
    one = RAG(memory("war"), k=2)
    other = one.over(memory("love", "love", "love"))
    assert (other("love"), other.k, one("love")) == ("- love\n- love", 2, "- war")


def test_rag_without_its_embedding_model_is_a_service_error(memory):
    full = memory("war")
    full.embed_query = lambda batch: fail(ServiceError("embeddings are down"))
    with pytest.raises(ServiceError, match="embeddings are down"):
        RAG(full)("war")
