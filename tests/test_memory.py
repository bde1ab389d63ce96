"""Episodic memory by hand and against brute force, and what the summarising model is shown."""

import numpy as np
import pytest

from memory import Episode, EpisodicMemory, MemoryBank, summarize
from persona_agent import Reply

EAST, NORTH = [1, 0], [0, 1]
ROWS = {"east": EAST, "north": NORTH, "northeast": [1, 1], "west": [-1, 0], "nowhere": [0, 0]}
ROWS |= {"far east": [1e30, 0], "near east": [1e-30, 0]}
NAN, INFINITY, NO_ROWS = [[np.nan, 0]], [[0, np.inf]], np.zeros((0, 2))
BAD_ROWS = [NAN, INFINITY, NO_ROWS, [[1, 0, 0]], [[1]], [EAST, NORTH], EAST, 1.0, None]
NO_MODEL = None  # embeds nothing: a call of it would fail


def compass(texts):
    return [ROWS[text] for text in texts]


def filled(*texts):
    memory = EpisodicMemory(compass)
    memory.add(Episode(text, "") for text in texts)
    return memory


def shown(memory, query="east", k=9):
    return [episode.text for episode, _ in memory.search(query, k)]


def test_the_text_of_an_episode_is_date_answer_and_query_unless_given():
    assert Episode("q", "r", {"date": 2012}).text == "2012 | answer: r | q"
    assert Episode("q", "").text == "q"
    assert Episode("q", "r", {"date": 2012}, "short").text == "short"


@pytest.mark.parametrize("query", ["east", "near east", "far east"])
def test_search_gives_the_most_similar_first_with_its_cosine(query):
    found = filled("west", "north", "northeast", "nowhere", "far east").search(query, 5)
    assert [e.text for e, _ in found] == ["far east", "northeast", "north", "nowhere", "west"]
    assert [score for _, score in found] == pytest.approx([1, 0.5**0.5, 0, 0, -1], abs=1e-6)


@pytest.mark.parametrize("k", [1, 20, 21, 22, 42, 99])
def test_search_gives_k_and_the_older_first_where_scores_tie(k):
    east, north = [[f"{way} {i}" for i in range(21)] for way in ("east", "north")]
    alike = np.arange(1, 8)  # products that differ in the last bits, by where a row stands
    memory = EpisodicMemory(lambda texts: [alike if "east" in text else -alike for text in texts])
    memory.add(Episode(text, "") for pair in zip(north, east) for text in pair)
    assert shown(memory, k=k) == (east + north)[:k]


@pytest.mark.parametrize("texts, k", [((), 0), (("east",), 0), (("east",), -1)])
def test_k_below_one_is_an_error(texts, k):
    with pytest.raises(ValueError, match="at least 1"):
        filled(*texts).search("east", k)


def test_a_partial_sort_of_100_000_rows_finds_what_brute_force_finds():
    rows = np.random.default_rng(0).standard_normal((100_000, 8))
    memory = EpisodicMemory(lambda texts: rows[: len(texts)])
    memory.add([Episode(str(i), "") for i in range(len(rows))])
    scores = rows @ rows[0] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[0])
    for k in (1, 10, 1000):
        best = np.argsort(-scores)[:k]
        found = memory.search("the first row", k)
        assert [score for _, score in found] == pytest.approx(scores[best], abs=2e-6)
        assert {episode.query for episode, _ in found} == {str(i) for i in best}


@pytest.mark.parametrize("rows", BAD_ROWS, ids=str)
def test_a_bad_embedding_is_an_error_and_leaves_the_memory_as_it_was(rows):
    memory = filled("east", "north")
    memory.embed = lambda texts: rows
    for use in (memory.search, lambda query: memory.remember(query, "")):
        with pytest.raises(ValueError):
            use("west")
    memory.embed = compass
    memory.remember("northeast", "")
    assert shown(memory) == ["east", "northeast", "north"]


@pytest.mark.parametrize("places", [[], [3, 0]])
def test_what_a_selection_and_its_source_remember_stays_apart(places, embed):
    memory = EpisodicMemory(embed)
    memory.add(Episode(text, "") for text in "abcd")
    memory.embed = NO_MODEL
    part = memory.select(places)
    part.embed = memory.embed = embed
    part.remember("x", "yes", date=2012)
    memory.remember("y", "no")
    assert [e.text for e in list(part)[:-1]] == ["abcd"[i] for i in places]
    assert list(part)[-1] == Episode("x", "yes", {"date": 2012})
    assert np.array_equal(part.rows[:-1], memory.rows[places])
    assert [episode.text for episode in memory] == ["a", "b", "c", "d", "answer: no | y"]


