"""Which tokens of a conversation are scored, here and in TRL: the same conversations, chat templates and tokenizer.

    python benchmarks/chat_peers.py --trl-python ~/venvs/trl/bin/python --tokenizer HuggingFaceTB/SmolLM2-135M    # minutes

The chat templates are those that TRL ships a training variant for: the text of the models' own. The tokenizer gets the control
tokens of each. TRL's side is `SFTTrainer(assistant_only_loss=True)` up to its first step (`chat_trl.py`), ours is the rows of a
build. Every pair of (what a model reads up to a token, the token) that either scores is compared, and each is held against what
transformers renders with the generation prompt before each turn. The script prints a Markdown table, and what differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.data.chat_rows import chat_template, tokenize_conversations
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.left_out import LeftOut
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.tokenizer import load_tokenizer, token_bytes

HERE = Path(__file__).parent
SPELLED = r"<[|｜][^<>|｜]+[|｜]>|<(?:start|end)_of_turn>|</?think>|</?tool_call>|</?tool_response>|\[/?[A-Z_]+\]"
"""Control tokens as templates write them."""
NOT_SPECIAL = re.compile(r"</?(think|tool_call|tool_response)>")
"""Tokens that the models' own tokenizers do not call special."""
SYSTEM = {"role": "system", "content": "Be brief."}


def said(*turns: str) -> list[dict[str, str]]:
    """A user and an assistant who take turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def thinking(*turns: str) -> list[dict[str, str]]:
    return [
        turn if turn["role"] == "user" else {**turn, "content": f"<think>\nHm.\n</think>\n\n{turn['content']}"}
        for turn in said(*turns)
    ]


TEMPLATES = (
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "llama3",
    "gemma",
    "gemma3",
    "phi3",
    "phi3_5",
    "deepseek_r1_distill",
)
"""Names of TRL's templates that are compared."""
TALKS: dict[str, list[dict[str, str]]] = {
    "one turn": said("Two plus two?", "Four."),
    "three turns": said("Two plus two?", "Four.", "And three?", "Seven, I think.", "Thanks.", "You are welcome."),
    "system": [SYSTEM, *said("Two plus two?", "Four.", "And three?", "Seven.")],
    "white space": said("Say it.", "  Four.\n\n", "Again.", "\n```\n4\n```\n"),
    "reasoning": thinking("Two plus two?", "Four."),
    "reasoning, two turns": thinking("Two plus two?", "Four.", "And three?", "Seven."),
    "control token": said("What does CONTROL do?", "It ends a turn."),
}
"""Name -> conversation. CONTROL stands for the template's last control token."""


def tokenizer_for(template: str, base: Any) -> Any:
    """The tokenizer with the template and its control tokens."""
    from transformers import AddedToken

    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"})
    for text in dict.fromkeys(re.findall(SPELLED, template)):
        special = NOT_SPECIAL.fullmatch(text) is None
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=special)], special_tokens=special)
    return tokenizer


Scored = list[tuple[tuple[int, ...], int]]
"""(The ids before it, the id) of every scored token."""


@dataclass(frozen=True)
class Counts:
    """What one side scores in conversations of one template."""

    tokens: int = 0
    unseen: int = 0
    """Tokens after a text that the model's own template never gives it."""
    beyond: int = 0
    """White space after the end token of a turn, which nobody generates."""
    ends: int = 0
    """End tokens of turns, each after what a model reads at that turn."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def scored_here(tokenizer: Any, file: Path) -> Iterator[Scored | str]:
    """What a build scores in each conversation, or its error."""
    template, corpus = chat_template(tokenizer, ChatSettings()), load_corpus(str(file))
    for example in corpus.examples:
        one = replace(corpus, examples=(example,))
        try:
            rows = list(tokenize_conversations(one, template, ChatSettings(), BlockConfig(4096), LeftOut()))
        except DataError as error:
            yield error.headline
            continue
        yield [
            (tuple(ids[: position + 1]), ids[position + 1])
            for row in rows
            for ids in [row.input_ids.tolist()]
            for position in row.gaps.positions(len(row.context_ids), len(row.target_ids)).tolist()
        ]


def scored_there(rows: list[dict[str, Any]]) -> Iterator[Scored | str]:
    """The same of what TRL wrote."""
    for row in rows:
        if "error" in row:
            yield str(row["error"])
        else:
            yield [(tuple(row["ids"][:n]), row["ids"][n]) for n, label in enumerate(row["labels"]) if label != -100]


def end_token(tokenizer: Any) -> str:
    """The first token of the template after what an assistant says."""
    talk = said("a", "zq", "b")
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    match = re.match(rf"\s*({SPELLED}|{re.escape(tokenizer.eos_token)})", text.partition("zq")[2])
    assert match is not None, text
    return match[1]


def counted(tokenizer: Any, talk: list[dict[str, str]], scored: Scored) -> Counts:
    """Each scored token against what transformers renders with the generation prompt before each of the assistant's turns."""
    end, pieces = tokenizer.convert_tokens_to_ids(end_token(tokenizer)), token_bytes(tokenizer)
    prompts = [
        tokenizer.apply_chat_template(talk[:n], tokenize=False, add_generation_prompt=True).encode()
        for n, turn in enumerate(talk)
        if turn["role"] == "assistant"
    ]
    total = Counts()
    for before, token in scored:
        ends = np.cumsum([len(pieces[i]) for i in before])
        text = b"".join(pieces[i] for i in before)
        prompt = next((p for p in reversed(prompts) if text.startswith(p)), None)
        written = () if prompt is None else (*before[int(np.searchsorted(ends, len(prompt))) + 1 :], token)
        seen = prompt is not None and end not in written[:-1]
        after = b"".join(pieces[i] for i in written[written.index(end) + 1 :]) if end in written[:-1] else b"-"
        total += Counts(1, not seen and bool(after.strip()), not after.strip(), seen and token == end)
    return total


