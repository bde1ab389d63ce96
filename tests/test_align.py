"""Algorithm 1 with a scripted model: what reaches which prompt, what a simulation may see, what counts as an update."""
import pytest

from align import GRADIENT_PROMPT, UPDATE_PROMPT, align, fill, is_degenerate, story, unwrap
from memory import Episode, EpisodicMemory
from persona_agent import PersonaAgent, Reply
from dataclasses import asdict
from tools import RAG

GRADIENT, UPDATE = "You are a meticulous and critical", "You are a prompt engineering assistant"
EPISODES = [Episode(f"question {name}?", f"gold {name}") for name in ("one", "two", "three", "four")]


def model(scripted, feedback="Search for zebras.", update="You are the assistant of a lover of zebras.", answer="a guess"):
    """A model that plays all three parts; each part is a text, or a function of the prompt."""
    def reply(messages):
        first, last = messages[0]["content"], messages[-1]["content"]
        part = feedback if first.startswith(GRADIENT) else update if first.startswith(UPDATE) else f"Final Answer: {answer}"
        return part(last) if callable(part) else part
    return scripted(reply)


def build(llm, embed, episodes=EPISODES, persona="You help."):
    memory = EpisodicMemory(embed)
    memory.add(episodes)
    return PersonaAgent(llm, memory, persona, [RAG(memory, 4)])


def prompts(llm, start):
    return [c["messages"][-1]["content"] for c in llm.calls if c["messages"][0]["content"].startswith(start)]


def test_feedback_reaches_the_update_and_the_update_the_next_system_prompt(scripted, embed):
    llm = model(scripted)
    agent = build(llm, embed)
    align(agent, llm, n=2)
    assert "1. Search for zebras.\n\n2. Search for zebras." in prompts(llm, UPDATE)[0]
    assert "Current system prompt: You help." in prompts(llm, UPDATE)[0]
    agent.answer("next?")
    assert llm.calls[-1]["messages"][0]["content"].startswith("You are the assistant of a lover of zebras.\n\n")


def test_gradient_prompt_gets_question_gold_and_final_answer(scripted, embed):
    llm = model(scripted)
    align(build(llm, embed), llm, n=1)
    prompt, = prompts(llm, GRADIENT)
    assert "Question: question four?\n" in prompt and "Expected Answer: gold four\n" in prompt
    assert "Agent Response: a guess\n" in prompt


def test_batch_is_the_latest_labelled_episodes(scripted, embed):
    llm = model(scripted)
    record = align(build(llm, embed, EPISODES + [Episode("no label", "")]), llm, n=3)
    assert [s.expected for s in record.iterations[0].samples] == ["gold two", "gold three", "gold four"]


def test_simulation_sees_only_what_was_known_before(scripted, embed):
    def play(messages):
        last = messages[-1]["content"]
        if last.startswith(GRADIENT):
            return "Search for better words."
        if last.startswith(UPDATE):
            return "You help well."
        return f"Final Answer: {last}" if last.startswith("Observation") else "Action: RAG\nAction Input: question gold"
    llm = scripted(play)
    record = align(build(llm, embed), llm, n=3)
    seen = [s.answer.steps[0].observation for s in record.iterations[0].samples]
    for i, observation in enumerate(seen):
        assert all((e.response in observation) == (j < i + 1) for j, e in enumerate(EPISODES))


def test_simulation_does_not_see_an_earlier_answer_to_the_same_question(scripted, embed):
    def play(messages):
        last = messages[-1]["content"]
        if last.startswith((GRADIENT, UPDATE)):
            return "You help people very well."
        return "Final Answer: x" if last.startswith("Observation") else "Action: RAG\nAction Input: question"
    llm, twice = scripted(play), [Episode("The kettle broke", "1"), Episode("A good pan", "5"), Episode("the  KETTLE broke", "1")]
    agent = build(llm, embed, twice)
    seen = align(agent, llm, n=1).iterations[0].samples[0].answer.steps[0].observation
    assert "pan" in seen and "kettle" not in seen.lower() and len(agent.memory) == 3


def test_tools_of_the_agent_itself_stay_bound_to_the_whole_memory(scripted, embed):
    llm = model(scripted)
    agent = build(llm, embed)
    tools = agent.tools
    align(agent, llm)
    assert agent.tools is tools and len(tools[0].memory) == 4


def test_iterations_repeat_the_batch_from_the_persona_before(scripted, embed):
    personas = iter(["You are one.", "You are two."])
    llm = model(scripted, update=lambda prompt: next(personas))
    record = align(build(llm, embed), llm, n=2, iterations=2)
    assert [(i.before, i.after) for i in record.iterations] == [("You help.", "You are one."), ("You are one.", "You are two.")]
    assert (record.initial, record.final) == ("You help.", "You are two.")
    assert "Current system prompt: You are one." in prompts(llm, UPDATE)[1]


@pytest.mark.parametrize("feedback", ["", "3", "5", "The rating should be 2.", "dark comedy", "gold four", "Expected Answer: gold four.", "The correct answer is a guess.",
                                      "Search for " + "travel psychology, " * 60])
