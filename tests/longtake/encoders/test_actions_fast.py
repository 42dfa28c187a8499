"""FAST: the transform, the exact round trip, both ends of the range, errors instead of zeros, and every file."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import fft
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models
from tokenizers.trainers import BpeTrainer

from longtake.encoders.actions_fast import FastTokenizer, dct_matrix, latent_windows, training_chunks
from longtake.errors import BadSampleError, ConfigError, DataError


def smooth(n: int, length: int = 17, width: int = 25, seed: int = 0) -> np.ndarray:
    """Returns smooth chunks [n T D] whose columns have very different sizes and places."""
    rng = np.random.default_rng(seed)
    time = np.arange(length)[None, :, None] / length
    size, place = np.geomspace(0.01, 300, width), np.linspace(-5, 40, width)
    frequency, phase = rng.uniform(0, 3, (n, 1, width)), rng.uniform(0, 6, (n, 1, width))
    return place + size * (np.sin(frequency * time + phase) + 0.02 * rng.standard_normal((n, length, width)))


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return FastTokenizer.fit(smooth(300), vocab_size=1024)


@pytest.mark.parametrize("length", [1, 2, 8, 16, 17, 50])
def test_dct_is_orthonormal(length):
    matrix = dct_matrix(length)
    assert np.abs(matrix @ matrix.T - np.eye(length)).max() < 1e-13
    assert matrix[0] == pytest.approx(np.full(length, length**-0.5))


def test_dct_equals_scipy():
    chunk = np.random.default_rng(0).standard_normal((17, 25))
    assert np.abs(dct_matrix(17) @ chunk - fft.dct(chunk, axis=0, norm="ortho")).max() < 4e-14


def test_dct_by_hand():
    """A linear ramp of 4: the textbook coefficients."""
    found = dct_matrix(4) @ np.array([0.0, 1.0, 2.0, 3.0])
    assert found == pytest.approx([3.0, -2.230442497, 0.0, -0.158512668], abs=1e-8)


def test_round_trip_is_exact_inside_the_range(tokenizer):
    """25 columns, 17 steps: what comes back is the rounded spectrum, and encodes to the same tokens again."""
    chunks = smooth(100, seed=1)
    tokens = tokenizer.encode(chunks)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == (100, 17, 25)
    assert np.array_equal(tokenizer.quantise(decoded), tokenizer.quantise(chunks))
    assert tokenizer.encode(decoded) == tokens
    assert tokenizer.vocab_size <= 1024
    assert all(0 <= token < tokenizer.vocab_size for ids in tokens for token in ids)
    assert np.mean([len(ids) for ids in tokens]) < 0.6 * 17 * 25


def test_error_is_that_of_rounding(tokenizer):
    """A coefficient is off by 1 / (2 scale) at most; finer scales are better in proportion."""
    chunks = smooth(50, seed=2)
    errors = []
    for scale in (10.0, 40.0):
        fitted = FastTokenizer.fit(np.concatenate([smooth(50), chunks]), vocab_size=400, scale=scale)
        assert fitted.low is not None
        assert fitted.high is not None
        difference = (fitted.decode(fitted.encode(chunks)) - chunks) / (fitted.high - fitted.low) * 2
        spectrum = np.einsum("kt,ntd->nkd", dct_matrix(17), difference)
        assert np.abs(spectrum).max() <= 0.5 / scale + 1e-9
        errors.append(np.sqrt((difference**2).mean()))
    assert 0.02 < errors[0] < 0.1 / 12**0.5  # that of a uniform rounding error; what rounds to 0 has less
    assert errors[1] < errors[0] / 3


def test_order_is_frequency_by_frequency():
    """All columns of frequency 0 come first."""
    chunks = np.zeros((4, 4, 3))
    chunks[:, :, 1] = np.array([-1.0, 1.0, 0.5, 0.0])[:, None]  # constant in time: only frequency 0
    chunks[:, :, 0] = np.linspace(-1, 1, 4)[:, None]
    codes = FastTokenizer.fit(chunks).quantise(chunks)
    assert codes.shape == (4, 12)
    assert not codes[:, 3:].any()
    assert codes[:, 0].tolist() == sorted(codes[:, 0].tolist())
    assert codes[0, 1] < 0 < codes[1, 1]


@pytest.mark.parametrize("sign", [-1, 1])
def test_both_ends_are_clipped(tokenizer, sign):
    """Actions far outside keep the number of coefficients and become the end of the range."""
    wild = smooth(3, seed=3)
    wild[:, :, 4] += sign * 1e7
    codes = tokenizer.quantise(wild)
    assert codes.min() >= tokenizer.codes[0]
    assert codes.max() <= tokenizer.codes[-1]
    end = tokenizer.codes[0] if sign < 0 else tokenizer.codes[-1]
    assert (codes[:, 4] == end).all()
    decoded = tokenizer.decode(tokenizer.encode(wild))
    assert np.array_equal(tokenizer.quantise(decoded), codes)
    others = [column for column in range(25) if column != 4]
    assert np.array_equal(
        tokenizer.quantise(wild).reshape(3, 17, 25)[..., others],
        tokenizer.quantise(smooth(3, seed=3)).reshape(3, 17, 25)[..., others],
    )


def test_codes_never_seen_can_be_written():
    """Coefficients between those of the training chunks, which a vocabulary of seen bytes would drop in silence."""
    chunks = np.zeros((10, 8, 2))
    chunks[::2] = 1.0
    fitted = FastTokenizer.fit(chunks, scale=100.0)
    assert len(fitted.codes) > 256, "two bytes a character"
    between = np.full((1, 8, 2), 0.37)
    assert fitted.decode(fitted.encode(between)) == pytest.approx(between, abs=0.01)
    every = fitted.codes[: len(fitted.codes) // 16 * 16].reshape(-1, 16)
    texts = ["".join(chr(code - fitted.min_token) for code in row) for row in every]
    ids = [fitted.bpe.encode(text).ids for text in texts]
    for row, tokens in zip(every, ids, strict=True):
        assert np.array_equal(fitted._coefficients_of(tokens, 0, 16), row)


def test_failed_decode_is_an_error(tokenizer):
    ids = tokenizer.encode(smooth(1, seed=4))[0]
    with pytest.raises(BadSampleError, match="chunk 0 hold 4[0-9]{2} coefficients; expected 425"):
        tokenizer.decode([[*ids, ids[0]]])
    with pytest.raises(BadSampleError, match="expected 425"):
        tokenizer.decode([ids, ids[:-1]])
    with pytest.raises(BadSampleError, match="hold 0 coefficients"):
        tokenizer.decode([[]])
    for bad in (tokenizer.vocab_size, -1):
        with pytest.raises(BadSampleError, match=f"FAST token {bad}; expected 0 to"):
            tokenizer.decode([[*ids[:-1], bad]])


def test_half_a_character_is_an_error():
    """A lone second byte has the right number of characters and stands for none of the coefficients."""
    fitted = FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (50, 4, 1)), scale=200.0, vocab_size=300)
    second_byte = next(i for i in range(fitted.vocab_size) if fitted.bpe.decode([i]) == "\ufffd")
    ids = fitted.encode(np.zeros((1, 4, 1)))[0]
    low = next(i for i in range(fitted.vocab_size) if len(fitted.bpe.decode([i])) == 1 and i != second_byte)
    with pytest.raises(BadSampleError, match="outside of the fitted range"):
        fitted.decode([[second_byte, low, low, low]])
    assert fitted.decode([ids]) == pytest.approx(np.zeros((1, 4, 1)), abs=0.01)


def test_save_and_load(tokenizer, tmp_path):
    chunks = smooth(20, seed=5)
    tokenizer.save(tmp_path / "new" / "fast.json")
    loaded = FastTokenizer.load(tmp_path / "new" / "fast.json")
    assert loaded.encode(chunks) == tokenizer.encode(chunks)
    assert np.array_equal(loaded.decode(loaded.encode(chunks)), tokenizer.decode(tokenizer.encode(chunks)))
    assert loaded.to_dict() == tokenizer.to_dict()
    assert (loaded.horizon, loaded.action_dim) == (17, 25)
    again = FastTokenizer.fit(smooth(300), vocab_size=1024)
    assert again.to_dict() == tokenizer.to_dict(), "fitting is a pure function of the chunks"


def upstream_file(path, texts: list[str], size: int) -> None:
    """Trains and writes a tokenizer.json in the way of the published processor's fit()."""
    trainer = BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[chr(code) for code in range(size)],
        max_token_length=10000,
    )
    published = ByteLevelBPETokenizer()
    published._tokenizer.train_from_iterator(texts, trainer=trainer)
    published._tokenizer.save(str(path))


