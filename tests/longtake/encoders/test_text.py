"""Captions as word ids, and UMT5 from a local folder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from longtake.encoders.text import (
    FIRST_WORD,
    PADDING,
    UNKNOWN,
    UMT5TextEncoder,
    WordsEncoder,
    cleaned,
    count_words,
    ids_in,
    words_of,
)
from longtake.errors import ConfigError
from longtake.pretrained.weights_file import build

CAPTIONS = ["Walking forward, walking LEFT", "first-person view; a wall", "walking in a hall"]


def encoder(**changes: int) -> WordsEncoder:
    return WordsEncoder(**changes).with_vocabulary(count_words(CAPTIONS))


def test_words_are_lower_case_without_punctuation() -> None:
    assert words_of("First-person view; the player's ROOM!") == ["first-person", "view", "the", "player's", "room"]


def test_the_most_frequent_words_come_first_and_ties_by_name() -> None:
    assert encoder().words == ["walking", "a", "first-person", "forward", "hall", "in", "left", "view", "wall"]


def test_ids_follow_the_words_and_padding_is_masked() -> None:
    fields = encoder(max_words=5)(["walking a wall", ""])
    walking, a, wall = FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 8
    assert fields["text_ids"].tolist() == [[[walking, a, wall, PADDING, PADDING]], [[PADDING] * 5]]
    assert fields["text_ids"].dtype == torch.int64
    assert fields["text_mask"].tolist() == [[[True, True, True, False, False]], [[False] * 5]]


def test_unknown_words_are_counted_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    words = encoder()
    with caplog.at_level(logging.WARNING, "longtake"):
        ids = words(["walking dragon dragon", "a dragon and a wall"])["text_ids"]
    assert ids[0, 0, :3].tolist() == [FIRST_WORD, UNKNOWN, UNKNOWN]
    assert words.unknown == {"dragon": 3, "and": 1}
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == ["'dragon'", "'and'"]


def test_long_captions_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    words = encoder(max_words=2)
    with caplog.at_level(logging.WARNING, "longtake"):
        fields = words(["walking a wall", "a hall", "a wall in a hall"])
    assert fields["text_ids"].shape == (3, 1, 2)
    assert words.num_cut == 2
    assert "3 words" in caplog.text


def test_another_caption_has_other_ids() -> None:
    ids = encoder()(["walking left", "walking forward"])["text_ids"]
    assert not torch.equal(ids[0], ids[1])


def test_rare_words_make_room(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "longtake"):
        words = encoder(vocab_size=4)
    assert words.words == ["walking", "a"]
    assert "9 different words" in caplog.text
    assert words(["a wall"])["text_ids"].max() < 4


def test_the_node_builds_the_same_encoder() -> None:
    words = encoder(max_words=6)
    again = build(words.node())
    assert again.fingerprint == words.fingerprint
    assert torch.equal(again(CAPTIONS)["text_ids"], words(CAPTIONS)["text_ids"])
    assert encoder(max_words=7).fingerprint != words.fingerprint


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="no vocabulary yet"):
        WordsEncoder()(["walking"])
    with pytest.raises(ConfigError, match="max_words is 0"):
        WordsEncoder(max_words=0)
    with pytest.raises(ConfigError, match="2 words, 1 of them different"):
        WordsEncoder(["a", "a"])


def tiny_umt5(folder: Path) -> Path:
    """Writes a UMT5 with random weights and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "walking", "left", "right"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder)
    return folder


def test_umt5_from_a_folder_masks_and_zeroes_padding(tmp_path: Path) -> None:
    text = UMT5TextEncoder(str(tiny_umt5(tmp_path)), max_length=6, dtype="float32")
    fields = text(["walking left", "", "walking   right"])
    rows, mask = fields["text_emb"], fields["text_mask"]
    assert rows.shape == (3, 1, 6, 16)
    assert mask.sum(-1).flatten().tolist() == [3, 1, 3]
    assert torch.equal(rows.any(-1), mask)
    assert not torch.allclose(rows[0], rows[2])
    torch.testing.assert_close(text(["walking left"])["text_emb"][0], rows[0])


def test_umt5_equals_transformers(tmp_path: Path) -> None:
    from transformers import UMT5EncoderModel

    folder = tiny_umt5(tmp_path)
    rows = UMT5TextEncoder(str(folder), max_length=6, dtype="float32")(["walking left"])["text_emb"]
    expected = UMT5EncoderModel.from_pretrained(folder)(input_ids=torch.tensor([[3, 4, 1]])).last_hidden_state
    torch.testing.assert_close(rows[0, :, :3], expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_missing_text_encoder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encoder.text.path"):
        UMT5TextEncoder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read as UMT5"):
        UMT5TextEncoder(str(tmp_path))


def test_text_is_cleaned_as_wan_does() -> None:
    assert cleaned("a  &amp;amp; b\n c ") == "a & b c"


def test_ids_of_another_vocabulary_are_found_by_word() -> None:
    before, now = ["wall", "a", "hall"], ["a", "door", "wall"]
    ids, new = ids_in(before, now)
    assert ids == [0, 1, 3, 1, 2]  # padding, unknown, "a", "door" as unknown, "wall"
    assert new == ["door"]
