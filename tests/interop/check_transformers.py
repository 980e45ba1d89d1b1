"""Asks Hugging Face transformers about an exported directory; run by `test_transformers.py` in an environment of its own.

    python check_transformers.py DIRECTORY QUESTIONS.npz ANSWERS.npz

Imports nothing of Drover's, so that nothing of Drover's can help. Arrays go in and come out by name:

    forward/I/...      input_ids, maybe attention_mask and pixel_values      -> logits, without a cache
    generate/I/...     the same of one prompt, and new_tokens                -> tokens, greedy, with the cache
    prompt/I/...       text, and image/0, image/1, ... (uint8 [h, w, 3])     -> input_ids, pixel_values of the processor
    chat/I/...         messages (JSON), and images in their order            -> input_ids of the chat template
    text/I             text                                                  -> ids, and decoded: what these decode to

`report` among the answers is JSON: versions, classes, keys of the checkpoint that were missing or unexpected, what
transformers warned of.
"""

# pyright: reportMissingImports=false
import json
import logging
import sys
from typing import Any

import numpy as np
import torch

try:
    import torchvision
except RuntimeError:
    # The CPU build of torch beside the registry's torchvision, which is compiled for CUDA: its operators do not load, and
    # two that are then declared nowhere stop the import. Image processing needs neither.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
import transformers
from PIL import Image

Tensors = dict[str, torch.Tensor]


class Warnings(logging.Handler):
    """Keeps what transformers logs as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(directory: str, questions_path: str, answers_path: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings = Warnings()
    transformers.logging.disable_progress_bar()
    transformers.logging.add_handler(warnings)
    with np.load(questions_path) as file:
        questions = dict(file)

    config = transformers.AutoConfig.from_pretrained(directory)
    multimodal = config.model_type == "llama4"
    cls = transformers.Llama4ForConditionalGeneration if multimodal else transformers.Llama4ForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, loading = cls.from_pretrained(directory, output_loading_info=True, **options)
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor: Any = transformers.AutoProcessor.from_pretrained(directory) if multimodal else None

    answers: dict[str, np.ndarray] = {}
    for group in groups(questions, "forward"):
        with torch.no_grad():
            logits = model(**tensors(questions, group), use_cache=False).logits
        answers[f"{group}/logits"] = logits.numpy()
    for group in groups(questions, "generate"):
        answers[f"{group}/tokens"] = generate(model, tensors(questions, group))
    for group in groups(questions, "prompt"):
        text = str(questions[f"{group}/text"])
        found = processor(images=images(questions, group), text=text, return_tensors="pt")
        answers[f"{group}/input_ids"] = found["input_ids"].numpy()
        answers[f"{group}/pixel_values"] = found["pixel_values"].float().numpy()
    for group in groups(questions, "chat"):
        messages, pictures = json.loads(str(questions[f"{group}/messages"])), iter(images(questions, group))
        for part in (part for message in messages for part in message["content"]):
            if part["type"] == "image":
                part["image"] = next(pictures)
        found = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        answers[f"{group}/input_ids"] = found["input_ids"].numpy()
    for group in groups(questions, "text"):
        ids = tokenizer(str(questions[group])).input_ids
        answers[f"{group}/ids"] = np.array(ids)
        answers[f"{group}/decoded"] = np.array(tokenizer.decode(ids, skip_special_tokens=True))

    report = {
        "versions": {module.__name__: module.__version__ for module in (torch, torchvision, transformers)},
        "model": type(model).__name__,
        "processor": type(processor).__name__ if processor else None,
        "loading": {name: sorted(map(str, keys)) for name, keys in loading.items()},
        "warnings": warnings.messages,
        "dtype": str(config.dtype),
    }
    answers["report"] = np.array(json.dumps(report))
    np.savez(answers_path, **answers)  # pyright: ignore[reportArgumentType]


def groups(questions: dict[str, np.ndarray], kind: str) -> list[str]:
    """`kind/0`, `kind/1`, ... as far as there are any."""
    depth = kind.count("/") + 2
    return sorted({"/".join(name.split("/")[:depth]) for name in questions if name.startswith(f"{kind}/")})


def images(questions: dict[str, np.ndarray], group: str) -> list[Image.Image]:
    """The images of a group, in their order."""
    return [Image.fromarray(questions[name]) for name in groups(questions, f"{group}/image")]


def tensors(questions: dict[str, np.ndarray], group: str) -> Tensors:
    """The arrays of a group, by the last part of their names."""
    found = {name.rpartition("/")[2]: array for name, array in questions.items() if name.startswith(f"{group}/")}
    return {name: torch.from_numpy(array) for name, array in found.items()}


def generate(model: transformers.PreTrainedModel, inputs: Tensors) -> np.ndarray:
    """New tokens of one prompt, the likeliest each time; no token ends it."""
    count = int(inputs.pop("new_tokens"))
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(inputs["input_ids"])
    tokens = model.generate(**inputs, attention_mask=mask, max_new_tokens=count, do_sample=False, use_cache=True)
    return tokens[0, inputs["input_ids"].shape[1] :].numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
