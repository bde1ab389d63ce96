"""Alignment with a scripted model: what reaches which prompt, what a simulation may see, which
updates are accepted. tables/alignment.json holds replies, feedbacks and spellings."""

import hashlib
import json
import threading
from pathlib import Path

import pytest

from align import GRADIENT_PROMPT, UPDATE_PROMPT, align, bare, fill, is_degenerate, unwrap
from memory import Episode, EpisodicMemory
from persona_agent import PersonaAgent, Reply
from tools import ENOUGH, RAG

TABLE = json.loads((Path(__file__).parent / "tables" / "alignment.json").read_text("utf-8"))
QUESTION = TABLE["question"]
SPELLED = [other for text, other, _ in TABLE["texts"] if text == QUESTION]
GRADIENT, UPDATE = (prompt.split("\n\n")[0] for prompt in (GRADIENT_PROMPT, UPDATE_PROMPT))
DIGESTS = {GRADIENT_PROMPT: "8f5bb48bd8533428", UPDATE_PROMPT: "28c7086d8da67a93"}
ROLES = {GRADIENT: "feedback", UPDATE: "update"}
EPISODES = [Episode(f"question {i}?", f"gold {i}") for i in (1, 2, 3, 4)]
ZEBRAS = "Search for zebras."
PARTS = {"answer": "Final Answer: a guess", "feedback": ZEBRAS, "update": "Sure!\n\nYou know."}


@pytest.fixture
def aligned(scripted, embed):
    """A function to an aligned agent and what alignment did. The model plays three parts, each a
    text, a Reply, or a function of what the model is told last."""

    def run(n=1, iterations=1, episodes=EPISODES, persona="You help.", **parts):
        def reply(messages):
            part = (PARTS | parts)[ROLES.get(messages[0]["content"], "answer")]
            return part(messages[-1]["content"]) if callable(part) else part

        memory = EpisodicMemory(embed)
        memory.add(episodes)
        agent = PersonaAgent(scripted(reply), memory, persona, [RAG(memory, 9)])
        return agent, align(agent, agent.llm, n, iterations)

    return run


def told(agent, role):
    """What the model was told last, in the calls whose system message begins so."""
    calls = [call["messages"] for call in agent.llm.calls]
    return [call[-1]["content"] for call in calls if call[0]["content"].startswith(role)]


def look(last):
    """Reads the memory once, then answers."""
    return "Final Answer: x" if "Obs" in last else "Action: RAG\nAction Input: question"


@pytest.mark.parametrize("prompt, digest", DIGESTS.items(), ids=["gradient", "update"])
def test_the_prompts_are_the_papers_word_for_word(prompt, digest):
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == digest


def test_a_placeholder_inside_a_value_stays():
    values = {"Question": "[Response] {x} \\1", "GroundTruth": "[1]", "Response": "[Question]"}
    role, filled = (message["content"] for message in fill(GRADIENT_PROMPT, **values))
    assert role.startswith(GRADIENT) and filled.startswith("Analyze the following")
    assert "Question: [Response] {x} \\1\n\nExpected Answer: [1]\n\nAgent Response: [Q" in filled


def test_the_gradient_prompt_gets_question_gold_and_answer(aligned):
    (prompt,) = told(aligned()[0], GRADIENT)
    question = "Question: <question>\nquestion 4?\n</question>\n\nExpected Answer: "
    gold = "<expected_answer>\ngold 4\n</expected_answer>\n\nAgent Response: "
    assert f"{question}{gold}<agent_response>\na guess\n</agent_response>\n\nYour" in prompt


def test_the_feedback_reaches_the_update_and_the_update_the_next_answer(aligned):
    agent, record = aligned(n=2)
    assert f"Feedback: 1. {ZEBRAS}\n\n2. {ZEBRAS}\n\nBased on" in told(agent, UPDATE)[0]
    assert "Current system prompt: You help.\n\n" in told(agent, UPDATE)[0]
    assert agent.llm.calls[-1]["max_tokens"] == 2048
    assert (record.initial, record.final, agent.persona) == ("You help.", "You know.", "You know.")
    agent.answer("next?")
    assert agent.llm.calls[-1]["messages"][0]["content"].startswith("You know.\n\n")


def test_the_batch_is_the_last_n_labelled_episodes(aligned):
    _, record = aligned(n=3, episodes=[*EPISODES, Episode("unlabelled", "")])
    (step,) = record.iterations
    assert [sample.expected for sample in step.samples] == ["gold 2", "gold 3", "gold 4"]


@pytest.mark.parametrize("episodes, n", [([], 3), ([Episode("unlabelled", "")], 3), (EPISODES, 0)])
def test_nothing_labelled_means_no_call(aligned, episodes, n):
    agent, record = aligned(n, episodes=episodes)
    assert (record.iterations, record.final, agent.llm.calls) == ([], "You help.", [])


