"""`--chat` against lm-evaluation-harness with `--apply_chat_template`: the same strings, tokens, log-probabilities and choices.

Models: the real stories260K with a template of ours, and a random one of Llama's shape with SmolLM2's real tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import lm_eval
import lm_eval.tasks.hellaswag.utils as theirs
import numpy as np
import pytest
import torch
import yaml
from chat_templates import CHATML, REASONING
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, LlamaConfig

from kd.common.progress import final
from kd.data.data_settings import InstructionConfig
from kd.data.sources import load_corpus
from kd.evaluation.measures.choices import evaluate_choices
from kd.evaluation.measures.hellaswag import evaluate_hellaswag, load_scenes
from kd.evaluation.scoring.chat_asking import ChatAsking, with_chat
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.loading import random_model
from kd.models.tokenizer import load_tokenizer

ROWS = 40
NATS = 1e-4
"""Largest difference of a log-probability per 100 nats: sums of float32 numbers, added in another order."""
STORIES = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% elif m.role == 'user' %}"
    "Question: {{ m.content }}\n{% else %}Answer: {{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
SYSTEM = "You know how people go about their day."


@pytest.fixture(scope="module", params=["stories260K", "chatml", "thinking"])
def case(request, shared: Path):
    """Model, tokenizer, reading, lm-eval's own wrapper, and its system text."""
    if request.param == "stories260K":
        folder = str(shared / "weights" / request.param)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer, template, variables = load_tokenizer(folder), STORIES, {}
    else:
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=49152, initializer_range=0.2, **sizes)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = random_model(config, torch.float32).eval()
        tokenizer = load_tokenizer(str(shared / "tokenizers" / "smollm2"))
        template = CHATML.source if request.param == "chatml" else REASONING.source
        variables = {} if request.param == "chatml" else {"enable_thinking": False}
    tokenizer.chat_template = template
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu", chat_template_args=variables)
    system = SYSTEM if request.param == "chatml" else None
    return model, tokenizer, ReadingOptions(chat=True, template_kwargs=variables, system=system), lm, system


def their_run(lm: HFLM, config: dict, rows: list[dict], system: str | None):
    """lm-eval's evaluation of a task over these rows with its chat template: results, and a sample per row."""
    config = config | {
        "task": "local_rows",
        "custom_dataset": lambda **_: datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}),
        "training_split": None,
        "validation_split": "validation",
    }
    with torch.random.fork_rng():
        found = lm_eval.simple_evaluate(
            lm,
            tasks=[config],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            apply_chat_template=True,
            system_instruction=system,
        )
    return found["results"]["local_rows"], sorted(found["samples"]["local_rows"], key=lambda s: s["doc_id"])


def assert_same_nats(sample: dict, nats: np.ndarray) -> None:
    found = np.array([float(r[0]) for r in sample["filtered_resps"]])
    assert np.abs(found - nats).max() < NATS * max(1.0, np.abs(found).max() / 100)


def test_hellaswag_through_the_template_agrees_choice_for_choice(case, shared, tmp_path):
    model, tokenizer, reading, lm, system = case
    with (shared / "tasks" / "hellaswag" / "sample500.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(ROWS), strict=False)]
    for row in rows:
        row |= {"ctx_a": row["ctx"], "ctx_b": "", "label": str(row["label"])}
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: getattr(theirs, node.value.partition(".")[2]))
    config = yaml.load((Path(theirs.__file__).parent / "hellaswag.yaml").read_text(), Loader)
    results, samples = their_run(lm, config, rows, system)
    chat = ChatAsking.of(tokenizer, reading)
    ours = final(evaluate_hellaswag(model, tokenizer, load_scenes(tmp_path), protocol="harness", chat=chat))
    assert len(samples) == len(ours.asked) == ROWS
    for number, (sample, asked, nats) in enumerate(zip(samples, ours.asked, ours.nats, strict=True)):
        assert [a[0] for a in sample["arguments"]] == [asked.context] * 4
        assert [a[1] for a in sample["arguments"]] == list(asked.endings)
        assert_same_nats(sample, nats)
        found = np.array([float(r[0]) for r in sample["filtered_resps"]])
        for metric, length in (("acc", np.ones(4)), ("acc_norm", np.array([len(e) for e in asked.endings]))):
            assert int(np.argmax(found / length)) == ours.chosen[f"{metric}_harness"][number]
    for metric in ("acc", "acc_norm"):
        assert ours.estimates[f"{metric}_harness"].value == pytest.approx(results[f"{metric},none"])
    if system is not None:
        assert system in ours.asked[0].context


def test_choices_of_an_instruction_task_agree_choice_for_choice(case, shared):
    """BoolQ's real rows in its first template, which lm-eval is given as prompt and choices."""
    model, tokenizer, reading, lm, system = case
    instructions = InstructionConfig(task_root=shared / "tasks", template=0)
    corpus = load_corpus("flan:boolq", split="dev", limit=12, instructions=instructions)
    rows = [{"asked": e.prompt, "options": list(e.choices), "right": e.answer} for e in corpus.examples]
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    results, samples = their_run(lm, config, rows, system)
    ours = final(evaluate_choices(model, tokenizer, with_chat(corpus), reading=reading, encoding="together"))
    for sample, nats in zip(samples, ours.option_nats, strict=True):
        assert_same_nats(sample, nats)
        assert int(np.argmax([float(r[0]) for r in sample["filtered_resps"]])) == int(np.argmax(nats))
    assert ours.estimates["accuracy_sum"].value == pytest.approx(results["acc,none"])