def test_published_file(tmp_path):
    """A file made in upstream's way: our tokens are those of its own wrapper, wherever that can write the chunk."""
    chunks = np.clip(smooth(200, 16, 7, seed=6) / np.abs(smooth(200, 16, 7, seed=6)).max(axis=(0, 1)), -1, 1)
    spectrum = np.rint(10 * np.einsum("kt,ntd->nkd", dct_matrix(16), chunks)).reshape(200, -1).astype(int)
    low, high = spectrum.min(), spectrum.max()
    texts = ["".join(map(chr, np.maximum(row - low, 0))) for row in spectrum]
    upstream_file(tmp_path / "tokenizer.json", texts, high - low + 1)
    ours = FastTokenizer.from_tokenizer_json(tmp_path / "tokenizer.json", min_token=int(low))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode(chunks) == [theirs.encode(text).ids for text in texts]
    decoded = ours.decode(ours.encode(chunks), horizon=16, action_dim=7)
    assert np.array_equal(ours.quantise(decoded).reshape(200, -1), spectrum)
    assert np.sqrt(((decoded - chunks) ** 2).mean()) < 0.03
    with pytest.raises(ValueError, match="expected both to be given"):
        ours.decode(ours.encode(chunks))

    # a code that the file never saw is dropped by it in silence; ours takes the nearest that it can write
    known = set((ours.codes - ours.min_token).tolist())
    missing = next(code for code in range(128) if code not in known)
    assert theirs.decode(theirs.encode(chr(missing)).ids) == ""
    wild = chunks[:1].copy()
    wild[:, :, 0] += 50
    assert ours.decode(ours.encode(wild), horizon=16, action_dim=7).shape == (1, 16, 7)
    assert ours.quantise(wild).max() == ours.codes[-1]
    loaded = FastTokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert np.array_equal(loaded.codes, ours.codes)
    assert loaded.encode(wild) == ours.encode(wild)


