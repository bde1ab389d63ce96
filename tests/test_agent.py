"""Reading a reply, on every kind that models send, and the loop, one behaviour a test."""

import json
from pathlib import Path

import pytest

import persona_agent
from memory import EpisodicMemory
from persona_agent import Reply, ServiceError, Usage, find_tool, parse_reply, protocol, react
from tools import ENOUGH, RAG, Tool

TABLES = Path(__file__).parent / "tables"
REPLIES = json.loads((TABLES / "replies.json").read_text("utf-8"))
TEXTS = json.loads((TABLES / "texts.json").read_text("utf-8"))
WIKI = Tool("Wiki", "looks things up", lambda text: f"about {text}")
NOTES = Tool("RAG", "remembers", lambda text: f"memory of {text}")
TOOLS = [WIKI, NOTES]
ACT, HM, END = "Action: RAG\nAction Input: a", "Thought: hm", "Final Answer: x"
GOOGLE, ROME = "Action: Google\nAction Input: a", "Action: Wiki\nAction Input: Rome"


def test_a_reply_is_read():
    wanted = {text: tuple(parts) for text, *parts in REPLIES["replies"]}
    assert {text: parse_reply(text)[1:] for text in wanted} == wanted


def test_a_forced_reply_is_read_for_its_answer_first():
    wanted = dict(REPLIES["forced"])
    assert {text: parse_reply(text, answer_first=True).answer for text in wanted} == wanted


def test_the_text_of_a_reply_has_no_hidden_reasoning_and_no_special_tokens():
    wanted = dict(TEXTS)
    assert {raw: Reply(raw).text for raw in wanted} == wanted


def test_the_thought_of_a_reply_is_kept():
    assert parse_reply("Thought: so far\nAction: RAG\nAction Input: war").thought == "so far"


FRAMES = [("", "\n!"), ("Final Answer: x", "!"), (ACT[:-1], ""), ("# Action", "\n```")]


@pytest.mark.parametrize("repeated", REPLIES["repeated"])
def test_100_000_characters_are_read_within_a_second(one_second, repeated):
    for before, after in FRAMES:
        parse_reply(before + (repeated * 100_000)[:100_000] + after)


