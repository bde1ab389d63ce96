"""The ReAct parser, on every kind of reply that models send, and the loop, one behaviour a test."""
import pytest

from memory import Episode, EpisodicMemory
from persona_agent import (BAD_REPLY, FORCED, NO_ANSWER, PERSONA, ContextOverflow, PersonaAgent, Reply, Usage, find_tool,
                           initial_persona, parse_reply, protocol, react)
from tools import RAG, ServiceError, Tool

WIKI = Tool("Wiki", "looks things up", lambda text: f"about {text}")
NOTES = Tool("RAG", "remembers", lambda text: f"memory of {text}")
TOOLS = [WIKI, NOTES]


@pytest.mark.parametrize("text, action, given, answer", [
    ("Thought: x\nAction: RAG\nAction Input: war films", "RAG", "war films", None),
    ("Thought: I know\nFinal Answer: comedy", None, None, "comedy"),
    # both: the action wins, unless the answer comes first
    ("Action: RAG\nAction Input: war\nFinal Answer: comedy", "RAG", "war", None),
    ("Final Answer: comedy\nAction: RAG\nAction Input: war", None, None, "comedy"),
    # several actions: the first
    ("Action: RAG\nAction Input: war\nAction: Wiki\nAction Input: Rome", "RAG", "war", None),
    # an observation that the model made up ends the reply
    ("Action: RAG\nAction Input: war\nObservation: nothing\nFinal Answer: comedy", "RAG", "war", None),
    ("Observation: nothing\nFinal Answer: comedy", None, None, None),
    # no input, or an empty one
    ("Thought: x\nAction: RAG", "RAG", None, None),
    ("Action: RAG\nAction Input:", "RAG", None, None),
    ('Action: RAG\nAction Input: ""', "RAG", None, None),
    # input inside the action
    ('Action: RAG("war films")', "RAG", "war films", None),
    ("Action: RAG[war films]", "RAG", "war films", None),
    ("Action: RAG: war films", "RAG", "war films", None),
    ('Action: RAG {"query": "war films"}', "RAG", "war films", None),
    ('Action: RAG: ["war", "films"]', "RAG", "war films", None),
    ("Action: RAG: films (1990)", "RAG", "films (1990)", None),
    ("Action: RAG\nAction Input:\nobservational studies", "RAG", "observational studies", None),
    ("Action: [RAG]\nAction Input: war", "RAG", "war", None),
    ("Action: **RAG**\nAction Input: war", "RAG", "war", None),
    ("Action: `Wiki`\nAction Input: `Rome`", "Wiki", "Rome", None),
    ('Action: "RAG API"\nAction Input: war', "RAG API", "war", None),
    # numbered, bold and heading labels, lists, full-width colons, CRLF
    ("Thought 1: x\nAction 1: RAG\nAction Input 1: war", "RAG", "war", None),
    ("**Thought:** x\n**Action:** RAG\n**Action Input:** war", "RAG", "war", None),
    ("### Thought\nx\n### Action\nRAG\n### Action Input\nwar", "RAG", "war", None),
    ("- Action: RAG\n- Action Input: war", "RAG", "war", None),
    ("**Final Answer:** comedy", None, None, "comedy"),
    ("## Final Answer\n\ncomedy", None, None, "comedy"),
    ("Final Answer： comedy", None, None, "comedy"),
    ("Thought: x\r\nAction: RAG\r\nAction Input: war\r\n", "RAG", "war", None),
    ("thought: x\naction: rag\naction input: war", "rag", "war", None),
    ("Thought: x Action: RAG Action Input: war", "RAG", "war", None),
    # input on the next line, quoted, as JSON, over several lines
    ("Action: RAG\nAction Input:\nwar films", "RAG", "war films", None),
    ("Action: RAG\nAction Input: 'war films'", "RAG", "war films", None),
    ('Action: RAG\nAction Input: {"query": "war films"}', "RAG", "war films", None),
    ('Action: RAG\nAction Input: ["war", "films"]', "RAG", "war films", None),
    ("Action: RAG\nAction Input: war\nfilms\n", "RAG", "war films", None),
    ("Action: RAG\nAction Input: 1984", "RAG", "1984", None),
    # code fences
    ("```\nThought: x\nAction: RAG\nAction Input: war\n```", "RAG", "war", None),
    ("Action: RAG\nAction Input:\n```json\n{\"query\": \"war\"}\n```", "RAG", "war", None),
    ("```\nFinal Answer: comedy\n```", None, None, "comedy"),
    # hidden reasoning
    ("<think>Action: Wiki\nAction Input: no</think>\nFinal Answer: comedy", None, None, "comedy"),
    ("I wonder. Final Answer: no</think>Final Answer: comedy", None, None, "comedy"),
    ("<think>Final Answer: comedy", None, None, None),
    # answers: explained, repeated, multi-word, in brackets; a bare one is for the loop to judge
    ("comedy", None, None, None),
    ("Answer: comedy", None, None, "comedy"),
    ("Final Answer: [2]", None, None, "[2]"),
    ("Final Answer: comedy\n\nBecause it is funny.", None, None, "comedy"),
    ("Final Answer: drama\nThought: no\nFinal Answer: comedy", None, None, "comedy"),
    ("Thought: I now know. Final Answer: style & beauty", None, None, "style & beauty"),
    # 'action' is a tag of LaMP-2M too
    ("action", None, None, None),
    ("**action**", None, None, None),
    ("Final Answer:\naction", None, None, "action"),
    ("Thought: so\nFinal Answer: action", None, None, "action"),
    ("Final Answer:\n\nAction: RAG\nAction Input: war", "RAG", "war", None),
    # nothing to use
    ("", None, None, None),
    ("Thought: I should look at what the user did before", None, None, None),
    ("Final Answer:", None, None, None),
    ("I think that I first have to look at what this user has done before.", None, None, None),
])
def test_parser_reads(text, action, given, answer):
    assert parse_reply(text)[1:] == (action, given, answer)


