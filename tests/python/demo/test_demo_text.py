"""The demo's text: same bytes and same batches every time, nothing held out is trained on."""

import pytest
import torch

from stdlib_text import VOCABULARY, load_text


@pytest.fixture(scope="module")
def text():
    return load_text()


@pytest.fixture
def small_tree(tmp_path):
    """A standard library in miniature, with folders that must not be read."""
    for index in range(40):
        folder = tmp_path / ("package" if index % 2 else "")
        folder.mkdir(exist_ok=True)
        (folder / f"module_{index}.py").write_bytes(f"x{index} = 1\n".encode() * 1000)
    for skipped in ("site-packages", "test", "__pycache__"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "other.py").write_bytes(b"SKIPPED" * 1000)
    (tmp_path / "data.txt").write_bytes(b"SKIPPED" * 1000)
    return tmp_path


def test_text_is_the_same_every_time(text):
    again = load_text()
    assert again.files == text.files > 100
    assert torch.equal(again.train, text.train)
    assert torch.equal(again.held_out, text.held_out)


def test_text_is_bytes_and_mostly_training_text(text):
    assert text.train.dtype == torch.uint8
    assert text.train.numel() > 5 * text.held_out.numel() > 500_000
    assert VOCABULARY == 256


def test_text_leaves_out_third_party_and_tests(small_tree):
    text = load_text(small_tree)
    assert text.files == 40
    for part in (text.train, text.held_out):
        assert b"SKIPPED" not in part.numpy().tobytes()


def test_text_splits_by_file(small_tree):
    text = load_text(small_tree)
    train, held_out = (
        set(part.numpy().tobytes().split(b"\0")) - {b""} for part in (text.train, text.held_out)
    )
    assert not train & held_out
    assert len(train) + len(held_out) == 40


def test_text_split_does_not_move_when_files_come(small_tree):
    before = set(load_text(small_tree).held_out.numpy().tobytes().split(b"\0"))
    (small_tree / "a_new_module.py").write_bytes(b"new = 1\n" * 500)
    after = set(load_text(small_tree).held_out.numpy().tobytes().split(b"\0"))
    assert before <= after


def test_text_too_little_is_refused(tmp_path):
    (tmp_path / "only.py").write_text("pass\n")
    with pytest.raises(RuntimeError, match="need at least 16384 bytes"):
        load_text(tmp_path)


def test_batch_targets_are_the_inputs_one_byte_later(text):
    inputs, targets = text.batch(3, 4, 16, seed=0)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batch_depends_on_seed_and_step_only(text):
    first = text.batch(7, 4, 32, seed=1)
    torch.manual_seed(99)
    torch.rand(10)
    again = text.batch(7, 4, 32, seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], text.batch(8, 4, 32, seed=1)[0])
    assert not torch.equal(first[0], text.batch(7, 4, 32, seed=2)[0])


def test_held_out_batch_is_fixed(text):
    first, again = (text.held_out_batch(2, 3, 16)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, text.held_out_batch(3, 3, 16)[0])
