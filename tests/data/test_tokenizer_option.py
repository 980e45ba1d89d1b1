"""`data.tokenizer`: a file in place of the tokenizers made here, from the config to the batch."""

import dataclasses
import json

import numpy as np
import pytest

from data.mixture import continued
from data.pipeline import Dataset, build_dataset
from data.sources import load_tokenizer
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, IMAGE_TOKENS, PAD, PATCH
from sharding.errors import UserError
from tests.data import llama4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama4")
    (path / "tokenizer.json").write_text(llama4.serialised())
    return path


@pytest.fixture(scope="module")
def from_file(config, media, folder) -> Dataset:
    return build_dataset(
        dataclasses.replace(config, tokenizer=str(folder), scenes=60, sequence_length=512), media, "train"
    )


def test_batches_have_the_ids_of_the_file(from_file, dataset):
    special = from_file.tokenizer.special
    assert special[BEGIN_OF_TEXT] == llama4.BPE_SIZE
    batch = from_file.batch(0)
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    assert set(batch["tokens"][starts]) == {special[BEGIN_OF_TEXT]}
    assert set(batch["tokens"][batch["segment_ids"] == 0]) <= {special[PAD]}
    for b, row in enumerate(batch["tokens"]):
        positions = batch["image_positions"][b]
        np.testing.assert_array_equal(positions[positions >= 0], np.flatnonzero(row == special[PATCH]))
    unpredicted = [special[name] for name in (*IMAGE_TOKENS, BEGIN_OF_TEXT, PAD)]
    predicted = batch["targets"][batch["loss_weights"] > 0]
    assert not np.isin(predicted, unpredicted).any()
    assert np.isin(special[END_OF_TEXT], predicted)


def test_a_run_that_goes_on_with_fewer_sources_keeps_the_tokenizer_that_it_began_with(config, media):
    """A BPE is trained on the texts of the sources."""
    begun = dataclasses.replace(config, mixture={"scenes": 0.5, "clips": 0.5}, tokenizer="bpe", tokenizer_size=300)
    now = dataclasses.replace(begun, mixture={"scenes": 1.0, "clips": 0.0})
    journal = continued(continued([], begun, 0), now, 7)
    at_first, later, anew = (
        load_tokenizer(begun, media),
        load_tokenizer(now, media, journal),
        load_tokenizer(now, media),
    )
    assert at_first.digest == later.digest != anew.digest


def test_documents_say_the_same_in_any_tokenizer(from_file, dataset):
    for i in range(60):
        ((ours,),) = (source.read([i]) for source in dataset._sources if source.name == "scenes")
        ((theirs,),) = (source.read([i]) for source in from_file._sources if source.name == "scenes")
        assert from_file.tokenizer.decode(theirs.tokens_S) == dataset.tokenizer.decode(ours.tokens_S)


def test_another_tokenizer_in_the_same_place_gives_other_data(config, media, from_file, tmp_path):
    """The cache is shared, and would give the ids of the first one."""
    (tmp_path / "tokenizer.json").write_text(llama4.serialised())
    here = dataclasses.replace(from_file.config, tokenizer=str(tmp_path / "tokenizer.json"))
    first = build_dataset(here, media, "train")
    assert first.digest == from_file.digest
    content = llama4.plain()
    del content["model"]["merges"][100:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    second = build_dataset(here, media, "train")
    assert second.digest != first.digest
    for before, after in zip(first._sources, second._sources, strict=True):
        fewer, more = before.read([0])[0].tokens_S, after.read([0])[0].tokens_S
        said, again = first.tokenizer.decode(fewer), second.tokenizer.decode(more)
        assert said.startswith(again) if before.name == "text" else said == again  # a row holds less text now
        assert len(more) / len(again) > len(fewer) / len(said)


def test_what_the_data_needs_and_the_file_lacks_is_named(config, media, tmp_path):
    content = llama4.plain()
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < llama4.BPE_SIZE + 12]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    lacking = dataclasses.replace(config, tokenizer=str(tmp_path))
    missing = r"<\|tile_x_separator\|>, <\|tile_y_separator\|>, <\|image\|>, <\|patch\|>, expected"
    with pytest.raises(UserError, match=rf"data\.tokenizer .*/tokenizer\.json: found no special token {missing}"):
        build_dataset(lacking, media, "train")
    text = dataclasses.replace(lacking, mixture={"text": 1.0})
    assert build_dataset(text, media, "heldout").batch(0)["tokens"].max() < llama4.BPE_SIZE + 12
    content["added_tokens"] = content["added_tokens"][:1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    missing = r"<\|end_of_text\|>, <\|finetune_right_pad\|>, expected"
    with pytest.raises(UserError, match=rf"found no special token {missing}"):
        build_dataset(text, media, "heldout")


@pytest.mark.parametrize("name", ["bppe", "~/nowhere/tokenizer.json"])
def test_a_name_that_is_no_file_is_refused_with_what_it_may_be(config, media, name):
    with pytest.raises(UserError, match=r"data\.tokenizer \(bpe, bytes or a path\): .*there is no such file"):
        build_dataset(dataclasses.replace(config, tokenizer=name), media, "train")