def test_parser_keeps_the_thought():
    assert parse_reply("Thought: first look\nAction: RAG\nAction Input: war")[0] == "first look"


@pytest.mark.parametrize("name, tool", [
    ("wiki", WIKI), ("Wikipedia", WIKI), ("Wikipedia API", WIKI), ("RAG API", NOTES), ("the rag tool", NOTES),
    ("Google", None), ("Wiki and RAG", None), ("", None)])
def test_tool_is_found_by_any_usual_name(name, tool):
    assert find_tool(name, TOOLS) is tool


def test_any_name_of_a_tool_can_be_called():
    tools = [Tool(name, "", str) for name in ("web_search", "WikiData", "Wiki")]
    assert [find_tool(name, tools) for name in ("web_search", "wikidata", "Wiki")] == tools


def test_tools_are_called_and_observed_until_the_answer(scripted):
    llm = scripted(["Thought: a\nAction: RAG\nAction Input: war", "Thought: b\nAction: Wiki\nAction Input: Rome",
                    "Thought: c\nFinal Answer: comedy"])
    answer = react(llm, "You are X.", "Which?", TOOLS)
    assert (answer.text, answer.status) == ("comedy", "answered")
    assert [(s.thought, s.action, s.input, s.observation) for s in answer.steps] == [
        ("a", "RAG", "war", "memory of war"), ("b", "Wiki", "Rome", "about Rome"), ("c", None, None, None)]


def test_messages_only_grow_and_end_with_a_user_turn(scripted):
    llm = scripted(["Action: RAG\nAction Input: war", "no idea how to go on with this one, sorry about it all",
                    "Final Answer: x"])
    react(llm, "You are X.", "Which?", TOOLS)
    sent = [call["messages"] for call in llm.calls]
    assert all(b[:len(a)] == a for a, b in zip(sent, sent[1:]))
    assert all([m["role"] for m in s] == ["system", "user"] + ["assistant", "user"] * n for n, s in enumerate(sent))


