"""The tools: Tool itself, Wiki over real sockets, RAG over a small memory."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from memory import Episode, EpisodicMemory
from tests.faults import Answer, Faults, dead_address
from tools import ENOUGH, LIMIT, NO_PAGE, RAG, WIKI_DOWN, Tool, Wiki, WikiUnreachable

SEARCH, PAGE = "/w/rest.php/v1/search/page", "/api/rest_v1/page/summary/"


def found(*titles, **fields):
    return Answer({"pages": [{"key": t.replace(" ", "_"), "title": t, **fields} for t in titles]})


def page(title, extract, kind="standard"):
    return Answer({"type": kind, "title": title, "extract": extract})


FOUND, ROME = found("Rome"), "Rome: The capital of Italy."
REFUSED, FAULT, RESET = Answer(status=403), Answer(status=503), Answer(action="reset")
TOPICS = [
    ("AC/DC", "AC%2FDC", "AC/DC", "AC%2FDC"),
    (" 100%\n what? & #1 ", "100%25%20what%3F%20%26%20%231", "What now?", "What_now%3F"),
    ("\ud83d" + "x" * 400, "%3F" + "x" * 249, "Zürich", "Z%C3%BCrich"),
]
NO_SUMMARY = [page("Rome", ""), page("Rome", None), Answer(b"<html>")]
NO_SUMMARY += [Answer(b"gone", status) for status in (400, 403, 404, 410, 500)]
NO_RESULT = [Answer({"error": "slow down"}), Answer([]), Answer(b"<html>"), Answer(b"{}garbage")]
NO_RESULT += [Answer(b"[" * 2000), Answer(action="truncate"), RESET, FAULT, REFUSED]
NO_RESULT += [Answer(status=429), Answer(status=302, headers={"Location": SEARCH})]
PAUSES = [
    ("7", [FAULT, RESET, FOUND], [7, 2, 4]),
    ("0", [FAULT], [2, 4]),  # four tries; there is nothing to wait for after the last
    ("Fri, 31 Dec 99999 23:59:59 GMT", [FOUND], [1]),
    ("3600", [FOUND], []),
    ("9" * 400, [FOUND], []),
]


@pytest.fixture
def server(monkeypatch):
    """A Wikipedia with the one page 'Rome'; `pauses` are the seconds that a tool would sleep."""
    with Faults() as faults:
        faults.pauses = []
        monkeypatch.setattr("tools.time.sleep", faults.pauses.append)
        monkeypatch.setattr("tools.random.uniform", lambda low, high: high)
        monkeypatch.setattr("requests.sessions.DEFAULT_REDIRECT_LIMIT", 3)
        faults.script(FOUND, prefix=SEARCH)
        faults.script(page("Rome", "The capital of Italy."), prefix=PAGE)
        yield faults


@pytest.mark.parametrize("length, end", [(LIMIT, "xxxx"), (LIMIT + 1, " ...")])
def test_an_observation_is_cut_to_the_limit(length, end):
    assert Tool("Echo", "", str)("x" * length) == "x" * (LIMIT - 4) + end


@pytest.mark.parametrize("topic, query, title, key", TOPICS)
def test_wiki_searches_then_gets_the_first_page(server, topic, query, title, key):
    server.script(found(title, "Another"), prefix=SEARCH)
    assert Wiki(server.url)(topic) == ROME
    assert [r.path for r in server.requests] == [f"{SEARCH}?q={query}&limit=5", PAGE + key]


@pytest.mark.parametrize("contact, shown", [("", "you)"), ("Jürgen €\r\nX: 1", "J?rgen ?")])
def test_wiki_names_its_contact_in_the_user_agent(server, monkeypatch, contact, shown):
    monkeypatch.setenv("WIKIPEDIA_CONTACT", "you")
    assert Wiki(server.url, contact)("Rome") == ROME
    for request in server.requests:
        assert request.headers["User-Agent"].startswith(f"PersonaAgent/0.2 ({shown}")


def test_wiki_lists_at_most_four_other_meanings_of_an_ambiguous_title(server):
    server.script(found(*[f"Page {i}" for i in range(6)], description="a meaning"), prefix=SEARCH)
    server.script(page("Page 0", "It may refer to:", "disambiguation"), prefix=PAGE)
    observation = Wiki(server.url)("page")
    assert "'Page 0' may refer to several topics. It may refer to:" in observation
    assert observation.endswith("Page 3 (a meaning); Page 4 (a meaning)")


@pytest.mark.parametrize("answer", NO_SUMMARY, ids=lambda answer: f"{answer.status}{answer.body}")
def test_a_page_without_a_summary_gives_the_excerpt_of_the_search(server, answer):
    excerpt = '<span class="searchmatch">Rome</span> &amp; Lazio'
    server.script(found("Rome", description="city", excerpt=excerpt), prefix=SEARCH)
    server.script(answer, prefix=PAGE)
    tool = Wiki(server.url)
    said = [tool("Rome") for _ in range(4)]
    assert (said, tool.down) == (["Rome: city Rome & Lazio"] * 4, "")


def test_a_connection_that_is_lost_before_the_page_is_an_outage_and_no_excerpt(server):
    server.script(found("Rome", excerpt="a city"), prefix=SEARCH)
    server.script(RESET, prefix=PAGE)
    with pytest.raises(WikiUnreachable):  # so that no cache keeps it
        Wiki(server.url).look_up("Rome")


@pytest.mark.parametrize("answer", NO_RESULT, ids=lambda answer: repr(answer)[12:40])
def test_wikipedia_is_given_up_when_three_searches_in_a_row_get_no_answer(server, answer):
    server.script(answer, prefix=SEARCH)
    tool = Wiki(server.url)
    assert [tool("Rome"), tool("Paris"), tool("Rome")] == [WIKI_DOWN] * 3
    before = len(server.requests)
    assert (tool("Oslo"), len(server.requests)) == (WIKI_DOWN, before)


@pytest.mark.parametrize("status", [200, 400, 404, 414])
def test_a_search_that_finds_nothing_is_an_answer(server, status):
    nothing = Answer({"pages": []}, status)
    server.script(REFUSED, REFUSED, nothing, REFUSED, REFUSED, FOUND, prefix=SEARCH)
    tool = Wiki(server.url)
    assert [tool("?") for _ in range(6)][2::3] == [NO_PAGE.format(topic="?"), ROME]


@pytest.mark.parametrize("asked, then, pauses", PAUSES, ids=[row[0][:9] for row in PAUSES])
def test_wiki_waits_before_another_try_but_not_beyond_its_patience(server, asked, then, pauses):
    server.script(Answer(status=429, headers={"Retry-After": asked}), *then, prefix=SEARCH)
    assert Wiki(server.url)("Rome") == (ROME if len(then) == len(pauses) else WIKI_DOWN)
    assert [seconds for seconds in server.pauses if seconds] == pauses


def test_an_answer_that_drips_for_ever_ends(server, monkeypatch):
    monkeypatch.setattr(Wiki, "patience", 0.2)
    server.script(Answer(b" " * 200, action="drip", pause=0.01), prefix=SEARCH)
    assert Wiki(server.url)("Rome") == WIKI_DOWN
    assert time.monotonic() - server.requests[0].time < 1


def test_a_redirected_page_is_read_without_a_password_of_netrc(server, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    elsewhere = server.url.replace("127.0.0.1", "localhost") + PAGE
    moved = Answer(status=302, headers={"Location": f"{elsewhere}Roma"})
    server.script(moved, page("Roma", "A city."), prefix=PAGE)
    assert Wiki(server.url)("Rome") == "Roma: A city."
    assert [request.headers["Authorization"] for request in server.requests] == [None] * 3


@pytest.mark.parametrize("scheme, reason", [("https", "/no/such.pem"), ("http", "refused")])
def test_the_reason_of_an_outage_is_kept(server, monkeypatch, scheme, reason):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
    tool = Wiki(dead_address().replace("http", scheme))
    assert tool("Rome") == WIKI_DOWN and reason in tool.down


def test_wiki_sends_one_request_at_a_time_from_all_threads(server):
    server.script(Answer(FOUND.body, delay=0.02), prefix=SEARCH)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(Wiki(server.url), "abcde"))
    assert (len(server.requests), server.most) == (10, 1)


def rag(embed, *texts, k=4):
    memory = EpisodicMemory(embed)
    memory.add(Episode(text, "") for text in texts)
    return RAG(memory, k)


def test_rag_shows_the_k_best_of_its_memory_or_of_the_one_that_it_is_put_over(embed):
    one = rag(embed, "love", "war", "war and love", k=2)
    other = one.over(rag(embed, "love", "love", "love").memory)
    assert one("a war film") == f"- war\n- war and love{ENOUGH}"
    assert other("love") == f"- love\n- love{ENOUGH}"


@pytest.mark.parametrize("length, cut", [(400, 0), (LIMIT, 4)])
def test_long_hits_share_the_room_of_an_observation(embed, length, cut):
    observation = rag(embed, *[f"war {i} {'x' * length}" for i in range(4)])("war")
    assert (observation.count("- war "), observation.count("x ...")) == (4, cut)
    assert len(observation) <= LIMIT
    assert observation.endswith(ENOUGH)


def test_rag_over_an_empty_memory_says_so(embed):
    assert "memory is empty" in rag(embed)("war")
