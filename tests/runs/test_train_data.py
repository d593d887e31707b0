"""The windows of a pass cover the stream once, in an order that (seed, step) alone decides."""

import numpy as np

from qjax.runs.train_data import token_stream, training_batch
from qjax.runs.train_tokenizer import train_tokenizer

STREAM = np.arange(1, 1001, dtype=np.uint16)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    first = training_batch(STREAM, 7, 4, 16, seed=1)
    assert first.shape == (4, 17)
    np.testing.assert_array_equal(first, training_batch(STREAM, 7, 4, 16, seed=1))
    assert not np.array_equal(first, training_batch(STREAM, 7, 4, 16, seed=2))
    assert not np.array_equal(first, training_batch(STREAM, 8, 4, 16, seed=1))


def test_a_pass_predicts_each_token_at_most_once_and_the_next_pass_reorders() -> None:
    n_windows = (len(STREAM) - 16) // 16
    passes = [
        [training_batch(STREAM, step, 1, 16, seed=1)[0] for step in range(start, start + n_windows)]
        for start in (0, n_windows)
    ]
    for windows in passes:
        assert all(window[0] == 0 for window in windows)
        predicted = np.concatenate([window[1:] for window in windows])
        assert len(set(predicted.tolist())) == len(predicted) == n_windows * 16
        assert all((np.diff(window[1:]) == 1).all() for window in windows)
    assert [w[1] for w in passes[0]] != [w[1] for w in passes[1]]


def test_texts_stand_between_bos_and_eos() -> None:
    tokenizer = train_tokenizer(["abc"], 258)
    stream = token_stream(tokenizer, ["ab", "c"])
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")
    assert stream.tolist() == [0, a, b, 1, 0, c, 1]
