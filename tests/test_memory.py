"""Episodic memory against brute force and by hand, and what the summarizing model is shown.

Embeddings are looked up in small tables, so every expected score can be worked out by hand.
"""
from types import SimpleNamespace

import numpy as np
import pytest

from memory import Episode, EpisodicMemory, MemoryBank, summarize

COMPASS = {"east": [1, 0], "north": [0, 1], "northeast": [1, 1], "west": [-1, 0], "far east": [1000, 0],
           "nowhere": [0, 0]}


def looked_up(table):
    return lambda texts: np.array([table[t] for t in texts], float)


def episodes(*texts):
    return [Episode(f"what is {t}?", "", text=t) for t in texts]


def filled(*texts):
    memory = EpisodicMemory(looked_up(COMPASS))
    memory.add(episodes(*texts))
    return memory


def texts_of(found):
    return [episode.text for episode, _ in found]


def forbidden(texts):
    raise AssertionError(f"embedded {texts}")


# --------------------------------------------------------------------------------------------------------------- search

def test_search_finds_the_most_similar_first_with_its_cosine():
    found = filled("west", "north", "northeast", "east").search("east", 4)
    assert texts_of(found) == ["east", "northeast", "north", "west"]
    assert [score for _, score in found] == pytest.approx([1, 0.5 ** 0.5, 0, -1])


@pytest.mark.parametrize("k, expected", [(1, ["east"]), (2, ["east", "northeast"]),
                                         (3, ["east", "northeast", "north"])])
def test_search_returns_no_more_than_k(k, expected):
    assert texts_of(filled("north", "northeast", "east").search("east", k)) == expected


def test_search_returns_everything_in_order_where_k_exceeds_the_memory():
    assert texts_of(filled("north", "east").search("east", 99)) == ["east", "north"]


@pytest.mark.parametrize("k", [1, 19, 20, 21, 40])
def test_the_older_episode_comes_first_where_scores_tie(k):
    memory = EpisodicMemory(lambda texts: np.array([COMPASS[t.split("#")[0]] for t in texts], float))
    east, north = [f"east#{i}" for i in range(20)], [f"north#{i}" for i in range(20)]
    memory.add(episodes(*(text for pair in zip(north, east) for text in pair)))
    assert texts_of(memory.search("east", k)) == (east + north)[:k]


@pytest.mark.parametrize("k", [0, -1])
@pytest.mark.parametrize("texts", [(), ("east",)], ids=["empty memory", "filled memory"])
def test_k_below_one_is_an_error(k, texts):
    with pytest.raises(ValueError, match="at least 1"):
        filled(*texts).search("east", k)


def test_an_empty_memory_finds_nothing_and_embeds_nothing():
    assert EpisodicMemory(forbidden).search_many(["east", "north"]) == [[], []]


def test_no_queries_give_no_results_and_embed_nothing():
    memory = filled("east")
    memory.embed_query = forbidden
    assert memory.search_many([]) == []


def test_search_many_is_search_for_each_query():
    memory = filled("west", "north", "northeast", "east", "nowhere")
    together, alone = memory.search_many(["north", "east"], 3), [memory.search("north", 3), memory.search("east", 3)]
    assert [texts_of(found) for found in together] == [texts_of(found) for found in alone]
    assert [score for _, score in together[1]] == pytest.approx([score for _, score in alone[1]])


def test_a_zero_episode_scores_zero():
    found = filled("nowhere", "east", "west").search("east", 3)
    assert [(e.text, score) for e, score in found] == [("east", 1), ("nowhere", 0), ("west", -1)]


def test_a_zero_query_scores_everything_zero_and_so_finds_the_oldest():
    found = filled("west", "north", "east").search("nowhere", 2)
    assert [(e.text, score) for e, score in found] == [("west", 0), ("north", 0)]


def test_the_length_of_an_embedding_does_not_count():
    memory = filled("far east", "northeast")
    assert [score for _, score in memory.search("east", 2)] == pytest.approx([1, 0.5 ** 0.5])
    assert [score for _, score in memory.search("far east", 2)] == pytest.approx([1, 0.5 ** 0.5])


def test_queries_and_only_queries_go_through_embed_query():
    asked, kept = [], []
    memory = EpisodicMemory(lambda texts: kept.extend(texts) or looked_up(COMPASS)(texts),
                            lambda texts: asked.extend(texts) or looked_up(COMPASS)(texts))
    memory.add(episodes("east", "north"))
    memory.search("northeast")
    memory.before(1).search_many(["west", "east"])
    assert (kept, asked) == (["east", "north"], ["northeast", "west", "east"])


# --------------------------------------------------------------------------------------------------------------- growth

