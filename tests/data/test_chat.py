"""Conversations in Llama 4's turns: by the book, alike in the template, and not to be forged."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from data.chat import CHAT_TEMPLATE, ROLES, Message, chat_pieces, chat_tokens
from data.config import ImageSpec
from data.images import layout
from data.sequence import End, Text, Token, encode
from data.tokenizer import BEGIN_OF_TEXT, HEADER_END, HEADER_START, IMAGE, PATCH, TURN_END, Tokenizer, load_bytes
from sharding.errors import UserError
from tests.data import llama4

TOKENIZER = Tokenizer(llama4.serialised())
PLAIN_TEXT = st.text(st.sampled_from("\n a."), max_size=5) | st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: "<|" not in text
)
PICTURE = st.sampled_from([(1, 1), (1, 2), (2, 2)]).map(
    lambda canvas: [Token(name) for name in layout(canvas, ImageSpec(56, 4, 4))]
)


def messages(text):
    content = text | st.lists(text | PICTURE, max_size=4)
    return st.lists(st.builds(Message, st.sampled_from(ROLES), content), max_size=4)


def names(tokens: Any) -> list[str]:
    return [token.name for token in tokens]


def written(chat: list[Message], ask: bool) -> str:
    """The conversation with special tokens spelled out."""
    turns = []
    for role, content in chat:
        inner = ""
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, str):
                inner += part.strip() if not turns and role == "system" else part
            else:
                inner += "".join(names(part))
        turns.append(f"<|header_start|>{role}<|header_end|>\n\n{inner}<|eot|>")
    return "<|begin_of_text|>" + "".join(turns) + "<|header_start|>assistant<|header_end|>\n\n" * ask


def test_a_question_reads_as_llama_4s():
    special, encode = TOKENIZER.special, TOKENIZER.encode
    chat = [Message("system", "Be brief. "), Message("user", [[Token(IMAGE), Token(PATCH)], " What is this?\n"])]
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
    library = Library.from_str(load_bytes().serialised)
    plain = Tokenizer(library.to_str().replace(TURN_END, "<|end|>"), "mine")
    with pytest.raises(UserError, match=r"needs the tokens of Llama 4's turns\. mine: .*no special token <\|eot\|>"):
        chat_tokens(plain, [Message("user", "a")])


def slow_weights(tokenizer: Tokenizer, texts: list[tuple[str, float]]) -> list[float]:
    """Of each token, the weight of the text that its last character is in; byte for byte."""
    owners = [weight for text, weight in texts for _ in text.encode()]
    at, weights = 0, []
    for i in tokenizer.encode("".join(text for text, _ in texts)):
        at += len(tokenizer.token_bytes(i))
        weights.append(owners[at - 1])
    return weights


@given(
    st.lists(st.tuples(st.text(st.sampled_from("\n ab. "), max_size=6), st.sampled_from([0.0, 1.0, 2.5])), max_size=5)
)
def test_a_token_weighs_what_the_text_weighs_in_which_it_ends(texts):
    found = encode(TOKENIZER, [Text(*text) for text in texts])
    assert found.ids == TOKENIZER.encode("".join(text for text, _ in texts))
    assert found.weights.tolist() == slow_weights(TOKENIZER, texts)


def test_only_answers_and_their_ends_weigh_in_a_conversation():
    turns = [("user", Text("Hi!", 0.0)), ("assistant", Text("Yes.", 1.0)), ("user", Text("?", 0.0))]
    found = encode(TOKENIZER, chat_pieces([Message(role, [text]) for role, text in turns], weights=True))
    weighted = [i for i, weight in zip(found.ids, found.weights, strict=True) if weight]
    assert weighted == [*TOKENIZER.encode("Yes."), TOKENIZER.special[TURN_END]]
    assert found.ids == chat_tokens(TOKENIZER, [Message(role, text.text) for role, text in turns], False)


def test_an_end_cuts_a_text_and_holds_the_place_of_a_file():
    found = encode(TOKENIZER, [Text("ab"), End(), Text("cd", 0.5), End(7), Text("e")])
    parts = [TOKENIZER.encode(text) for text in ("ab", "cd", "e")]
    assert found.ids == [i for part in parts for i in part]
    assert found.files == [(len(parts[0]) + len(parts[1]), 7)]
    assert found.weights.tolist() == [1.0] * len(parts[0]) + [0.5] * len(parts[1]) + [1.0] * len(parts[2])


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
        names(part)
        for _, content in chat
        if not isinstance(content, str)
        for part in content
        if not isinstance(part, str)
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
