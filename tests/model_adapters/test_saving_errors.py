"""What cannot be saved or loaded is refused with an error that names it, and answers nothing."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_caches import (
    digests,
    prefilled,
    same_answers,
    saving_model,
    steady,
)
from tiny_models import TINY, left_padded, make_model
from tokenizers import Tokenizer, models, pre_tokenizers

from wavekv import OffloadedCache, OffloadedKV, SavedContext
from wavekv.errors import CacheError, ContextFormatError, ContextMismatchError, LockedError
from wavekv.saved.lock import locked
from wavekv.saved.manifest import NAME


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved context with layers of two kinds and padding, to be copied."""
    path = tmp_path_factory.mktemp("errors") / "saved"
    cache, _ = prefilled(saving_model("gemma3_text"))
    cache.save(path, token_ids=left_padded(131, 97, 113)[0])
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copied")
    return tmp_path / "copied"


MODELS: dict[str, dict[str, Any]] = {
    "vocab_size": {"vocab_size": 102},
    "hidden_size": {"hidden_size": 64},
    "intermediate_size": {"intermediate_size": 65},
    "num_hidden_layers": {"num_hidden_layers": 2},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 32},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "max_position_embeddings": {"max_position_embeddings": 8192},
}


@pytest.mark.parametrize("field", MODELS)
def test_another_model(field: str, tmp_path: Path) -> None:
    prefilled(saving_model("llama"))[0].save(tmp_path / "saved")
    other = OffloadedKV(make_model("llama", "sdpa", **MODELS[field]), TINY)
    with pytest.raises(ContextMismatchError, match=f"with {field}=.*got"):
        OffloadedCache.load(tmp_path / "saved", other)


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    prefilled(saving_model("llama"))[0].save(tmp_path / "saved")
    for model_type, name in (("qwen2", "model_type"), ("gemma3_text", "model_type")):
        with pytest.raises(ContextMismatchError, match=f"with {name}='{model_type}', got 'llama'"):
            OffloadedCache.load(tmp_path / "saved", saving_model(model_type))


@pytest.mark.parametrize("field", ["layer_types", "sliding_window"])
def test_another_window(field: str, saved: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    changes = {"layer_types": {"layer_types": kinds}, "sliding_window": {"sliding_window": 17}}
    other = OffloadedKV(make_model("gemma3_text", "sdpa", **changes[field]), TINY)
    with pytest.raises(ContextMismatchError, match=f"with {field}="):
        OffloadedCache.load(saved, other)


def test_another_dtype(saved: Path) -> None:
    other = OffloadedKV(make_model("gemma3_text", "sdpa").to(torch.bfloat16), TINY)
    with pytest.raises(ContextMismatchError, match="with dtype='bfloat16', got 'float32'"):
        OffloadedCache.load(saved, other)


def test_other_weights_of_the_same_shape(tmp_path: Path) -> None:
    inner = steady(make_model("llama", "sdpa", num_hidden_layers=2))
    model = OffloadedKV(inner, TINY, mode="exact")
    twin, mask = prefilled(model)
    prefilled(model)[0].save(tmp_path / "saved")
    for name, weight in inner.state_dict().items():
        before = weight.clone()
        weight.mul_(1.001)
        with pytest.raises(ContextMismatchError, match="same shape but other weights"):
            OffloadedCache.load(tmp_path / "saved", model)
        weight.copy_(before)
        assert torch.equal(inner.state_dict()[name], before)
    # as it was: the same again, and so is a copy of it
    twins = copy.deepcopy(inner)
    OffloadedCache.load(tmp_path / "saved", OffloadedKV(twins, TINY))
    same_answers(model, twin, OffloadedCache.load(tmp_path / "saved", model), mask)


def words(*of: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(of)}, of[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class Words:
    """A tokenizer that is not of the `tokenizers` library."""

    def __init__(self, *of: str) -> None:
        self.vocab = {word: i for i, word in enumerate(of)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


@pytest.mark.parametrize("kind", [words, Words])
def test_another_tokenizer(kind: Callable[..., Any], tmp_path: Path) -> None:
    model = saving_model("llama")
    cache, _ = prefilled(model)
    cache.save(tmp_path / "saved", tokenizer=kind("a", "b", "c"))
    cache.save(tmp_path / "unknown")
    OffloadedCache.load(tmp_path / "saved", model, tokenizer=kind("a", "b", "c"))
    OffloadedCache.load(tmp_path / "saved", model)
    OffloadedCache.load(tmp_path / "unknown", model, tokenizer=kind("a", "b", "c"))
    for other in kind("a", "c", "b"), kind("a", "b"), kind("a", "b", "c", "d"):
        with pytest.raises(ContextMismatchError, match="tokenizer="):
            OffloadedCache.load(tmp_path / "saved", model, tokenizer=other)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = saving_model("llama")
    with pytest.raises(CacheError, match="got an empty one"):
        model.new_cache().save(tmp_path / "saved")
    cache, _ = prefilled(model)
    for shape in ((131,), (3, 130), (1, 131), (3, 131, 1)):
        ids = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises(CacheError, match=r"expected token_ids .*\(3, 131\)"):
            cache.save(tmp_path / "saved", token_ids=ids)
    cache.crop(-131)
    with pytest.raises(CacheError, match="got an empty one"):
        cache.save(tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_a_cache_whose_model_is_gone(tmp_path: Path) -> None:
    model = OffloadedKV(make_model("llama", "sdpa", num_hidden_layers=1), TINY)
    cache, _ = prefilled(model)
    del model
    import gc

    gc.collect()
    with pytest.raises(CacheError, match="keep the model"):
        cache.save(tmp_path / "saved")


def test_a_model_that_is_not_wrapped(saved: Path) -> None:
    with pytest.raises(CacheError, match=r"OffloadedKV\(model\), got Gemma3ForCausalLM"):
        OffloadedCache.load(saved, make_model("gemma3_text"))


def test_places_of_something_else(tmp_path: Path) -> None:
    model = saving_model("llama")
    cache, _ = prefilled(model)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/kept").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / NAME).write_text('{"format": "something"}')
    before = digests(tmp_path)
    for name in "file", "folder", "other":
        with pytest.raises(ContextFormatError, match=name):
            cache.save(tmp_path / name)
        with pytest.raises(ContextFormatError, match=name):
            OffloadedCache.load(tmp_path / name, model)
    with pytest.raises(FileNotFoundError, match="nothing"):
        OffloadedCache.load(tmp_path / "nothing", model)
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "no/folder")
    assert digests(tmp_path) == before


def test_a_path_that_is_being_written(tmp_path: Path) -> None:
    model = saving_model("llama")
    cache, _ = prefilled(model)
    cache.save(tmp_path / "saved")
    before = digests(tmp_path)
    with locked(tmp_path / "saved"), pytest.raises(LockedError, match=str(os.getpid())):
        cache.save(tmp_path / "saved")
    assert digests(tmp_path) == before
    cache.save(tmp_path / "saved")


def test_a_newer_version(copied: Path) -> None:
    text = (copied / NAME).read_text()
    (copied / NAME).write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ContextFormatError, match="format_version=1, got 2"):
        OffloadedCache.load(copied, saving_model("gemma3_text"))
    with pytest.raises(ContextFormatError, match="format_version=1, got 2"):
        SavedContext.open(copied)
