"""Chat templates of the kinds in use, written for these tests, with the control tokens that each needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """A template and its tokens."""

    source: str
    control: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None


CHATML = Layout(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
)
LLAMA3 = Layout(
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)
GEMMA = Layout(
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.first = m.content + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ ns.first if m.role == 'user' }}{{ m.content | trim }}<end_of_turn>\n"
    "{% if m.role == 'user' %}{% set ns.first = '' %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ("<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    eos="<eos>",
)
MISTRAL = Layout(
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system if loop.last or loop.nextitem is not defined or "
    "messages[loop.index:] | selectattr('role', 'equalto', 'user') | list | length == 0 }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only system, user and assistant') }}{% endif %}{% endfor %}",
    ("[INST]", "[/INST]"),
    bos="<s>",
    eos="</s>",
)
"""The system text stands in the last turn of the user, so that earlier turns change when the conversation goes on."""
PHI = Layout(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos="<|endoftext|>",
)
"""The end token stands at the end of a conversation without a generation prompt, after the token that ends the turn."""
REASONING = Layout(
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content | default('') }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
)
"""The reasoning of earlier turns is dropped, as Qwen3 does."""
MARKED = Layout(
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
)
TOOLS = Layout(
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
)
OPENS_REASONING = Layout(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<|User|>{{ m.content }}{% else %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}<|Assistant|>{{ said }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    ("<|User|>", "<|Assistant|>"),
    bos="<|begin|>",
    eos="<|end|>",
)
"""The prompt opens the reasoning, and no turn that was written shows it, as in DeepSeek-R1."""
LAYOUTS = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi": PHI,
    "reasoning": REASONING,
    "marked": MARKED,
    "tools": TOOLS,
}
PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}[assistant]{% endif %}"
)
"""A template for the embedded teacher, whose only control token is its end of text."""
CHATS = [
    [
        ("system", "Be brief."),
        ("user", "Two plus two?"),
        ("assistant", "Four."),
        ("user", "And three?"),
        ("assistant", "Five, I think."),
    ],
    [
        ("user", "Name a colour."),
        ("assistant", "Red."),
        ("user", "Another."),
        ("assistant", "Green."),
        ("user", "One more."),
        ("assistant", "Blue, as the sea is on a summer's day."),
    ],
    [("user", "Who lived at the edge of the wood?"), ("assistant", "A small fox.")],
]


def examples_of(cache: Any) -> list[Any]:
    """All examples of a reader, in their order."""
    return [cache[number] for number in range(len(cache))]
