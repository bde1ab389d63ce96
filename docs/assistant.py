"""The agent for one person, beyond the benchmark: python docs/assistant.py FOLDER

Ask, then type what the right answer would have been, or press enter for 'right': an episode, on
disk before it is embedded. After every n corrections the persona, which at first says that nothing
is known, is aligned with these, the first time once it has the profile of all episodes."""

import argparse
import copy
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

from show import marked, reading, script, told

import lamp
from align import align
from memory import Episode, EpisodicMemory, summarize
from persona_agent import PERSONA, PersonaAgent, ServiceError, check_address
from tools import RAG

FILES = EPISODES, PERSONAS, CACHE = "memory.jsonl", "personas.jsonl", "cache.sqlite"
HELP = "/persona, /memory, /undo (to the persona before), /forget (delete the folder), /quit"
SUMMARY = "Say what this shows of the person's tastes and habits; invent nothing."  # ours: S_t


class Assistant:
    """One person's agent, the folder in which it lasts, and the dialogue."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.folder = settings.folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.listdir(self.folder) and not (self.folder / EPISODES).exists():
            raise OSError("it holds something else: name a new folder")
        self._load()
        self.llm, self.wiki = lamp.connect(settings)
        self.llm.llm.tries = 3  # somebody waits

    def _load(self):
        self.episodes = [Episode(**line) for line in self._lines(EPISODES)]
        self.personas = [PERSONA.replace("{profile}", lamp.UNKNOWN)]
        self.aligned = 0  # episodes when the persona last changed
        for line in self._lines(PERSONAS):  # alignments, and each /undo
            self.personas = [*takewhile(line["final"].__ne__, self.personas), line["final"]]
            self.aligned = line["episodes"]

    def _lines(self, name):
        (self.folder / name).touch()
        lines = (self.folder / name).read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]  # none cut by a crash

    def _keep(self, name, line):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            # The newline first: a line that a crash cut off spoils no other.
            print(f"\n{json.dumps(line)}", end="", file=file, flush=True)
            os.fsync(file.fileno())
        self._load()

    def _agent(self):
        memory = EpisodicMemory(self.llm.embed)
        memory.add(self.episodes)  # the cache has the embeddings of the old ones
        return PersonaAgent(self.llm, memory, self.personas[-1], [self.wiki, RAG(memory)])

    def _ask(self, question):
        """Answer, then learn: of a right answer the text, for RAG; no response to align with."""
        aside = ThreadPoolExecutor(1).submit  # in a thread, for which Ctrl-C need not wait
        answer = aside(lambda: self._agent().answer(question)).result()
        if self.settings.show:
            print(lamp.printable(told(asdict(answer))))
        print(lamp.printable(answer.text or f"(no answer: {answer.status})"))
        said = input("Right? [enter, or type the right answer; /: neither] ").strip()
        if said.startswith("/"):
            return
        text = Episode(question, said or answer.text, {"date": time.strftime("%Y-%m-%d")}).text
        aside(self._keep, EPISODES, {"query": question, "response": said, "text": text}).result()
        new = self.episodes[self.aligned :]
        if sum(bool(episode.response) for episode in new) >= self.settings.align_every:
            print("Aligning the persona ..", flush=True)
            self._keep(PERSONAS, aside(self._align).result())

    def _align(self):
        agent = self._agent()
        if len(self.personas) == 1:
            profile = summarize(self.llm, agent.memory, SUMMARY)
            agent.persona = PERSONA.replace("{profile}", profile or lamp.UNKNOWN)
        record = align(agent, self.llm, self.settings.align_every)
        print("Update:", ", ".join(record.iterations[-1].reasons) or "accepted")
        return {"episodes": len(self.episodes), **asdict(record)}

    def _obey(self, command):
        memory = "\n".join(episode.text for episode in self.episodes)
        texts = {"/persona": self.personas[-1], "/memory": memory}
        if command == "/undo" and len(self.personas) > 1:
            self._keep(PERSONAS, {"final": self.personas[-2], "episodes": len(self.episodes)})
        elif command == "/forget" and {*os.listdir(self.folder)} <= {*FILES}:
            if input(f"Type yes to delete {self.folder}: ") == "yes":
                shutil.rmtree(self.folder)
        else:
            print(lamp.printable(texts.get(command, HELP)))

    def talk(self) -> None:
        """Commands and questions, a line each, until /quit, /forget or the end of the input."""
        print(f"{self.folder}: {len(self.episodes)} episodes; model: {self.settings.model}\n{HELP}")
        while self.folder.exists() and (line := input("> ").strip()) != "/quit":
            before = self.personas[-1]
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._ask(line)
            except KeyboardInterrupt:
                print("\nStopped. Nothing that you said is lost.")
                left, self.llm = self.llm, copy.copy(self.llm)
                left.llm = None  # so that the thread asks no more
            except (ServiceError, OSError, ValueError) as e:
                print(lamp.printable(f"That failed: {e}"))
            if self.personas[-1] != before:
                print(lamp.printable(marked(before, self.personas[-1])))


def main(argv: list) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("assistant.py", description="One person's agent.")
    parser.add_argument("folder", metavar="FOLDER", type=lambda text: Path(text).resolve())
    parser.add_argument("--align-every", type=lamp.positive, default=3, help="corrections (3)")
    parser.add_argument("--show", action="store_true", help="thoughts and tools, too")
    lamp.model_options(parser)
    parser.set_defaults(seed=0, workers=8, offline=False, cache=None)
    settings = parser.parse_args(argv)
    try:
        lamp.resolve(settings)
        check_address(settings.wiki_base_url or lamp.WIKIPEDIA, "--wiki-base-url")
        if not settings.embed_model:
            raise ServiceError("--embed-model is missing: memories are found with it")
    except ServiceError as e:
        parser.error(str(e))
    settings.cache = str(settings.folder / CACHE)
    with suppress(EOFError, KeyboardInterrupt), reading(settings.folder):
        Assistant(settings).talk()


if __name__ == "__main__":
    os._exit(script("assistant.py", main, sys.argv[1:]))
