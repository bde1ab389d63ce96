"""Against a real server, off unless LIVE_BASE_URL is set (see live_server.py): the wire, not the
quality of the answers. LIVE_MODEL and LIVE_EMBED_MODEL name the models."""

import os

import numpy as np
import pytest

from memory import EpisodicMemory
from persona_agent import PERSONA, OpenAICompatible, PersonaAgent, ServiceError
from tools import RAG

BASE_URL = os.environ.get("LIVE_BASE_URL")
MODEL = os.environ.get("LIVE_MODEL", "smollm2")
pytestmark = pytest.mark.skipif(not BASE_URL, reason="LIVE_BASE_URL is not set")


@pytest.fixture(scope="module")
def llm():
    return OpenAICompatible(MODEL, os.environ.get("LIVE_EMBED_MODEL", MODEL), BASE_URL)


def ask(llm, text, **options):
    system = {"role": "system", "content": "You are brief."}
    return llm.chat([system, {"role": "user", "content": text}], **options)


def test_chat_answers_and_counts(llm):
    reply = ask(llm, "Say hello.", max_tokens=8)
    assert reply.text
    assert reply.finish in ("stop", "length")
    assert reply.usage.calls == 1
    assert reply.usage.input > 5
    assert 1 <= reply.usage.output <= 8
    assert reply.usage.seconds > 0


def test_max_tokens_cut_the_reply(llm):
    reply = ask(llm, "Count from one to one hundred in words.", max_tokens=4)
    assert reply.finish == "length"


def test_stop_string_ends_the_reply_and_is_not_part_of_it(llm):
    text = ask(llm, "Write three sentences about cats.", stop=["."], max_tokens=60).text
    assert text
    assert "." not in text


def test_lone_surrogate_is_no_broken_request(llm):
    assert ask(llm, "What is \ud83d?", max_tokens=4).usage.output > 0


def test_embeddings_come_in_order_and_tell_texts_apart(llm):
    texts = ["a dog barks at the cat", "the stock market fell", "a dog barks at the cat", " "]
    rows = llm.embed(texts)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert len(rows) == 4
    # Batched on the server, equal texts are not equal to the last digit.
    assert unit[0] @ unit[2] > 0.9 > unit[0] @ unit[1]


def test_text_too_long_for_the_embedding_model_is_cut_not_refused(llm):
    assert len(llm.embed(["word " * 30_000])) == 1


def test_prompt_longer_than_the_context_is_an_overflow(llm):
    assert ask(llm, "word " * 300_000, max_tokens=4).finish == "overflow"


def test_wrong_path_is_told_with_advice(llm):
    elsewhere = OpenAICompatible(MODEL, base_url=f"{BASE_URL}/nowhere")
    with pytest.raises(ServiceError, match="404.*base URL"):
        ask(elsewhere, "hello", max_tokens=4)


def test_whole_question_goes_through_the_agent(llm):
    memory = EpisodicMemory(llm.embed)
    memory.remember("Tag a film about war.", "classic")
    memory.remember("Tag a film about dogs.", "comedy")
    persona = PERSONA.replace("{profile}", "The user likes old films.")
    agent = PersonaAgent(llm, memory, persona, [RAG(memory, 1)], max_steps=2)
    answer = agent.answer("Which tag fits a film about a soldier? Just answer comedy or classic.")
    assert answer.status in ("answered", "forced")
    assert answer.usage.output > 0
    assert all(step.observation for step in answer.steps if step.action)
