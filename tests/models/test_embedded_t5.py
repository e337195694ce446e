"""The embedded T5-shaped teacher: its odd shapes are there on purpose, and it answers by reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kd.data.demo import mini_world
from kd.data.demo.mini_mixture import examples, is_right
from kd.models.tokenizer import EMBEDDED, load_tokenizer, token_bytes, vocabulary_size

FOLDER = EMBEDDED["demo-t5"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(FOLDER))


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import T5ForConditionalGeneration

    return T5ForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy, with the end of sequence that T5 expects after the prompt."""
    ids = [*tokenizer.encode(prompt, add_special_tokens=False), tokenizer.eos_token_id]
    out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def test_the_tokenizer_has_t5s_special_tokens(tokenizer: Any):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert tokenizer("Mara")["input_ids"][-1] == 1
    assert tokenizer.decode([vocabulary_size(tokenizer) - 1]) == "<extra_id_7>"


def test_the_tokenizer_loses_what_t5s_loses(tokenizer: Any):
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert ids("a\nb") == ids("a b") == ids("  a   b ")
    assert ids("…") == ids("...")
    assert tokenizer.unk_token_id in ids("漢")


def test_every_word_of_the_mixture_is_one_piece(tokenizer: Any):
    for example in examples("heldout", 350):
        ids = tokenizer.encode(example.prompt, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
    for words in (mini_world.PEOPLE, mini_world.THINGS, mini_world.PLACES, mini_world.COLOURS):
        assert all(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words)


def test_pieces_stand_for_bytes_with_a_space_before_words(tokenizer: Any):
    pieces = token_bytes(tokenizer)
    spelled = b"".join(pieces[i] for i in tokenizer.encode("Zoë's café", add_special_tokens=False))
    assert spelled == " Zoë's café".encode()


def test_the_output_layer_is_untied_and_wider_than_the_tokenizer(model: Any, tokenizer: Any):
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert (vocabulary_size(tokenizer), model.lm_head.out_features) == (1200, 1216)


def test_it_stays_untied_when_saved_again(model: Any, tmp_path: Path):
    from transformers import T5ForConditionalGeneration

    model.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.shared.weight, model.shared.weight)


def test_it_is_small_and_stored_in_16_bits():
    assert sum(p.stat().st_size for p in FOLDER.iterdir() if p.is_file()) < 7e6
    assert '"dtype": "float16"' in (FOLDER / "config.json").read_text(encoding="utf-8")


def test_it_answers_questions_about_facts_it_never_saw(model: Any, tokenizer: Any):
    chosen = [e for e in examples("heldout") if e.task == "extract"][:30]
    right = sum(is_right(e, answer(model, tokenizer, e.prompt)) for e in chosen)
    assert right >= 27  # the log has 100 of 100; three misses leave room for other arithmetic


def test_the_passage_decides_and_not_memory(model: Any, tokenizer: Any):
    for place in ("attic", "café", "tent"):
        prompt = f"Mara keeps a lamp in the {place}. Tom's cup is in the shop.  Where is Mara's lamp?"
        assert answer(model, tokenizer, prompt) == place