def test_columns_that_hardly_move():
    """A key that is pressed in 1 of 500 frames, one that never is, and a constant: none of them blows up."""
    rng = np.random.default_rng(7)
    chunks = np.zeros((200, 10, 4))
    chunks[..., 0] = rng.uniform(-1, 1, (200, 10))
    chunks[::50, 3, 1] = 1.0
    chunks[..., 3] = 7.5
    fitted = FastTokenizer.fit(chunks)
    assert np.abs(fitted.codes).max() < 200
    decoded = fitted.decode(fitted.encode(chunks))
    assert np.abs(decoded - chunks).max() < 0.2
    assert decoded[..., 3] == pytest.approx(np.full((200, 10), 7.5), abs=0.06)


def test_windows_of_latent_frames():
    actions = np.arange(17.0)[:, None] * [1, 10]
    windows = latent_windows(actions, 8)
    assert windows.shape == (3, 8, 2)
    assert windows[0, :, 0].tolist() == [0] * 8
    assert windows[1, :, 0].tolist() == list(range(1, 9))
    assert windows[2, :, 1].tolist() == [10 * i for i in range(9, 17)]
    assert training_chunks([actions, np.zeros((12, 2))], 8).shape == (3 + 2, 8, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "version 2"),
        ({"codes": None}, "no FAST tokenizer"),
        ({"tokenizer": {"a": 1}}, "no tokenizer.json"),
        ({"scale": "ten"}, "no FAST tokenizer"),
    ],
)
def test_bad_files(tokenizer, tmp_path, change, words):
    (tmp_path / "fast.json").write_text(json.dumps({**tokenizer.to_dict(), **change}))
    with pytest.raises(ConfigError, match=words):
        FastTokenizer.load(tmp_path / "fast.json")


def test_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        FastTokenizer.load(tmp_path / "nowhere.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        FastTokenizer.load(tmp_path / "x.json")
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="tokenizer of something else"):
        FastTokenizer.from_tokenizer_json(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"chunks \[n T D\]"):
        FastTokenizer.fit(np.zeros((3, 4)))
    with pytest.raises(ConfigError, match="finite"):
        FastTokenizer.fit(np.full((3, 4, 2), np.nan))
    with pytest.raises(ConfigError, match=r"range below 55296. Lower `encoder.actions.scale`"):
        FastTokenizer.fit(smooth(4), scale=1e6)
    with pytest.raises(ConfigError, match="a vocabulary of 20 has no room"):
        FastTokenizer.fit(smooth(4), vocab_size=20)
    with pytest.raises(ValueError, match=r"\[2, 16, 25\]; expected \[n, 17, 25\]"):
        tokenizer.encode(np.zeros((2, 16, 25)))
    with pytest.raises(ValueError, match="NaN"):
        tokenizer.encode(np.full((1, 17, 25), np.nan))
    with pytest.raises(DataError, match="cannot be written"):
        tokenizer.save("/proc/nowhere/fast.json")
    assert dataclasses.is_dataclass(tokenizer)
