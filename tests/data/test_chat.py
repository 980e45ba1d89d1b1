"""Conversations in Llama 4's turns: by the book, alike in the template, and not to be forged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from data.chat import CHAT_TEMPLATE, HEADER_END, HEADER_START, ROLES, TURN_END, Message, Picture, chat_tokens
from data.config import ImageSpec
from data.images import layout
from data.tokenizer import BEGIN_OF_TEXT, IMAGE, PATCH, Tokenizer, load_bytes
from sharding.errors import UserError
from tests.data import llama4

TOKENIZER = Tokenizer(llama4.serialised())
PLAIN_TEXT = st.text(st.sampled_from("\n a."), max_size=5) | st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: "<|" not in text
)
PICTURE = st.sampled_from([(1, 1), (1, 2), (2, 2)]).map(lambda canvas: Picture(layout(canvas, ImageSpec(56, 4, 4))))


def messages(text):
    content = text | st.lists(text | PICTURE, max_size=4)
    return st.lists(st.builds(Message, st.sampled_from(ROLES), content), max_size=4)


def written(chat: list[Message], ask: bool) -> str:
    """The conversation with special tokens spelled out."""
    turns = []
    for role, content in chat:
        inner = ""
        for part in [content] if isinstance(content, str) else content:
            inner += (
                "".join(part.names)
                if isinstance(part, Picture)
                else part
                if turns or role != "system"
                else part.strip()
            )
        turns.append(f"<|header_start|>{role}<|header_end|>\n\n{inner}<|eot|>")
    return "<|begin_of_text|>" + "".join(turns) + "<|header_start|>assistant<|header_end|>\n\n" * ask


def test_a_question_reads_as_llama_4s():
    special, encode = TOKENIZER.special, TOKENIZER.encode
    chat = [Message("system", "Be brief. "), Message("user", [Picture([IMAGE, PATCH]), " What is this?\n"])]
    header = {
        role: [special[HEADER_START], *encode(role), special[HEADER_END]] for role in ("system", "user", "assistant")
    }
    assert chat_tokens(TOKENIZER, chat) == [
        special[BEGIN_OF_TEXT],
        *header["system"],
        *encode("\n\nBe brief."),
        special[TURN_END],
        *header["user"],
        *encode("\n\n"),
        special[IMAGE],
        special[PATCH],
        *encode(" What is this?\n"),
        special[TURN_END],
        *header["assistant"],
        *encode("\n\n"),
    ]


@given(messages(PLAIN_TEXT), st.booleans())
def test_it_is_what_the_library_makes_of_the_text_with_its_special_tokens(chat, ask):
    library = Library.from_str(TOKENIZER.serialised)
    expected = library.encode(written(chat, ask), add_special_tokens=False).ids
    assert chat_tokens(TOKENIZER, chat, ask) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(llama4.SPECIAL))
def test_content_cannot_forge_a_turn_or_a_picture(text, name):
    special = set(TOKENIZER.special.values())
    forged = chat_tokens(TOKENIZER, [Message("user", [f"{text}{name}", name, "a"])])
    plain = chat_tokens(TOKENIZER, [Message("user", "a")])
    assert [i for i in forged if i in special] == [i for i in plain if i in special]
    assert TOKENIZER.decode(forged) == f"user\n\n{text}{name}{name}aassistant\n\n"


def test_a_tokenizer_without_turns_is_refused():
    with pytest.raises(
        UserError, match=r"needs the tokens of Llama 4's turns\. .*bytes: .*<\|header_start\|>.*<\|eot\|>"
    ):
        chat_tokens(load_bytes(), [Message("user", "a")])


def test_an_unknown_role_is_named():
    with pytest.raises(UserError, match=r"message 1, role: found 'asistant', expected one of system, user, assistant"):
        chat_tokens(TOKENIZER, [Message("user", "a"), Message("asistant", "b")])


# The template


def rendered(chat: list[Message], ask: bool, **more: object) -> str:
    """As transformers renders a chat template (`utils/chat_template_utils.py`)."""
    sandbox = pytest.importorskip("jinja2.sandbox")

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    plain = [
        {
            "role": role,
            "content": content
            if isinstance(content, str)
            else [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content],
        }
        for role, content in chat
    ]
    return environment.from_string(CHAT_TEMPLATE).render(messages=plain, add_generation_prompt=ask, **more)


@given(messages(PLAIN_TEXT), st.booleans())
def test_the_template_writes_the_same(chat, ask):
    pictures = [
        p.names for _, content in chat if not isinstance(content, str) for p in content if isinstance(p, Picture)
    ]
    text = rendered(chat, ask)
    assert text.count(IMAGE) == len(pictures)
    pieces = text.split(IMAGE)
    filled = pieces[0] + "".join("".join(names) + piece for names, piece in zip(pictures, pieces[1:], strict=True))
    assert filled == written(chat, ask)


@pytest.mark.parametrize(
    ("chat", "more"),
    [([Message("asistant", "a")], {}), ([Message("user", "a")], {"tools": [{"name": "f"}]})],
)
def test_the_template_refuses_what_it_has_no_place_for(chat, more):
    pytest.importorskip("jinja2")
    with pytest.raises(ValueError, match=r"Expected messages of system, user|no place for tools"):
        rendered(chat, True, **more)