@pytest.mark.parametrize("depth", [900, 50_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}"), ('"', '"')])
def test_an_input_nested_to_any_depth_is_read(depth, opening, closing):
    nested = opening * depth + closing * depth
    assert parse_reply(f"Action: RAG\nAction Input: {nested}").action == "RAG"
    assert parse_reply(f'{{"action": "RAG", "action_input": {nested}}}').answer is None


@pytest.fixture
def play(scripted):
    """A function from a model's replies to the answer of the loop and the calls of the model."""

    def played(*replies, tools=TOOLS, **options):
        llm = scripted(list(replies))
        return react(llm, "You are X.", "Which?", tools, **options), llm.calls

    return played


def last(call):
    """What the model was told last."""
    return call["messages"][-1]["content"]


def test_tools_are_called_and_observed_until_the_answer(play):
    answer, _ = play(f"Thought: a\n{ACT}", ROME, END)
    assert (answer.text, answer.status) == ("x", "answered")
    assert [(s.thought, s.action, s.input, s.observation) for s in answer.steps] == [
        ("a", "RAG", "a", "memory of a"),
        ("", "Wiki", "Rome", "about Rome"),
        ("", None, None, None),
    ]


def test_messages_only_grow_and_end_with_a_user_turn(play):
    _, calls = play(ACT, HM, "", "Action: Google\nAction Input: a", END)
    sent = [call["messages"] for call in calls]
    assert all(after[: len(before)] == before for before, after in zip(sent, sent[1:]))
    roles = [[message["role"] for message in messages] for messages in sent]
    assert roles == [["system", "user"] + ["assistant", "user"] * n for n in range(5)]
    assert all(message["content"] for message in sent[-1])


def test_system_is_persona_and_protocol_and_user_is_the_question(play):
    [system, user] = play(END)[1][0]["messages"]
    assert system["content"] == f"You are X.\n\n{protocol(TOOLS)}" and user["content"] == "Which?"


def test_an_observation_that_the_model_makes_up_is_stopped_and_cut(play):
    _, calls = play(f"{ACT}\nObservation: made up", END)
    assert calls[0]["stop"] == ["\nObservation"]
    assert "made up" not in str(calls[1]["messages"])


def test_hidden_reasoning_may_speak_of_observations(play):
    assert play(f"<think>so\nObservation: none</think>{END}")[0].text == "x"


@pytest.mark.parametrize("first, instead", [([], "use Wiki now"), ([ROME], "Final Answer now")])
def test_a_repeated_action_is_not_done_again_and_points_elsewhere(play, first, instead):
    done = []
    notes = Tool("RAG", "", lambda text: done.append(text) or "found")
    answer, _ = play(*first, ACT, ACT.replace("RAG", "rag api").upper(), END, tools=[WIKI, notes])
    assert done == ["a"]
    assert "already done" in answer.steps[-2].observation
    assert instead in answer.steps[-2].observation


DEAD_ENDS = [[HM] * 3, [HM, GOOGLE, ""], [ACT] * 4, [HM, HM, ACT, HM, HM, HM]]


@pytest.mark.parametrize("replies", DEAD_ENDS)
def test_three_replies_in_a_row_that_lead_nowhere_force_an_answer(play, replies):
    answer, calls = play(*replies, END)
    assert (answer.text, answer.status, len(answer.steps)) == ("x", "forced", len(replies) + 1)
    assert last(calls[-1]).endswith(persona_agent.FORCED)


def test_the_step_limit_forces_an_answer(play):
    inputs = [f"Action: RAG\nAction Input: {i}" for i in range(3)]
    answer, calls = play(*inputs, END, max_steps=3)
    assert (answer.text, answer.status, len(calls)) == ("x", "forced", 4)
    assert last(calls[3]) == f"Observation: memory of 2\n\n{persona_agent.FORCED}"


NINE = "1 2 3 4 5 6 7 8 9"
LAST_WORDS = {f"{ACT}\n{END}": "x", f"{NINE}\n\nwhy": NINE, HM: "", "": "", ACT: ""}


@pytest.mark.parametrize("reply, text", LAST_WORDS.items())
def test_a_forced_answer_is_found_but_never_made_up(play, reply, text):
    answer, _ = play("Action: RAG\nAction Input: b", reply, max_steps=1)
    assert (answer.text, answer.status) == (text, "forced")


@pytest.mark.parametrize(
    "replies, options, text",
    [
        (["comedy", END], {}, "x"),
        ([ACT, "**comedy**"], {}, "**comedy**"),
        (["comedy"], {"eager": True}, "comedy"),
        (["action"], {"tools": []}, "action"),
        (["I think that the tag of this film is comedy", END], {"eager": True}, "x"),
    ],
)
def test_a_bare_label_counts_once_a_tool_was_used_or_none_is_needed(play, replies, options, text):
    answer, calls = play(*replies, **options)
    assert (answer.text, answer.status, len(calls)) == (text, "answered", len(replies))


@pytest.mark.parametrize(
    "reply, words",
    [
        (HM, "neither an action nor an answer in the right form. Write"),
        ("Thought: b\nAction: RAG", "Action Input is missing"),
        (Reply("Thought: it is lo", "length"), "cut off for its length"),
        (GOOGLE, "no tool 'Google'. The tools are: Wiki or RAG."),
    ],
)
def test_a_reply_that_cannot_be_used_is_told_why(play, reply, words):
    answer, calls = play(reply, END)
    told = last(calls[1])
    assert words in told and told == f"Observation: {answer.steps[0].observation}"


@pytest.mark.parametrize("finish, end", [("content_filter", "refused"), ("overflow", "overflow")])
@pytest.mark.parametrize("before", [[], [ACT], [HM, HM, HM]], ids=len)
def test_refusal_and_overflow_end_in_an_empty_answer(play, before, finish, end):
    answer, calls = play(*before, Reply(END, finish))
    assert (answer.text, answer.status, len(answer.steps)) == ("", end, len(before))
    assert answer.usage.calls == len(calls) == len(before) + 1


def broken(error):
    def run(text):
        raise error

    return Tool("RAG", "", run)


def test_a_tool_that_raises_is_an_observation(play):
    answer, _ = play(ACT, END, tools=[broken(KeyError("no {such} zone"))])
    assert answer.text == "x"
    assert answer.steps[0].observation.startswith("RAG failed (KeyError: 'no {such} zone')")


def test_an_outage_of_the_model_or_of_the_embeddings_is_raised(scripted):
    outage = broken(ServiceError("down"))
    for llm, tools in [(scripted(outage), []), (scripted([ACT, END]), [outage])]:
        with pytest.raises(ServiceError, match="down"):
            react(llm, "", "Which?", tools)


def test_usage_adds_up_over_all_calls(play):
    used = Usage(calls=1, input=10, output=2, seconds=0.5)
    answer, _ = play(*[Reply(text, usage=used) for text in (ACT, HM, END)])
    assert answer.usage == Usage(calls=3, input=30, output=6, seconds=1.5)


def test_without_tools_no_action_is_asked_for(play):
    answer, calls = play("The tag is:\n\nAction: RAG", END, tools=[])
    assert "No tools are available" in calls[0]["messages"][0]["content"]
    assert (answer.text, answer.steps[0].thought) == ("x", "The tag is:\n\nAction: RAG")
    assert last(calls[1]).startswith("Observation: That reply has no answer in the right form. ")


def test_the_protocol_names_the_tools_that_there_are():
    assert "Wiki: looks things up\n\nRAG: remembers" in protocol(TOOLS)
    assert "two tools does not apply" in protocol([WIKI]) and "RAG" not in protocol([WIKI])
    assert "two tools does not apply" not in protocol(TOOLS)


NAMED = {"wiki": "Wiki", "Wikipedia API": "Wiki", "wikidata": "WikiData", "arxiv": "arXiv"}
NAMED |= {"RAG API": "RAG", "the rag tool": "RAG", "Google": "", "Wiki and RAG": "", "storage": ""}


@pytest.mark.parametrize("name, meant", NAMED.items())
def test_a_tool_is_found_by_any_usual_name(name, meant):
    tools = [*TOOLS, Tool("arXiv", "", str), Tool("WikiData", "", str)]
    found = find_tool(name, tools)
    assert (found.name if found else "") == meant


def test_the_initial_persona_is_appendix_b_with_the_profile():
    persona = persona_agent.PERSONA.replace("{profile}", "likes {war}")
    assert persona.startswith("You are a helpful personalized assistant. Take more than two ")
    assert "User summary: likes {war}\n\nSTRICT RULES" in persona


def test_an_agent_reads_what_was_remembered(scripted, embed):
    memory = EpisodicMemory(embed)
    llm = scripted(["Action: RAG\nAction Input: zebra", END])
    agent = persona_agent.PersonaAgent(llm, memory, "You know zebras.", [RAG(memory)])
    agent.memory.remember("zebra?", "yes", date="2020-01-01")
    answer = agent.answer("Which?")
    assert answer.steps[0].observation == f"- 2020-01-01 | answer: yes | zebra?{ENOUGH}"
    assert llm.calls[0]["messages"][0]["content"].startswith("You know zebras.\n\n")