def test_degenerate_feedback_is_dropped_and_an_update_from_nothing_not_made(scripted, embed, feedback):
    llm = model(scripted, feedback=feedback)
    agent = build(llm, embed, [Episode("q?", "gold four 3")])
    record = align(agent, llm)
    assert record.iterations[0].samples[0].degenerate
    assert (record.iterations[0].accepted, record.iterations[0].reason) == (False, "no usable feedback")
    assert agent.persona == "You help." and not prompts(llm, UPDATE)


def test_only_usable_feedback_is_aggregated(scripted, embed):
    llm = model(scripted, feedback=lambda p: "gold four" if "question four?" in p else "Search for zebras.")
    align(build(llm, embed), llm, n=2)
    assert "Provided Feedback: 1. Search for zebras.\n\nBased on" in prompts(llm, UPDATE)[0]


def test_feedback_with_substance_is_not_degenerate():
    assert not is_degenerate("The user prefers 3 for good products.", "3", "4")


@pytest.mark.parametrize("update, reason", [
    (Reply("", "stop"), "empty"), (Reply("---\n\n---", "stop"), "empty"),
    (Reply("You are the assistant of", "length"), "token limit"), (Reply("", "content_filter"), "refused"),
    (Reply("word " * 1510, "stop"), "1510 words"), (Reply("You help.", "stop"), "repeats"),
    (Reply("word " * 401, "stop"), "4 times"), (Reply("I'm sorry, but I can't assist with that.", "stop"), "refused"),
    (Reply("Be short.", "stop"), "the persona before it 1000")])
def test_failed_update_keeps_the_persona_and_says_why(scripted, embed, update, reason):
    llm = model(scripted, update=lambda prompt: update)
    agent = build(llm, embed, persona="word " * 1000 if "10" in reason else "You help.")
    before = agent.persona
    step, = align(agent, llm, n=1).iterations
    assert not step.accepted and reason in step.reason
    assert agent.persona == step.after == before and step.reply == update.text


PROMPT = "You are the assistant of a chemist.\n\n**Rules:**\n1. Be brief.\n2. Use tools.\n\n---\n\nMore rules: this prompt is final."


@pytest.mark.parametrize("reply", [
    PROMPT, f'"{PROMPT}"', f"```\n{PROMPT}\n```", f"```markdown\n{PROMPT}\n```\n\nLet me know if it fits.",
    f"Certainly! Here is an updated system prompt:\n\n---\n\n{PROMPT}\n\n---\n\nThis updated prompt highlights the user.",
    f"**Updated System Prompt:**\n\n{PROMPT}", f"### New system prompt\n{PROMPT}", f"New system prompt: {PROMPT}",
    f"Here is the revised version of the prompt that reflects the feedback:\n{PROMPT}\n\nFeel free to change it.",
    f"Sure!\n\n{PROMPT}\n\n---\n\nThese changes make sure that:\n\n- a\n\n- b"])
def test_packaging_is_not_part_of_the_persona(reply):
    assert unwrap(reply) == PROMPT


@pytest.mark.parametrize("text", [
    "You are X.\n\nIf you need background on a film, use Wiki.", "You are X.\n\nThis persona prefers classics.",
    "You are X.\n\nWith these preferences in mind, choose 'classic'.", "Of course you must always search memory first.\n\nBe brief.",
    "You are an agent for this persona:\n- likes war films", "You are X.\n\nIf you need any background, ask Wiki.",
    "You are X.\n\nKey changes in taste: the user moved to horror.", "You are X.\n\nPlease let me know your sources in one line.",
    "You are X.\n\nThe system prefers short answers."])
def test_content_that_looks_like_packaging_stays(text):
    assert unwrap(text) == text


def test_placeholder_in_a_value_stays_as_it_is():
    role, filled = (m["content"] for m in fill(GRADIENT_PROMPT, {"Question": "[Response] {x}", "Ground Truth": "[1]", "Response": "[Question]"}))
    assert role == "You are a meticulous and critical evaluator of personalized AI agent responses."
    assert "Question: [Response] {x}\n" in filled and "Expected Answer: [1]\n" in filled
    assert "Agent Response: [Question]\n" in filled


def test_prompts_hold_the_papers_placeholders():
    assert all(GRADIENT_PROMPT.count(p) == 1 for p in ("[Question]", "[Ground Truth]", "[Response]"))
    assert all(UPDATE_PROMPT.count(p) == 1 for p in ("[Current Persona]", "[Aggregated Feedback]"))


def test_nothing_labelled_means_no_call(scripted, embed):
    llm = model(scripted)
    record = align(build(llm, embed, [Episode("no label", "")]), llm)
    assert record.iterations == [] and record.final == "You help." and llm.calls == []


def test_story_tells_answers_feedback_and_personas(scripted, embed):
    llm = model(scripted)
    text = story(asdict(align(build(llm, embed), llm, n=1)))
    for part in ("You help.", "question four?", "Answer: 'a guess'", "gold four", "Search for zebras.", "lover of zebras"):
        assert part in text