def test_a_simulation_sees_the_past_only(aligned):
    agent, record = aligned(n=3, answer=look)
    for place, sample in enumerate(record.iterations[0].samples, 1):
        seen = sample.answer.steps[0].observation
        assert [e.response in seen for e in EPISODES] == [i < place for i in range(4)]
    assert agent.tools[0].memory is agent.memory and len(agent.memory) == 4


@pytest.mark.parametrize("before", SPELLED)
def test_a_simulation_does_not_see_the_same_question_in_another_spelling(aligned, before):
    episodes = [Episode(query, "5") for query in (before, "A pan", QUESTION)]
    _, record = aligned(answer=look, episodes=episodes)
    (step, *_) = record.iterations[0].samples[0].answer.steps
    assert step.observation == f"- answer: 5 | A pan{ENOUGH}"


def test_the_simulations_of_a_batch_run_side_by_side(aligned):
    barrier = threading.Barrier(3, timeout=10)
    agent, _ = aligned(n=3, answer=lambda last: f"Final Answer: {barrier.wait()}")
    assert agent.persona == "You know."


def test_iterations_repeat_the_batch_from_the_last_persona(aligned):
    replies = iter(["You are one.", "", "You are two."])
    agent, record = aligned(iterations=3, update=lambda last: next(replies))
    befores = ["You help.", "You are one.", "You are one."]
    assert [step.before for step in record.iterations] == befores
    assert [step.after for step in record.iterations] == [*befores[1:], "You are two."]
    assert [step.accepted for step in record.iterations] == [True, False, True]
    assert len(told(agent, "You are one.")) == 2 and agent.persona == record.final


@pytest.mark.parametrize("finish", ["overflow", "content_filter"])
@pytest.mark.parametrize("part", ["answer", "feedback"])
def test_a_failed_simulation_or_gradient_is_an_empty_text_and_degenerate(aligned, part, finish):
    _, record = aligned(**{part: Reply("", finish)})
    (sample,) = record.iterations[0].samples
    assert {"answer": sample.answer.text, "feedback": sample.feedback}[part] == ""
    assert sample.degenerate


def test_only_usable_feedback_reaches_the_update(aligned):
    agent, _ = aligned(n=2, feedback=lambda last: "gold 4" if "question 4" in last else ZEBRAS)
    assert f"Feedback: 1. {ZEBRAS}\n\nBased on" in told(agent, UPDATE)[0]


def test_from_no_usable_feedback_no_update_is_made(aligned):
    agent, record = aligned(feedback="Expected Answer: gold 4.")
    (step,) = record.iterations
    assert (step.reasons, step.after, step.reply) == (["no usable feedback"], "You help.", "")
    assert step.samples[0].degenerate and not told(agent, UPDATE)


@pytest.mark.parametrize("text, times, finish, words, reasons", TABLE["updates"])
def test_an_update_is_accepted_or_says_why_not(aligned, text, times, finish, words, reasons):
    before, reply = " ".join(["old"] * words), Reply(text * times, finish)
    agent, record = aligned(persona=before, update=reply)
    (step,) = record.iterations
    assert (step.reasons, step.accepted, step.reply) == (reasons, not reasons, reply.text)
    assert agent.persona == step.after == (before if reasons else reply.text.strip())


COPY = "You help. Say at once whether a film is old and loud, or new."
RECORDED = {"You help. Say zebra, say war.": (0.6, []), COPY: (0.857, [1]), "You help.": (0, [])}


@pytest.mark.parametrize("update, found", RECORDED.items())
def test_new_words_and_copies_of_a_batch_item_are_recorded(aligned, update, found):
    films = ["Is it old?", "Say at once whether a film is old and loud, or new and quiet!"]
    _, record = aligned(n=2, episodes=[Episode(film, "yes") for film in films], update=update)
    (step,) = record.iterations
    assert (round(step.new, 3), step.quoted) == found


@pytest.mark.parametrize("opening, closing", TABLE["wrappings"])
def test_packaging_is_not_part_of_a_prompt(opening, closing):
    for prompt in TABLE["prompts"]:
        assert unwrap(opening + prompt + closing) == prompt


@pytest.mark.parametrize("text", TABLE["contents"])
def test_content_that_looks_like_packaging_stays(text):
    assert unwrap(text) == text


@pytest.mark.parametrize("feedback, answers, degenerate", TABLE["feedbacks"])
def test_feedback_that_teaches_nothing_is_degenerate(feedback, answers, degenerate):
    assert is_degenerate(feedback, *answers) == degenerate


@pytest.mark.parametrize("text, other, same", TABLE["texts"])
def test_spellings_of_one_text_are_the_same(text, other, same):
    assert (bare(text) == bare(other)) == same