@pytest.mark.parametrize("texts", [(), ("west", "north")])
def test_a_saved_memory_is_loaded_without_embedding_and_grows(tmp_path, texts):
    memory = filled(*texts)
    memory.add([Episode("a\nb", "ö", {"id": None, "n": 3}, text) for text in texts])
    memory.save(tmp_path / "memory.npz")
    loaded = EpisodicMemory.load(tmp_path / "memory.npz", NO_MODEL)
    assert list(loaded) == list(memory)
    loaded.embed = compass
    loaded.remember("east", "")
    assert shown(loaded, k=1) == ["east"]


def test_a_file_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", rows=np.zeros((1, 2)), episodes=np.array([{}], object))
    with pytest.raises(ValueError, match="pickle"):
        EpisodicMemory.load(tmp_path / "bad.npz", compass)


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    filled("east").save(tmp_path / "memory.npz")
    monkeypatch.setattr(np, "savez", lambda out, **arrays: out.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        filled("north").save(tmp_path / "memory.npz")
    assert shown(EpisodicMemory.load(tmp_path / "memory.npz", compass)) == ["east"]


def test_the_profile_is_made_of_the_newest_30_as_lines_of_150_words_oldest_first(scripted):
    llm = scripted([" A profile. \n"])
    texts = [*map(str, range(28)), "word " * 151, "two\n\nlines", "of {history} and {"]
    episodes = [Episode(text, "") for text in texts]
    assert summarize(llm, episodes, "Describe the user.") == "A profile."
    [[message]] = [call["messages"] for call in llm.calls]
    instruction, lines = message["content"].split("\n\nUser history, oldest first:\n")
    assert message["role"] == "user" and instruction.startswith("Describe the user. ")
    shortened = ["word " * 149 + "word", "two lines", "of {history} and {"]
    assert lines.split("\n") == [f"- {text}" for text in [*texts[1:28], *shortened]]


@pytest.mark.parametrize("reply", [Reply("I cannot", "content_filter"), Reply("", "overflow")])
def test_a_model_that_cannot_summarize_makes_an_empty_profile(scripted, reply):
    assert summarize(scripted([reply]), [Episode("a", "")], "Describe the user.") == ""


def test_where_nothing_is_known_nothing_is_asked(scripted):
    memory = EpisodicMemory(NO_MODEL)
    memory.add([])
    bank = MemoryBank(scripted([]), memory)
    assert (memory.search("east"), bank.portrait, bank.recall("east")) == ([], "", "")
    assert summarize(scripted([]), memory, "Describe the user.") == ""


def made_bank(scripted, embed, texts):
    memory = EpisodicMemory(embed)
    memory.add(Episode("", "", {"date": f"day {i}"}, text) for i, text in enumerate(texts))
    llm = scripted(lambda messages: messages[0]["content"][:9])
    return MemoryBank(llm, memory), [call["messages"][0]["content"] for call in llm.calls]


@pytest.mark.parametrize("texts, calls", [(["zebra"] * 12, 9), (["word " * 200] * 500, 11)])
def test_the_bank_asks_twice_a_period_and_once_more_3000_words_each(scripted, embed, texts, calls):
    bank, asked = made_bank(scripted, embed, texts)
    assert (len(asked), len(bank.events)) == (calls, len(texts) + calls // 2)
    assert bank.portrait == "Merge the"
    assert max(len(prompt.split()) for prompt in asked) < 3200


def test_the_bank_recalls_events_in_the_order_of_time_then_summaries(scripted, embed):
    bank, _ = made_bank(scripted, embed, ["zebra", "apple", "zebra zoo", "pear"])
    assert bank.recall("zebra", 2) == "- zebra\n- zebra zoo"
    assert bank.recall("summary of the time up to day", 1).startswith("- Summary of the time up")
    assert bank.recall("a", 99).startswith("- zebra\n- apple\n- zebra zoo\n- pear\n- Summary of")
