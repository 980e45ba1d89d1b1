"""Conversations as token ids, in the turns of Llama 4, and the same format as a template for other programs.

    <|begin_of_text|>
    <|header_start|>user<|header_end|>\\n\\nWhat is this?<|eot|>     one turn a message
    <|header_start|>assistant<|header_end|>\\n\\n                    asks for an answer, which <|eot|> ends

Special tokens are placed by id, so no content can forge a turn or a picture. (A template cannot promise that: programs
that format with it look for special tokens in the whole text.) The parts of a message follow each other with nothing
between them. A system message that comes first is trimmed, all other text stays as it is: so does the template in
transformers `models/llama4/processing_llama4.py`, which is followed here but for tools.
"""

from collections.abc import Sequence
from typing import NamedTuple

from data.tokenizer import BEGIN_OF_TEXT, Tokenizer
from sharding.errors import UserError

HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
TURN_END = "<|eot|>"

ROLES = ("system", "user", "assistant")
"""Who may speak."""


class Picture(NamedTuple):
    """A picture in a message."""

    names: Sequence[str]
    """The tokens that stand for it, from `data.images.layout`."""


class Message(NamedTuple):
    """One turn."""

    role: str
    """One of `ROLES`."""
    content: str | Sequence[str | Picture]
    """Text, or texts and pictures in their order."""


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[Message], ask: bool = True) -> list[int]:
    """Token ids of a conversation.

    Args:
        tokenizer: has the tokens of headers and turns.
        messages: the turns, first to last.
        ask: end with the header of an answer, for the model to go on from.

    Raises:
        UserError: the tokenizer lacks a token of the format, or a role is unknown.
    """
    try:
        tokenizer.require((BEGIN_OF_TEXT, HEADER_START, HEADER_END, TURN_END))
    except UserError as error:
        raise UserError(f"A chat needs the tokens of Llama 4's turns. {error}") from error
    ids: list[int] = []
    text = ""  # what stands between two special tokens is encoded as one, as programs do that use the template

    def place(name: str) -> None:
        nonlocal text
        ids.extend(tokenizer.encode(text))
        ids.append(tokenizer.special[name])
        text = ""

    def begin_turn(role: str) -> None:
        nonlocal text
        place(HEADER_START)
        text = role
        place(HEADER_END)
        text = "\n\n"

    place(BEGIN_OF_TEXT)
    for i, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise UserError(f"message {i}, role: found {role!r}, expected one of {', '.join(ROLES)}.")
        begin_turn(role)
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, str):
                text += part.strip() if role == "system" and i == 0 else part
            else:
                for name in part.names:
                    place(name)
        place(TURN_END)
    if ask:
        begin_turn("assistant")
    return [*ids, *tokenizer.encode(text)]


CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- raise_exception('This template has no place for tools.') -}}
{%- endif -%}
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] or message['tool_calls'] -%}
        {{- raise_exception('Expected messages of system, user and assistant, without tool calls.') -}}
    {%- endif -%}
    {%- set trimmed = loop.first and message['role'] == 'system' -%}
    {{- '<|header_start|>' ~ message['role'] ~ '<|header_end|>\\n\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim if trimmed else message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | trim if trimmed else part['text'] -}}
            {%- elif part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- else -%}
                {{- raise_exception('Expected parts of text and image.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' -}}
{%- endif -%}
"""
"""The same in Jinja, as transformers reads it from `chat_template.jinja`; its processor puts a picture's tokens in place
of each `<|image|>`."""
