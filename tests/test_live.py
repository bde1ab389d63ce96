"""Against a real server, off unless LIVE_BASE_URL is set (see live_server.py): the wire, not the quality of the answers.

LIVE_MODEL and LIVE_EMBED_MODEL name the models (default: the one that the server lists)."""
import os

import numpy as np
import pytest

from memory import Episode, EpisodicMemory
from persona_agent import OpenAICompatible, PersonaAgent, initial_persona
from tools import RAG, ContextOverflow, ServiceError

BASE_URL = os.environ.get("LIVE_BASE_URL")
pytestmark = pytest.mark.skipif(not BASE_URL, reason="LIVE_BASE_URL is not set")


@pytest.fixture(scope="module")
def llm():
    model = os.environ.get("LIVE_MODEL") or OpenAICompatible(None, base_url=BASE_URL).models()[0]
    return OpenAICompatible(model, os.environ.get("LIVE_EMBED_MODEL", model), BASE_URL)


def ask(llm, text, **options):
    return llm.chat([{"role": "system", "content": "You are brief."}, {"role": "user", "content": text}], **options)


def test_chat_answers_and_counts(llm):
    reply = ask(llm, "Say hello.", max_tokens=8)
    assert reply.text and reply.finish in ("stop", "length")
    assert reply.usage.calls == 1 and reply.usage.input > 5 and 1 <= reply.usage.output <= 8 and reply.usage.seconds > 0


def test_max_tokens_cut_the_reply(llm):
    assert ask(llm, "Count from one to one hundred in words.", max_tokens=4).finish == "length"


def test_stop_string_ends_the_reply_and_is_not_part_of_it(llm):
    text = ask(llm, "Write three sentences about cats.", stop=["."], max_tokens=60).text
    assert text and "." not in text


def test_lone_surrogate_is_no_broken_request(llm):
    assert ask(llm, "What is \ud83d?", max_tokens=4).usage.output > 0


def test_embeddings_come_in_order_and_tell_texts_apart(llm):
    rows = llm.embed(["a dog barks at the cat", "the stock market fell", "a dog barks at the cat", " "])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert rows.shape[0] == 4 and rows.dtype == np.float32
    assert unit[0] @ unit[2] > 0.9 > unit[0] @ unit[1]  # batched on the server, equal texts are not equal to the last digit
    assert llm.embed_usage.calls >= 1


def test_text_too_long_for_the_embedding_model_is_cut_not_refused(llm):
    assert llm.embed(["word " * 30_000]).shape[0] == 1


def test_prompt_longer_than_the_context_is_an_overflow(llm):
    with pytest.raises(ContextOverflow):
        ask(llm, "word " * 300_000, max_tokens=4)


def test_wrong_path_is_told_with_advice(llm):
    with pytest.raises(ServiceError, match="404.*base URL"):
        ask(OpenAICompatible(llm.model, base_url=BASE_URL + "/nowhere"), "hello", max_tokens=4)


def test_wrong_model_name_is_told_or_ignored(llm):
    wrong = OpenAICompatible("no-such-model", base_url=BASE_URL)
    try:
        reply = ask(wrong, "hello", max_tokens=4)  # a server of one model may answer to any name
        assert len(wrong.models()) == 1 and reply.usage.output > 0
    except ServiceError as e:
        assert e.status in (400, 404) and "no-such-model" in str(e)


def test_whole_question_goes_through_the_agent(llm):
    memory = EpisodicMemory(llm.embed)
    memory.add([Episode("Tag a film about war.", "classic"), Episode("Tag a film about dogs.", "comedy")])
    agent = PersonaAgent(llm, memory, initial_persona("The user likes old films."), [RAG(memory, 1)], max_steps=2)
    answer = agent.answer("Which tag fits a film about a soldier? Just answer with comedy or classic.")
    assert answer.status in ("answered", "forced") and answer.usage.calls >= 1 and answer.usage.output > 0
    assert all(step.observation for step in answer.steps if step.action)