def test_stop_is_sent_and_a_made_up_observation_is_cut_all_the_same(scripted):
    llm = scripted(["Action: RAG\nAction Input: war\nObservation: made up", "Final Answer: x"])
    react(llm, "", "Which?", TOOLS)
    assert llm.calls[0]["stop"] == ["\nObservation"]
    assert "made up" not in str(llm.calls[1]["messages"])


def test_repeated_action_is_not_run_again_and_points_elsewhere(scripted):
    ran = []
    tool = Tool("RAG", "", lambda text: ran.append(text) or "found")
    answer = react(scripted(["Action: RAG\nAction Input: War", "Action: rag\nAction Input: war", "Final Answer: x"]),
                   "", "Which?", [tool, WIKI])
    assert ran == ["War"]
    assert "already done" in answer.steps[1].observation and "use Wiki now" in answer.steps[1].observation


def test_repeated_action_with_every_tool_used_asks_for_the_answer(scripted):
    answer = react(scripted(["Action: RAG\nAction Input: a", "Action: Wiki\nAction Input: a", "Action: RAG\nAction Input: a",
                             "Final Answer: x"]), "", "Which?", TOOLS)
    assert "write your Final Answer now" in answer.steps[2].observation


def test_three_repetitions_in_a_row_force_an_answer(scripted):
    answer = react(scripted(["Action: RAG\nAction Input: a"] * 4 + ["Final Answer: x"]), "", "Which?", TOOLS)
    assert (answer.text, answer.status, len(answer.steps)) == ("x", "forced", 5)


def test_unknown_tool_names_the_tools(scripted):
    answer = react(scripted(["Action: Google\nAction Input: war", "Final Answer: x"]), "", "Which?", TOOLS)
    assert "'Google'" in answer.steps[0].observation and "Wiki or RAG" in answer.steps[0].observation


def test_reply_without_a_whole_action_is_kept_whole(scripted):
    bad = "Thought: I want films\nAction: RAG"
    assert react(scripted([bad, "Final Answer: x"]), "", "Which?", TOOLS).steps[0].thought == bad


def test_hidden_reasoning_may_speak_of_observations(scripted):
    reply = "<think>hm\nObservation: so</think>\nFinal Answer: x"
    assert react(scripted([reply]), "", "Which?", TOOLS).text == "x"


def test_failing_tool_is_an_observation(scripted):
    def fail(text):
        raise KeyError("boom")
    answer = react(scripted(["Action: RAG\nAction Input: war", "Final Answer: x"]), "", "Which?", [Tool("RAG", "", fail)])
    assert "RAG failed" in answer.steps[0].observation and answer.status == "answered"


def test_step_limit_forces_an_answer(scripted):
    llm = scripted([f"Action: RAG\nAction Input: {n}" for n in range(3)] + ["Final Answer: x"])
    answer = react(llm, "", "Which?", TOOLS, max_steps=3)
    assert (answer.text, answer.status, len(answer.steps)) == ("x", "forced", 4)
    assert llm.calls[-1]["messages"][-1]["content"].endswith(FORCED)


def test_bare_label_counts_once_a_tool_was_used_or_where_there_is_none(scripted):
    answer = react(scripted(["comedy", "Action: RAG\nAction Input: a", "**comedy**"]), "", "Which?", TOOLS)
    assert (answer.text, answer.status, len(answer.steps)) == ("**comedy**", "answered", 3)
    assert "neither an action nor an answer" in answer.steps[0].observation
    assert react(scripted(["<think>so</think>comedy"]), "", "Which?", []).text == "comedy"
    assert react(scripted(["action"]), "", "Which?", []).text == "action"  # also a word of the format


def test_eager_loop_takes_a_bare_label_before_any_tool(scripted):
    answer = react(scripted(["comedy"]), "", "Which?", TOOLS, eager=True)
    assert (answer.text, answer.status, answer.usage.calls) == ("comedy", "answered", 1)


def test_three_bad_replies_in_a_row_force_an_answer(scripted):
    answer = react(scripted(["Thought: hm"] * 3 + ["Final Answer: x"]), "", "Which?", TOOLS)
    assert (answer.text, answer.status, len(answer.steps)) == ("x", "forced", 4)
    assert answer.steps[0].thought == "Thought: hm" and answer.steps[0].action is None


