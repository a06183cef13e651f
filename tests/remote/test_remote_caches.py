"""A cache that went through a store answers as before."""

from pathlib import Path

import pytest
import torch

from wavekv import OffloadedCache, OffloadedKV
from wavekv.model_adapters.bundled import load_demo_model
from wavekv.remote import store
from wavekv.remote.pull import pull
from wavekv.remote.push import push


def test_a_cache_comes_back_from_a_store(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # not the small ones of other tests: there are megabytes
    monkeypatch.setattr(store, "CHUNK", 8 << 20)
    with OffloadedKV(load_demo_model(), host_dtype="int8") as model:
        ids = torch.randint(20, 1000, (1, 900), generator=torch.Generator().manual_seed(0))
        cache = model.new_cache()
        model.prefill(ids, cache)
        cache.save(tmp_path / "here", token_ids=ids)
        push(tmp_path / "here", f"{s3_bucket}/there")
        pull(f"{s3_bucket}/there", tmp_path / "back")
        loaded = OffloadedCache.load(tmp_path / "back", model, verify=True)
        more = torch.cat([ids, ids[:, :1]], 1)
        options = {"max_new_tokens": 8, "do_sample": False}
        expected = model.generate(more, past_key_values=cache, **options)
        assert torch.equal(model.generate(more, past_key_values=loaded, **options), expected)