def test_many_additions_of_any_size_find_what_brute_force_finds():
    rng = np.random.default_rng(0)
    table = {str(i): row for i, row in enumerate(rng.standard_normal((400, 8)) * rng.uniform(0.01, 100, (400, 1)))}
    unit = np.array([row / np.sqrt((row ** 2).sum()) for row in table.values()])
    memory, n = EpisodicMemory(looked_up(table)), 0
    while n < 300:
        size = min(int(rng.choice([1, 1, 1, 2, 7, 40])), 300 - n)
        memory.add(episodes(*map(str, range(n, n + size))))
        n += size
        for query in map(str, rng.integers(300, 400, 2)):
            scores = unit[:n] @ unit[int(query)]
            best = sorted(range(n), key=lambda i: -scores[i])[:5]
            found = memory.search(query, 5)
            assert texts_of(found) == [str(i) for i in best]
            assert [score for _, score in found] == pytest.approx(scores[best], abs=1e-5)


def test_adding_nothing_embeds_nothing():
    memory = EpisodicMemory(forbidden)
    memory.add([])
    assert len(memory) == 0


def test_episodes_may_come_from_a_generator():
    memory = filled()
    memory.add(e for e in episodes("east", "north"))
    assert texts_of(memory.search("north", 2)) == ["north", "east"]


BAD = {"three dimensions": [[1, 0, 0]], "one dimension": [[1]], "nan": [[np.nan, 0]], "infinity": [[np.inf, 0]],
       "too few rows": np.zeros((0, 2)), "too many rows": [[1, 0], [0, 1]], "a flat list": [1, 0], "a number": 1.0,
       "nothing": None}


@pytest.mark.parametrize("rows", BAD.values(), ids=BAD)
def test_a_bad_embedding_is_an_error_and_leaves_the_memory_as_it_was(rows):
    memory = filled("east", "north")
    memory.add(episodes("northeast"))  # three episodes in an array of four rows
    before = memory.search("east", 9)
    memory.embed = lambda texts: rows
    with pytest.raises(ValueError):
        memory.add(episodes("west"))
    assert memory.search("east", 9) == before
    memory.embed = looked_up(COMPASS)
    memory.add(episodes("west"))
    assert texts_of(memory.search("west", 1)) == ["west"]


@pytest.mark.parametrize("rows", BAD.values(), ids=BAD)
def test_a_bad_query_embedding_is_an_error(rows):
    memory = filled("east", "north")
    memory.embed_query = lambda texts: rows
    with pytest.raises(ValueError):
        memory.search("east")


def test_one_bad_embedding_among_good_ones_adds_none_of_them():
    memory = filled("east")
    memory.embed = lambda texts: [[0, 1], [np.nan, 1]]
    with pytest.raises(ValueError, match="nan"):
        memory.add(episodes("north", "northeast"))
    assert [e.text for e in memory] == ["east"]


def test_an_embedding_that_fails_leaves_the_memory_as_it_was():
    memory = filled("east")
    memory.embed = forbidden
    with pytest.raises(AssertionError):
        memory.add(episodes("north"))
    assert texts_of(memory.search("north", 9)) == ["east"]


def test_a_first_bad_embedding_does_not_fix_the_dimension():
    memory = EpisodicMemory(lambda texts: [[np.nan, 0, 0]])
    with pytest.raises(ValueError):
        memory.add(episodes("east"))
    memory.embed = memory.embed_query = looked_up(COMPASS)
    memory.add(episodes("east"))
    assert texts_of(memory.search("east")) == ["east"]


# ------------------------------------------------------------------------------------------------------ order and views

def test_length_and_iteration_follow_the_order_of_addition():
    memory = filled("west", "east")
    memory.add(episodes("north"))
    assert len(memory) == 3
    assert [e.text for e in memory] == ["west", "east", "north"]


@pytest.mark.parametrize("n, expected", [(0, []), (1, ["north"]), (2, ["east", "north"]),
                                         (3, ["west", "east", "north"]), (99, ["west", "east", "north"])])
def test_recent_gives_the_last_n_oldest_first(n, expected):
    assert [e.text for e in filled("west", "east", "north").recent(n)] == expected


@pytest.mark.parametrize("i, expected", [(0, []), (1, ["west"]), (2, ["northeast", "west"]),
                                         (3, ["east", "northeast", "west"]), (99, ["east", "northeast", "west"])])
def test_before_sees_only_the_first_i_episodes(i, expected):
    view = filled("west", "northeast", "east").before(i)
    assert texts_of(view.search("east", 9)) == expected
    assert len(view) == len(expected)


