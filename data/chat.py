"""Conversations as token ids, in the turns of Llama 4, and the same format as a template for other programs.

    <|begin_of_text|>
    <|header_start|>user<|header_end|>\\n\\nWhat is this?<|eot|>     one turn a message
    <|header_start|>assistant<|header_end|>\\n\\n                    asks for an answer, which <|eot|> ends

Special tokens are placed by id, so no content can forge a turn or a picture. (A template cannot promise that: programs
that format with it look for special tokens in the whole text.) The parts of a message follow each other with nothing
between them. A system message that comes first is trimmed, all other text stays as it is: so does the template in
transformers `models/llama4/processing_llama4.py`, which is followed here but for tools.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.sequence import End, Piece, Text, Token, encode
from data.tokenizer import BEGIN_OF_TEXT, HEADER_END, HEADER_START, TURN_END, Tokenizer
from sharding.errors import UserError

ROLES = ("system", "user", "assistant")
"""Who may speak."""


class Message(NamedTuple):
    """One turn."""

    role: str
    """One of `ROLES`."""
    content: str | Sequence[str | Piece | Sequence[Piece]]
    """Text, or texts and what else stands among them, such as the tokens of a picture, in their order."""


def chat_pieces(messages: Sequence[Message], ask: bool = False, weights: bool = False) -> Iterator[Piece]:
    """A conversation, piece by piece.

    Args:
        messages: the turns, first to last.
        ask: end with the header of an answer, for the model to go on from.
        weights: the end of a turn weighs what the last `Text` in it weighs in the loss; without one, 1 in an assistant's turn
            and 0 in others. All else that is no `Text` of a message weighs 0.

    Raises:
        UserError: a role is unknown.
    """
    yield Token(BEGIN_OF_TEXT)
    for i, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise UserError(f"message {i}, role: found {role!r}, expected one of {', '.join(ROLES)}.")
        yield from _header(role)
        end = float(role == "assistant")
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, str):
                part = Text(part)
            if isinstance(part, Text):
                end = part.weight
                yield part._replace(text=part.text.strip()) if role == "system" and i == 0 else part
            elif isinstance(part, Token | End):
                yield part
            else:
                yield from part
        yield Token(TURN_END, end if weights else 0.0)
    if ask:
        yield from _header("assistant")


def _header(role: str) -> Iterator[Piece]:
    yield Token(HEADER_START)
    yield Text(role, 0.0)
    yield Token(HEADER_END)
    yield Text("\n\n", 0.0)


def need_turns(tokenizer: Tokenizer) -> None:
    """Raises `UserError` if the tokenizer lacks a token of the format."""
    try:
        tokenizer.require((BEGIN_OF_TEXT, HEADER_START, HEADER_END, TURN_END))
    except UserError as error:
        raise UserError(f"A chat needs the tokens of Llama 4's turns. {error}") from error


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[Message], ask: bool = True) -> list[int]:
    """Token ids of a conversation; with `ask`, up to where the assistant is to speak.

    Raises:
        UserError: the tokenizer lacks a token of the format, or a role is unknown.
    """
    need_turns(tokenizer)
    return encode(tokenizer, chat_pieces(messages, ask)).ids


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
