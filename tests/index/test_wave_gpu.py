"""An index on a GPU: it finds and attends to what the same index on the CPU does."""

from __future__ import annotations

import pytest
import torch

from wavekv.errors import InputError
from wavekv.index import IndexParams, SearchResult, WaveIndex, exact_search, recall_at_k

from .index_cases import SMALL, Data, assert_right, assert_same_tensors, make_data, snapshot

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(data: Data, params: IndexParams = SMALL, **options) -> tuple[WaveIndex, WaveIndex]:
    """The same index on the CPU and on the GPU."""
    sample = options.get("query_sample")
    return (
        WaveIndex.build(data.keys, params, values=data.values, query_sample=sample),
        WaveIndex.build(
            data.keys.cuda(),
            params,
            values=data.values.cuda(),
            query_sample=None if sample is None else sample.cuda(),
        ),
    )


def on_cpu(result: SearchResult) -> SearchResult:
    assert result.ids.device.type == result.scores.device.type == "cuda"
    return SearchResult(*(getattr(result, name).cpu() for name in SearchResult.__slots__))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", [0, 1, 63, 64, 500])
@pytest.mark.parametrize("has_sample", [False, True])
def test_a_search_is_right(dtype, num_keys, has_sample) -> None:
    data = make_data(0, num_keys, dtype=dtype)
    cpu, gpu = pair(data, query_sample=data.queries if has_sample else None)
    assert gpu.device.type == "cuda"
    queries = data.queries.cuda()
    for options in ({}, {"budget": 1.0}, {"top_p": 0.5}, {"group": 2}, {"budget": 30}):
        found = on_cpu(gpu.search(queries, 10, **options))
        assert_right(found, data.keys, data.queries, 10)
    exact = exact_search(data.keys, data.queries, 10)
    found = on_cpu(gpu.search(queries, 10, budget=1.0))
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-4, atol=1e-3)
    assert cpu.stats() | {"device": ""} == gpu.stats() | {"device": ""} or has_sample


@pytest.mark.parametrize("has_sample", [False, True])
def test_recall_is_that_of_the_cpu(has_sample: bool) -> None:
    recalls = []
    for seed in range(5):
        data = make_data(seed, 2000, dim=64, num_queries=30)
        cpu, gpu = pair(data, query_sample=data.queries if has_sample else None)
        truth = exact_search(data.keys, data.queries, 10).ids
        results = cpu.search(data.queries, 10), on_cpu(gpu.search(data.queries.cuda(), 10))
        recalls.append([float(recall_at_k(x.ids, truth).mean()) for x in results])
    on_host, on_device = torch.tensor(recalls).mean(0)
    assert abs(on_host - on_device) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", [0, 40, 500])
def test_attention_is_that_of_the_cpu(dtype, num_keys) -> None:
    data = make_data(0, num_keys, dtype=dtype)
    cpu, gpu = pair(data)
    for budget, bound in ((1.0, 1e-4), (0.3, 0.1)):
        for options in ({}, {"group": 3, "softcap": 20.0}):
            wanted = cpu.attend(data.queries, budget=budget, **options)
            got = gpu.attend(data.queries.cuda(), budget=budget, **options)
            assert got.out.device.type == "cuda"
            assert (got.out.cpu() - wanted.out).norm() <= bound * wanted.out.norm() + 1e-6
            assert torch.equal(got.keys_attended.cpu(), wanted.keys_attended)


def test_appends_and_truncations_equal_a_build() -> None:
    data = make_data(0, 500)
    _, whole = pair(data)
    keys, values = data.keys.cuda(), data.values.cuda()
    index = WaveIndex.build(keys[:, :100], SMALL, values=values[:, :100])
    assert index.append(keys[:, 100:300], values[:, 100:300]) == range(100, 300)
    index.truncate(130)
    index.append(keys[:, 130:], values[:, 130:])
    found, wanted = (on_cpu(x.search(data.queries.cuda(), 10, budget=1.0)) for x in (index, whole))
    assert torch.equal(found.ids, wanted.ids)
    near, far = (x.attend(data.queries.cuda(), budget=0.2).out for x in (index, whole))
    torch.testing.assert_close(near, far, rtol=1e-2, atol=1e-2)


def test_an_index_moves_by_a_file(tmp_path) -> None:
    data = make_data(0, 500)
    cpu, gpu = pair(data)
    gpu.save(tmp_path / "gpu")
    cpu.save(tmp_path / "cpu")
    there = WaveIndex.load(tmp_path / "cpu", device="cuda")
    back = WaveIndex.load(tmp_path / "gpu")
    assert there.device.type == "cuda"
    assert back.device.type == "cpu"
    same = {name: tensor.cpu() for name, tensor in snapshot(there).items()}
    assert_same_tensors(same, snapshot(cpu))
    same = {name: tensor.cpu() for name, tensor in snapshot(gpu).items()}
    assert_same_tensors(snapshot(back), same)
    found = on_cpu(there.search(data.queries.cuda(), 10, budget=0.5))
    wanted = cpu.search(data.queries, 10, budget=0.5)
    assert float(recall_at_k(found.ids, wanted.ids).mean()) > 0.98
    there.append(data.keys.cuda(), data.values.cuda())
    assert len(there) == 1000


def test_devices_do_not_mix() -> None:
    data = make_data(0, 100)
    cpu, gpu = pair(data)
    for index, other in ((cpu, "cuda"), (gpu, "cpu")):
        message = f"on {index.device} as the index, got {other}"
        keys, values, queries = (x.to(other) for x in data)
        for use in (
            lambda index=index, queries=queries: index.search(queries, 1),
            lambda index=index, queries=queries: index.attend(queries),
            lambda index=index, keys=keys, values=values: index.append(keys, values),
        ):
            with pytest.raises(InputError, match=message):
                use()
        with pytest.raises(InputError, match=f"query_sample must be {message}"):
            WaveIndex.build(data.keys.to(index.device), SMALL, query_sample=queries)
        with pytest.raises(InputError, match=f"queries must be {message}"):
            exact_search(data.keys.to(index.device), queries, 1)
    with pytest.raises(InputError, match="queries must be on cuda:0 as the index, got cpu"):
        gpu.search(data.queries.numpy(), 1)