@pytest.mark.parametrize("more", [1, 9], ids=["into the spare row", "into a larger array"])
def test_a_view_stays_as_it_was_when_the_memory_grows(more):
    memory = filled("west", "north")
    memory.add(episodes("northeast"))  # three episodes in an array of four rows
    views = [memory.before(i) for i in (2, 3)]
    seen = [view.search("east", 9) for view in views]
    memory.add(episodes(*["east"] * more))
    assert [view.search("east", 9) for view in views] == seen


@pytest.mark.parametrize("i, kept", [(0, []), (2, ["north", "west"]), (3, ["northeast", "north", "west"])])
def test_what_is_added_to_a_view_is_found_there_alone(i, kept):
    memory = filled("west", "north")
    memory.add(episodes("northeast"))
    seen, view = memory.search("east", 9), memory.before(i)
    view.add(episodes("far east"))
    assert texts_of(view.search("east", 9)) == ["far east", *kept]
    assert memory.search("east", 9) == seen


def test_a_view_of_a_view_sees_only_its_own_part():
    view = filled("west", "north", "northeast", "east").before(3).before(2)
    assert texts_of(view.search("east", 9)) == ["north", "west"]


# ---------------------------------------------------------------------------------------------------------------- files

def test_a_saved_memory_is_loaded_without_embedding_again(tmp_path):
    memory = filled("west", "north")
    memory.add([Episode("where?\nthere", "östlich", {"date": "2012-03-06", "id": None, "n": 3}, "east")])
    memory.save(tmp_path / "memory.npz")
    loaded = EpisodicMemory.load(tmp_path / "memory.npz", forbidden, looked_up(COMPASS))
    assert list(loaded) == list(memory)
    assert loaded.search("east", 9) == memory.search("east", 9)


def test_a_loaded_memory_grows(tmp_path):
    filled("west", "north").save(tmp_path / "memory.npz")
    loaded = EpisodicMemory.load(tmp_path / "memory.npz", looked_up(COMPASS))
    loaded.add(episodes("east"))
    assert texts_of(loaded.search("east", 9)) == ["east", "north", "west"]


def test_a_view_saves_only_what_it_sees(tmp_path):
    filled("west", "north", "east").before(2).save(tmp_path / "memory.npz")
    loaded = EpisodicMemory.load(tmp_path / "memory.npz", looked_up(COMPASS))
    assert texts_of(loaded.search("east", 9)) == ["north", "west"]


def test_an_empty_memory_is_saved_and_loaded(tmp_path):
    EpisodicMemory(forbidden).save(tmp_path / "memory.npz")
    loaded = EpisodicMemory.load(tmp_path / "memory.npz", looked_up(COMPASS))
    assert (len(loaded), loaded.search("east")) == (0, [])
    loaded.add(episodes("east"))
    assert texts_of(loaded.search("east")) == ["east"]


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path):
    filled("east").save(tmp_path / "memory.npz")
    memory = EpisodicMemory(looked_up(COMPASS))
    memory.add([Episode("q", "r", {"item": object()}, "north")])
    with pytest.raises(TypeError):
        memory.save(tmp_path / "memory.npz")
    assert [e.text for e in EpisodicMemory.load(tmp_path / "memory.npz", forbidden)] == ["east"]


# ------------------------------------------------------------------------------------------------------------- episodes

@pytest.mark.parametrize("given, expected", [
    (("q", "r"), "answer: r | q"), (("q", ""), "q"), (("q", "r", {"date": None}), "answer: r | q"),
    (("q", "r", {"date": "2012-03-06"}), "2012-03-06 | answer: r | q"), (("q", "", {"date": 2012}), "2012 | q"),
    (("q", "r", {"date": 2012}, "short"), "short"), (("q", "r", {}, ""), "")])
def test_the_text_of_an_episode_is_its_query_response_and_date_unless_given(given, expected):
    assert Episode(*given).text == expected


def test_episodes_do_not_share_metadata():
    first, second = Episode("q", "r"), Episode("q", "r")
    first.metadata["date"] = 2012
    assert second.metadata == {}


# ---------------------------------------------------------------------------------------------------------- the profile

class Scripted:
    """A model that always says the same and remembers what it was asked."""

    def __init__(self, text="A profile."):
        self.text, self.asked = text, []

    def chat(self, messages):
        self.asked.append(messages)
        return SimpleNamespace(text=self.text)

    @property
    def history(self):
        """The lines of the one prompt that follow the heading of the history."""
        [[message]] = self.asked
        return message["content"].split("oldest first:\n")[1].split("\n")


def test_the_profile_is_the_reply_without_blanks_round_it():
    assert summarize(Scripted("\n A profile. \n"), episodes("east"), "Describe the user.") == "A profile."


