"""Text from a model: a prompt, and images if there are any, to a stream of text."""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.decode import Decoder
from trainer.models import LoadedModel
from trainer.prompts import conversation, document, need_images


@dataclasses.dataclass(frozen=True)
class Request:
    """What to say something about, and how."""

    text: str
    images: Sequence[Path] = ()
    """Image files, before the text."""
    chat: bool = False
    """The images and the text are a user's turn, and the answer is the assistant's; else they begin a document."""
    system: str | None = None
    """A system turn before it."""
    max_tokens: int = 64
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability."""
    seed: int = 0


def generate(model: LoadedModel, request: Request) -> Iterator[str]:
    """What the model says, piece by piece; it ends at a special token, or after `max_tokens`.

    Raises:
        UserError: an image or the tokenizer does not allow it.
    """
    tokenizer = model.need_tokenizer()
    if request.images:
        need_images(model)
    parts = [*request.images, request.text]
    if request.chat:
        system = [] if request.system is None else [("system", [request.system])]
        prompt = conversation(model, [*system, ("user", parts)], ask=True)
    else:
        prompt = document(model, parts)
    decoder = Decoder(model.skeleton, model.params, model.router_bias)
    stop = set(tokenizer.special.values())
    tokens = decoder.stream(
        [prompt], request.max_tokens, request.temperature, top_p=request.top_p, seed=request.seed, stop=stop
    )
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for (token,) in tokens:
        yield utf8.decode(tokenizer.token_bytes(int(token)))
    yield utf8.decode(b"", final=True)
