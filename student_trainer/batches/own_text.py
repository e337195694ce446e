"""Decide how the student reads the cached text in its own tokens: plain text, or conversations through its template."""

from __future__ import annotations

from typing import Any

from kd.cache_builder.store.readers.reading import Reader
from kd.common.errors import DataError
from kd.data.chat_rows import chat_template
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.conversations.conversation import CONVERSATIONS
from kd.models.chat.chat_template import ChatTemplate
from kd.models.families.encoder_layout import EncoderLayout
from kd.models.families.positions import max_positions
from kd.models.model_config import is_encoder_decoder
from kd.models.tokenizer import Tokenizer
from kd.student_trainer.batches.compatibility import same_tokenizer
from kd.student_trainer.batches.student_chat import StudentChat
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.configuration.learning_settings import TextSettings
from kd.student_trainer.configuration.train_config import TrainConfig


def own_text(
    config: TrainConfig,
    reader: Reader,
    model_config: Any,
    tokenizer: Tokenizer,
    layout: EncoderLayout | None,
    start: int,
) -> StudentText | StudentChat:
    """Every example in the student's own tokens; `start` is how many ids its decoder reads before a target. Raises KdError."""
    settings, encoder, limit = config.text, is_encoder_decoder(model_config), max_positions(model_config)
    if reader.manifest.identity["corpus"]["kind"] == CONVERSATIONS:
        template = student_template(reader, tokenizer, settings)
        refuse_for_chats(reader, settings, template)
        chat = StudentChat(reader, tokenizer, window=settings.seq_len or limit, template=template)
        if config.objective.loss != "ce" and chat.unmatched == chat.turns:
            raise DataError(
                "no turn of the student's template has the text of the teacher's",
                cache=reader.root,
                found=f"{chat.turns} turns",
                try_="another --chat-template or --template-kwargs",
            )
        return chat
    written = max_positions(model_config, decoder=True)
    most = written if written is None else written - start + 1
    return StudentText(
        reader,
        tokenizer,
        window=settings.seq_len or limit,
        separator=settings.separator,
        encoder=encoder,
        layout=layout,
        target_len=settings.target_len or (most if encoder else None),
    )


def refuse_for_chats(reader: Reader, settings: TextSettings, template: ChatTemplate | None) -> None:
    """Raise DataError for settings that conversations do not have."""
    if settings.alignment != "bytes":
        raise DataError("conversations are aligned by bytes", found=f"--alignment {settings.alignment}", try_="bytes")
    if template is not None and reader.manifest.identity["chat"]["score"] == "all":
        raise DataError(
            "every token of this cache is scored, and another template writes other tokens around the messages",
            cache=reader.root,
            found="--score all",
            expected="a student with the teacher's tokenizer and template, or a cache of --score assistant",
        )


def student_template(reader: Reader, tokenizer: Tokenizer, settings: TextSettings) -> ChatTemplate | None:
    """The template that renders conversations for the student; None where it reads the cached tokens.

    A student with the teacher's tokenizer reads them, unless the settings name a template. Raises DataError where there is
    no template, or where it writes the date.
    """
    if settings.chat_template is None and settings.template_kwargs is None and same_tokenizer(reader, tokenizer):
        return None
    return chat_template(tokenizer, ChatSettings(settings.chat_template, settings.template_kwargs))