def test_the_model_is_asked_once_as_user_and_with_the_instruction():
    llm = Scripted()
    summarize(llm, episodes("east"), "Describe the user.")
    [[message]] = llm.asked
    assert message["role"] == "user"
    assert message["content"].startswith("Describe the user. Write at most 120 words, and only the profile.\n")


def test_only_the_newest_30_episodes_are_shown_oldest_first():
    llm = Scripted()
    summarize(llm, episodes(*(f"event {i}" for i in range(35))), "Describe the user.")
    assert llm.history == [f"- event {i}" for i in range(5, 35)]


def test_each_episode_is_cut_to_150_words():
    llm = Scripted()
    summarize(llm, episodes(" ".join(["long"] * 151), "short", " ".join(["full"] * 150)), "Describe the user.")
    assert llm.history == ["- " + " ".join(["long"] * 150), "- short", "- " + " ".join(["full"] * 150)]


def test_each_episode_is_one_line():
    llm = Scripted()
    summarize(llm, episodes("one\n\n two\tthree"), "Describe the user.")
    assert llm.history == ["- one two three"]


def test_braces_in_an_episode_stay_as_they_are():
    llm = Scripted()
    summarize(llm, episodes("a {history} of {0} and {"), "Describe the user.")
    assert llm.history == ["- a {history} of {0} and {"]


def test_a_memory_is_summarized_as_a_list_is():
    llm = Scripted()
    summarize(llm, filled("west", "east"), "Describe the user.")
    assert llm.history == ["- west", "- east"]


def test_no_episodes_give_an_empty_profile_without_a_call():
    llm = Scripted()
    assert summarize(llm, [], "Describe the user.") == ""
    assert llm.asked == []


# ---------------------------------------------------------------------------------------------------------- MemoryBank

def bank(scripted, embed, n=12, **more):
    memory = EpisodicMemory(embed)
    memory.add([Episode(f"question {'abcdefghijkl'[i] * 9}", "x", {"date": f"2020-01-{i + 1:02}"}) for i in range(n)])
    llm = scripted(lambda messages: f"reply {messages[-1]['content'][:9]}")
    return MemoryBank(llm, memory, **more), llm, memory


def test_bank_asks_twice_a_period_and_once_for_the_portrait(scripted, embed):
    made, llm, memory = bank(scripted, embed)
    asked = [call["messages"][0]["content"] for call in llm.calls]
    assert len(asked) == 9 and len(made.summaries) == 4  # 12 events in up to 5 periods of equal size: 4 of 3
    assert made.portrait == "reply Merge the" and sum(f"question {'a' * 9}" in text for text in asked) == 2
    assert len(memory) == 12 and len(made.events) == 16


def test_bank_recalls_events_and_summaries_in_the_order_of_time(scripted, embed):
    made, _, _ = bank(scripted, embed)
    assert made.recall("question llllll bbbbbb", 2).splitlines() == [
        "- 2020-01-02 | answer: x | question bbbbbbbbb", "- 2020-01-12 | answer: x | question lllllllll"]
    assert made.recall("summary of the time up to reply", 1).startswith("- Summary of the time up to 2020-01-")


def test_bank_that_was_made_before_asks_nothing(scripted, embed):
    made, _, memory = bank(scripted, embed)
    again = MemoryBank(None, memory, made=(made.portrait, made.summaries))
    assert again.portrait == made.portrait and again.recall("question bbbbb", 3) == made.recall("question bbbbb", 3)


def test_bank_of_an_empty_memory_is_empty(scripted, embed):
    made, llm, _ = bank(scripted, embed, n=0)
    assert (made.portrait, made.recall("x", 3), llm.calls) == ("", "", [])


def test_bank_forgets_old_events_unless_they_were_recalled(scripted, embed):
    made, _, _ = bank(scripted, embed, forgetting=True)
    old = made.events.episodes[0]
    assert sum(made._forgotten(old) for _ in range(200)) > 190  # exp(-11)
    made.recalled[id(old)] = 100
    assert sum(made._forgotten(old) for _ in range(200)) < 50  # exp(-11 / 101)
    assert not any(made._forgotten(made.events.episodes[11]) for _ in range(200))


def test_bank_asks_of_a_long_history_stay_within_3000_words_a_period(embed):
    memory, llm = EpisodicMemory(embed), Scripted()
    memory.add([Episode("", "", text="word " * 200) for _ in range(500)])
    MemoryBank(llm, memory)
    assert len(llm.asked) == 11 and max(len(m[-1]["content"].split()) for m in llm.asked) < 3200