def compared(name: str, tokenizer: Any, work: Path) -> tuple[str, list[str]]:
    """A row of the table, and a line for each conversation that differs."""
    talks = talks_for(tokenizer)
    here = list(scored_here(tokenizer, work / name / "chat.jsonl"))
    there = list(scored_there(json.loads((work / f"{name}.json").read_text())))
    sums, same, lines, turns = [Counts(), Counts()], 0, [], 0
    for (title, talk), ours, theirs in zip(talks.items(), here, there, strict=True):
        if isinstance(ours, str) or isinstance(theirs, str):
            said_by = [side if isinstance(side, str) else "scored" for side in (ours, theirs)]
            lines.append(f"{name}, {title}: kd {said_by[0]}; TRL {said_by[1]}")
            continue
        turns += sum(turn["role"] == "assistant" for turn in talk)
        sums = [total + counted(tokenizer, talk, side) for total, side in zip(sums, (ours, theirs), strict=True)]
        same += Counter(ours) == Counter(theirs)
        for who, more in (("kd", Counter(ours) - Counter(theirs)), ("TRL", Counter(theirs) - Counter(ours))):
            if more:
                tokens = tokenizer.convert_ids_to_tokens([token for _, token in more])
                lines.append(f"{name}, {title}: {who} alone scores {len(tokens)}: {' '.join(tokens[:12])}")
    both = sum(not isinstance(a, str) and not isinstance(b, str) for a, b in zip(here, there, strict=True))
    cells = [f"{c.tokens} / {c.unseen} / {c.beyond} / {c.ends}" for c in sums]
    return f"| {name} | {same} of {both} | {turns} | {cells[0]} | {cells[1]} |", lines


def talks_for(tokenizer: Any) -> dict[str, list[dict[str, str]]]:
    """The conversations, in which CONTROL is the template's end token."""
    end = end_token(tokenizer)
    return {
        title: [{**turn, "content": turn["content"].replace("CONTROL", end)} for turn in talk]
        for title, talk in TALKS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, metavar="PATH", help="interpreter that has trl")
    parser.add_argument("--tokenizer", required=True, help="tokenizer that gets the control tokens of each template")
    parser.add_argument("--templates", default=",".join(TEMPLATES), help="names of TRL's templates, between commas")
    args = parser.parse_args()
    base, names = load_tokenizer(args.tokenizer), args.templates.split(",")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = [args.trl_python, str(HERE / "chat_trl.py")]
        subprocess.run([*run, "templates", "--work", folder], check=True)
        tokenizers = {name: tokenizer_for((work / f"{name}.jinja").read_text(encoding="utf-8"), base) for name in names}
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(work / name)
            rows = [{"messages": talk} for talk in talks_for(tokenizer).values()]
            (work / name / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        subprocess.run([*run, "scored", "--work", folder], check=True, stdout=subprocess.DEVNULL)
        results = [compared(name, tokenizer, work) for name, tokenizer in tokenizers.items()]
    print("| template | same tokens | turns | kd: scored / unseen / beyond / ends | TRL: the same |")
    print("|---|---|---|---|---|")
    print("\n".join(row for row, _ in results))
    print("\n".join(["", *(line for _, lines in results for line in lines)]))


if __name__ == "__main__":
    main()