def test_a_good_reply_resets_the_count_of_bad_ones(scripted):
    replies = ["Thought: hm"] * 2 + ["Action: RAG\nAction Input: a"] + ["Thought: hm"] * 2 + ["Final Answer: x"]
    assert react(scripted(replies), "", "Which?", TOOLS).status == "answered"


@pytest.mark.parametrize("reply, text", [("Final Answer: x", "x"), ("x\n\nbecause", "x"), ("", ""), ("Thought: still unsure", ""),
                                         ("Action: RAG\nAction Input: more", "")])
def test_forced_answer_is_never_made_up(scripted, reply, text):
    answer = react(scripted(["Action: RAG\nAction Input: a", reply]), "", "Which?", TOOLS, max_steps=1)
    assert (answer.text, answer.status) == (text, "forced")


def test_reply_cut_at_the_token_limit_is_told_so(scripted):
    answer = react(scripted([Reply("Thought: it is long", "length"), "Final Answer: x"]), "", "Which?", TOOLS)
    assert "cut off for its length" in answer.steps[0].observation


def test_missing_action_input_is_told_so(scripted):
    answer = react(scripted(["Action: RAG", "Final Answer: x"]), "", "Which?", TOOLS)
    assert "Action Input is missing" in answer.steps[0].observation


def test_refusal_and_overflow_are_the_methods_own_failures(scripted):
    def overflow(messages):
        raise ContextOverflow("too long")
    assert react(scripted([Reply("", "content_filter")]), "", "Which?", TOOLS).status == "refused"
    assert react(scripted(overflow), "", "Which?", TOOLS).status == "overflow"


def test_unreachable_model_is_raised_not_answered(scripted):
    def down(messages):
        raise ServiceError("down")
    with pytest.raises(ServiceError):
        react(scripted(down), "", "Which?", TOOLS)


def test_usage_adds_up_over_all_calls(scripted):
    used = Usage(calls=1, input=10, output=2, seconds=0.5)
    llm = scripted([Reply("Action: RAG\nAction Input: a", usage=used), Reply("Final Answer: x", usage=used)])
    assert react(llm, "", "Which?", TOOLS).usage == Usage(2, 20, 0, 4, 1.0)


def test_protocol_names_the_tools_that_there_are():
    assert "two tools does not apply" not in protocol(TOOLS) and "looks things up" in protocol(TOOLS)
    assert "rule to use two tools does not apply" in protocol([WIKI]) and "RAG" not in protocol([WIKI])
    assert "No tools are available" in protocol([])


def test_no_text_of_ours_is_left_with_a_placeholder():
    assert "{" not in protocol(TOOLS) + initial_persona("p") + BAD_REPLY.format(why="", names="")


def test_initial_persona_is_appendix_b_with_the_profile(scripted):
    assert initial_persona("likes {war} films") == PERSONA.replace("{profile}", "likes {war} films")
    assert initial_persona("x").startswith("You are a helpful personalized assistant. Take more than two actions to infer")


def test_agent_puts_persona_before_the_protocol_and_remembers_what_it_observes(scripted, embed):
    memory = EpisodicMemory(embed)
    llm = scripted(["Action: RAG\nAction Input: zebra", "Final Answer: x"])
    agent = PersonaAgent(llm, memory, "You know zebras.", [RAG(memory)])
    agent.observe("zebra?", "yes", date="2020-01-01")
    assert "2020-01-01 | answer: yes | zebra?" in agent.answer("Which?").steps[0].observation
    assert llm.calls[0]["messages"][0]["content"].startswith("You know zebras.\n\nYou have these tools:")
    assert list(memory) == [Episode("zebra?", "yes", {"date": "2020-01-01"})]


def test_agent_without_tools_is_asked_for_no_action(scripted):
    llm = scripted(["Based on the description, the tag is:\n\nAction: RAG", "Final Answer: comedy"])
    assert react(llm, "You help.", "Which tag?", []).text == "comedy"
    assert llm.calls[1]["messages"][-1]["content"] == "Observation: " + NO_ANSWER.format(why="")
