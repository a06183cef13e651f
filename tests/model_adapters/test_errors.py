"""What cannot be done is refused with a reason; what fails midway leaves the cache in order."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, eager_model, left_padded, make_model, prompt
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import GenerationMixin

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.errors import (
    CacheError,
    CapacityError,
    ConfigError,
    LayoutError,
    UnsupportedModelError,
)
from wavekv.kvstore import MemoryBudget
from wavekv.offload import LayerContext, OffloadRuntime

Wrap = Callable[..., OffloadedKV]
NUM_NEW = 6
HYBRIDS = ["gemma3_text", "llama4_text", "qwen3_next"]


def _attention_of(model: Any) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def _refuses(model: Any, message: str) -> None:
    """Wrapping raises, and the model is as it was."""
    before = _attention_of(model)
    with pytest.raises(UnsupportedModelError, match=message):
        OffloadedKV(model)
    assert _attention_of(model) == before


# --- models that cannot be wrapped


def test_multi_head_latent_attention() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    _refuses(build(config), r"'deepseek_v3' with multi-head latent attention.*not supported")


def test_encoder_decoder() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    _refuses(T5ForConditionalGeneration(config), r"expected a decoder-only model.*'t5'")


def test_no_layer_with_full_attention() -> None:
    model = make_model("mistral", sliding_window=16)
    _refuses(model, r"'mistral' with only DynamicSlidingWindowLayer: there is nothing to offload")


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys(model_type: str) -> None:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=50,
        vocab_size_per_layer_input=50,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_kv_shared_layers=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=None,
    )
    _refuses(build(config), "attend to keys of earlier ones; shared keys are not supported")


class OwnAttention(nn.Module):
    """Attention that does not go through transformers' interface."""


class OwnModel(PreTrainedModel, GenerationMixin):
    """A model as a repository with code of its own would bring it."""

    config_class = LlamaConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.attention = OwnAttention()

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_attention_that_cannot_be_switched() -> None:
    model = OwnModel(LlamaConfig(num_hidden_layers=1, attn_implementation="eager"))
    _refuses(model, r"expected a model whose attention can be switched.*OwnModel")


def test_a_model_without_a_head() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    _refuses(AutoModel.from_config(config), "expected a model with a language-model head")


def test_something_else_than_a_model() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected a Hugging Face model.*Linear"):
        OffloadedKV(nn.Linear(1, 1))  # type: ignore[arg-type]


# --- settings


def test_a_wrapper_is_not_wrapped(wrapped: Wrap) -> None:
    with pytest.raises(ConfigError, match=r"wrapped already.*wrap its \.model"):
        OffloadedKV(wrapped("llama"))  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -1, True])
def test_budget_out_of_range(tiny_llama: PreTrainedModel, budget: Any) -> None:
    with pytest.raises(ConfigError, match=rf"budget must be .*got {re.escape(repr(budget))}"):
        OffloadedKV(tiny_llama, budget=budget)
    assert _attention_of(tiny_llama) == "sdpa"


def test_unknown_settings(tiny_llama: PreTrainedModel, wrapped: Wrap) -> None:
    with pytest.raises(ConfigError, match=r"expected only the settings mode.*\['budgets'\]"):
        OffloadedKV(tiny_llama, budgets=0.1)
    cache = wrapped("llama").new_cache()
    with pytest.raises(ConfigError, match=r"expected only the settings mode.*\['page_size'\]"):
        cache.fork(page_size=8)


def test_cache_implementation(wrapped: Wrap) -> None:
    with pytest.raises(ConfigError, match=r"expected no cache_implementation, got 'static'"):
        wrapped("llama").generate(prompt(20), cache_implementation="static")


def test_a_checkpoint_with_a_cache_of_its_own_is_welcome(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.generation_config.cache_implementation = "static"
    with OffloadedKV(tiny_llama) as model:
        assert model.generate(prompt(20), max_new_tokens=3).shape == (1, 23)


def test_continuous_batching(wrapped: Wrap) -> None:
    with pytest.raises(UnsupportedModelError, match=r"generate_batch .*use generate\(\)"):
        wrapped("llama").generate_batch([[1, 2, 3]])


def test_a_cache_and_no_cache(wrapped: Wrap) -> None:
    model = wrapped("llama")
    with pytest.raises(ConfigError, match="either past_key_values or use_cache=False"):
        model.generate(prompt(20), past_key_values=model.new_cache(), use_cache=False)


# --- a cache that does not fit


def _calls(model: OffloadedKV, cache: Any) -> list[Callable[[], Any]]:
    ids = prompt(20)
    return [
        lambda: model.generate(ids, past_key_values=cache, max_new_tokens=2),
        lambda: model.prefill(ids, cache),
        lambda: model(ids, past_key_values=cache),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_cache_of_another_model(number: int, wrapped: Wrap) -> None:
    cache = wrapped("qwen2").new_cache()
    with pytest.raises(CacheError, match=r"belongs to another model.*new_cache\(\)"):
        _calls(wrapped("llama"), cache)[number]()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("number", range(3))
def test_a_plain_cache(number: int, wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = DynamicCache(config=model.model.config)
    with pytest.raises(CacheError, match=r"expected an OffloadedCache.*got DynamicCache"):
        _calls(model, cache)[number]()


@torch.no_grad()
def test_a_cache_in_another_bare_model(wrapped: Wrap) -> None:
    cache = wrapped("qwen2").new_cache()
    with pytest.raises(CacheError, match="belongs to another model"):
        wrapped("llama").model(prompt(20), past_key_values=cache)
    # a model that is not wrapped never asks wavekv's attention
    with pytest.raises(CacheError, match="never reached wavekv's attention"):
        eager_model("llama")(prompt(20), past_key_values=cache)


@torch.no_grad()
def test_a_cache_whose_model_was_unwrapped(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    cache = model.new_cache()
    model.prefill(prompt(20), cache)
    model.unwrap()
    with pytest.raises(CacheError, match=r"attend with 'wavekv', it attends with 'sdpa'"):
        tiny_llama(prompt(5), past_key_values=cache)
    assert cache.get_seq_length() == 20
    for call in (*_calls(model, cache), *_calls(model, None)):
        with pytest.raises(ConfigError, match=r"expected a wrapped model.*wrap it again"):
            call()


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_keys_that_lose_their_tag(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OffloadedKV(make_model("llama", num_hidden_layers=num_layers))
    cache = model.new_cache()
    update = OffloadedCache.update
    monkeypatch.setattr(
        OffloadedCache, "update", lambda *args, **kw: [x * 1 for x in update(*args, **kw)]
    )
    with pytest.raises(CacheError, match=r"never reached wavekv's attention.*'llama'"):
        model(prompt(20), past_key_values=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_keys_that_are_attended_to_twice(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OffloadedKV(tiny_llama)
    given: list[Any] = []
    update = OffloadedCache.update

    def first_layer_only(*args: Any, **kwargs: Any) -> Any:
        given.append(update(*args, **kwargs)) if not given else None
        return given[0]

    monkeypatch.setattr(OffloadedCache, "update", first_layer_only)
    with pytest.raises(UnsupportedModelError, match="attends twice to keys that were cached once"):
        model(prompt(20))


def test_gradients(wrapped: Wrap) -> None:
    model = wrapped("llama")
    embedded = model.get_input_embeddings()(prompt(20)).requires_grad_()
    with pytest.raises(CacheError, match=r"does not carry gradients.*no_grad"):
        model(inputs_embeds=embedded)
    model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert embedded.grad is not None


@torch.no_grad()
def test_attention_weights(wrapped: Wrap) -> None:
    with pytest.raises(UnsupportedModelError, match=r"output_attentions .*never all computed"):
        wrapped("llama")(prompt(20), output_attentions=True)


@torch.no_grad()
def test_a_custom_mask(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    mask = torch.ones(20, 20).tril().bool()[None, None]
    with pytest.raises(UnsupportedModelError, match=r"padding \[B, T\] only, got a mask of shape"):
        model(prompt(20), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_prompt_that_the_cache_holds_already(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    model.prefill(prompt(40), cache)
    for length in (30, 40):
        with pytest.raises(CacheError, match=rf"longer than the 40 tokens.*got {length}; pass all"):
            model.generate(prompt(length), past_key_values=cache)
    with pytest.raises(CacheError, match=r"input_ids \[B, T\] with T >= 1"):
        model.prefill(prompt(1)[:, :0], cache)


def test_masks_of_the_wrong_length(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    model.prefill(prompt(40), cache)
    short = torch.ones(1, 10)
    for call in (
        lambda: model.prefill(prompt(10), cache, short),
        lambda: model(prompt(10), past_key_values=cache, attention_mask=short),
        lambda: model.generate(prompt(50), past_key_values=cache, attention_mask=short),
    ):
        with pytest.raises(CacheError, match=r"\(1, 50\) = \[B, 40 \+ 10\], got \(1, 10\)"):
            call()


def test_another_number_of_sequences(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    said = model.generate(prompt(40), past_key_values=cache, num_beams=2, max_new_tokens=4)
    whole = torch.cat([said, prompt(20)], 1)
    with pytest.raises(CacheError, match=r"expected 2 sequences, .*got 1; use a new cache"):
        model.generate(whole, past_key_values=cache)


def test_assisted_decoding_in_a_second_turn(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    said = model.generate(prompt(40), past_key_values=cache, max_new_tokens=4)
    with pytest.raises(CacheError, match="expected an empty cache for assisted decoding"):
        model.generate(said, past_key_values=cache, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("change", ["mask", "unmask", "forget"])
def test_a_mask_that_changes(change: str, wrapped: Wrap) -> None:
    model = wrapped("llama")
    ids, mask = left_padded(60, 40)
    cache = model.new_cache()
    model.prefill(ids, cache, mask)
    length = cache.get_seq_length()
    after: Tensor | None = torch.cat([mask, torch.ones(2, 10, dtype=torch.long)], 1)
    if change == "mask":
        after[0, 30] = 0
    elif change == "unmask":
        after[1, 5] = 1
    else:
        after = None
    for call in (
        lambda: model.prefill(prompt(10, batch=2), cache, after),
        lambda: model(prompt(10, batch=2), past_key_values=cache, attention_mask=after),
    ):
        with pytest.raises(CacheError, match="attention_mask"):
            call()
    assert cache.get_seq_length() == length


def test_crop_by_a_positive_number(wrapped: Wrap) -> None:
    cache = wrapped("llama").new_cache()
    with pytest.raises(CacheError, match="minus the number of tokens to remove, got 5"):
        cache.crop(5)


@pytest.mark.parametrize("amount", [-0.5, torch.tensor(-2.5), "-3", None])
def test_crop_by_what_is_no_whole_number(amount: object, wrapped: Wrap) -> None:
    cache = wrapped("llama").new_cache()
    with pytest.raises(CacheError, match="whole number of tokens"):
        cache.crop(amount)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_crop_where_a_layer_cannot_go_back(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type), prompt(100)
    cache = model.new_cache()
    cache.crop(-5)
    model.prefill(ids, cache)
    with pytest.raises(CacheError, match=r"layers that can forget tokens, got .*fork\(\) before"):
        cache.crop(-5)
    _check_answers(model, model_type, cache, ids)


# --- failures midway


def _check_answers(model: OffloadedKV, model_type: str, cache: OffloadedCache, ids: Tensor) -> None:
    """The cache holds exactly `ids`, in every layer: what follows is what eager says."""
    assert cache.get_seq_length() == ids.shape[1]
    for layer in cache.offloaded_layers:
        assert layer.get_seq_length() == ids.shape[1]
    whole = torch.cat([ids, prompt(20, seed=31, batch=ids.shape[0])], 1)
    options = {"max_new_tokens": NUM_NEW, "attention_mask": torch.ones_like(whole)}
    out = model.generate(whole, past_key_values=cache, **options)
    assert torch.equal(out, eager_model(model_type).generate(whole, **options))
    for arena in cache.runtime.arenas.values():
        arena.check_integrity()


def _fail_in(module: nn.Module, error: BaseException, *, after: int) -> Any:
    """Let the forward of `module` raise once it ran `after` times. Returns the hook's handle."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise error

    return module.register_forward_pre_hook(count)


FAILURES = [RuntimeError("from a layer"), KeyboardInterrupt()]
KINDS = ["llama", *HYBRIDS]


def _last_layer(model: OffloadedKV) -> nn.Module:
    """What runs after the last attention."""
    return model.model.model.layers[-1].post_attention_layernorm


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("finished", [0, 3])
@pytest.mark.parametrize("model_type", KINDS)
def test_a_prefill_that_fails_midway(
    model_type: str, finished: int, error: BaseException, wrapped: Wrap
) -> None:
    model, ids = wrapped(model_type, prefill_chunk=23), prompt(120)
    cache = model.new_cache()
    handle = _fail_in(_last_layer(model), error, after=finished)
    with pytest.raises(type(error)):
        model.prefill(ids, cache)
    handle.remove()
    assert not cache.runtime.is_prefilling
    if finished:
        _check_answers(model, model_type, cache, ids[:, : 23 * finished])
    else:
        assert cache.get_seq_length() == 0
        # any batch may come next
        model.prefill(prompt(50, batch=2), cache)
        _check_answers(model, model_type, cache, prompt(50, batch=2))


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("num_new", [1, 30])
@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_a_forward_that_fails_midway(
    model_type: str, num_new: int, error: BaseException, wrapped: Wrap
) -> None:
    model, ids = wrapped(model_type), prompt(90)
    cache = model.new_cache()
    model.prefill(ids, cache)
    handle = _fail_in(_last_layer(model), error, after=0)
    with pytest.raises(type(error)):
        model(prompt(num_new, seed=4), past_key_values=cache)
    handle.remove()
    _check_answers(model, model_type, cache, ids)


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("model_type", KINDS)
def test_a_generation_that_fails_midway(
    model_type: str, beams: int, error: BaseException, wrapped: Wrap
) -> None:
    model, ids = wrapped(model_type, prefill_chunk=50), prompt(90, batch=2)
    cache = model.new_cache()
    # two chunks of prefill, then some steps
    handle = _fail_in(_last_layer(model), error, after=2 + 25)
    with pytest.raises(type(error)):
        model.generate(ids, past_key_values=cache, num_beams=beams, max_new_tokens=40)
    handle.remove()
    _check_answers(model, model_type, cache, ids[:, :-1])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_memory_is_refused_before_anything_is_done(model_type: str, wrapped: Wrap) -> None:
    model = wrapped(model_type, cpu_budget="20kB")
    cache = model.new_cache()
    with pytest.raises(CapacityError, match=r"cpu_budget is .* of host RAM.*raise cpu_budget"):
        model.prefill(prompt(400), cache)
    assert cache.get_seq_length() == 0
    assert not any(arena.capacity for arena in cache.runtime.arenas.values())
    # what does fit is still welcome
    model.prefill(prompt(30), cache)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("allowed", [1, 2, 3])
@pytest.mark.parametrize("model_type", KINDS)
def test_memory_that_runs_out_midway(
    model_type: str, allowed: int, wrapped: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wavekv.kvstore import HostArena

    model, ids = wrapped(model_type, prefill_chunk=23), prompt(150)
    cache = model.new_cache()
    allocate, calls = HostArena.allocate, [0]

    def scarce(self: HostArena, num_pages: int) -> Tensor:
        calls[0] += 1
        if calls[0] > allowed:
            raise CapacityError("no more")
        return allocate(self, num_pages)

    monkeypatch.setattr(HostArena, "allocate", scarce)
    with pytest.raises(CapacityError, match="no more"):
        model.prefill(ids, cache)
    monkeypatch.undo()
    held = cache.get_seq_length()
    assert held < 150
    assert held % 23 == 0
    _check_answers(model, model_type, cache, ids[:, :held])


def test_a_budget_that_fills_while_decoding(wrapped: Wrap) -> None:
    model, ids = wrapped("llama"), prompt(100)
    cache = model.new_cache()
    model.prefill(ids, cache)
    for arena in cache.runtime.arenas.values():
        arena.allocate(arena.capacity - arena.num_pages)
    cache.runtime.budget.limit = cache.runtime.budget.used
    token = prompt(1, seed=3)

    def decode() -> None:
        nonlocal ids
        for _ in range(50):
            model(token, past_key_values=cache)
            ids = torch.cat([ids, token], 1)

    with torch.no_grad(), pytest.raises(CapacityError, match="raise cpu_budget"):
        decode()
    cache.runtime.budget.limit = MemoryBudget.of(0.5).limit
    _check_answers(model, "llama", cache, ids)


def test_pages_that_cannot_be_built(wrapped: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    from wavekv.offload import context

    model, ids = wrapped("llama", prefill_chunk=23), prompt(100)
    cache = model.new_cache()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot build")

    monkeypatch.setattr(context, "build_segments", broken)
    with pytest.raises(RuntimeError, match="cannot build"):
        model.prefill(ids, cache)
    monkeypatch.undo()
    held = cache.get_seq_length()
    assert held % 23 == 0 or held == 100
    _check_answers(model, "llama", cache, ids[:, :held])


# --- giving the model back


def test_unwrap_and_with_restore_the_attention(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    assert _attention_of(tiny_llama) == "wavekv"
    assert model.unwrap() is tiny_llama
    assert _attention_of(tiny_llama) == "sdpa"
    model.unwrap()
    with OffloadedKV(tiny_llama):
        assert _attention_of(tiny_llama) == "wavekv"
    assert _attention_of(tiny_llama) == "sdpa"
    with pytest.raises(AttributeError, match="nothing"), OffloadedKV(tiny_llama) as model:
        _ = model.nothing
    assert _attention_of(tiny_llama) == "sdpa"


def test_two_wrappers_of_one_model(tiny_llama: PreTrainedModel) -> None:
    first = OffloadedKV(tiny_llama, mode="exact")
    second = OffloadedKV(tiny_llama, budget=0.5)
    assert torch.equal(
        first.generate(prompt(20), max_new_tokens=3), second.generate(prompt(20), max_new_tokens=3)
    )
    second.unwrap()
    assert _attention_of(tiny_llama) == "sdpa"
    first.unwrap()
    assert _attention_of(tiny_llama) == "sdpa"


def test_attention_that_was_switched_meanwhile_stays(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    tiny_llama.set_attn_implementation("eager")
    model.unwrap()
    assert _attention_of(tiny_llama) == "eager"


def test_attributes_are_the_models(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    assert model.config is tiny_llama.config
    model.generation_config = type(tiny_llama.generation_config)(max_length=30)
    assert tiny_llama.generation_config.max_length == 30
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_padding_of_a_failed_chunk_is_forgotten(
    wrapped: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding that reaches into a chunk that fails must not be remembered as cached."""
    model = wrapped("llama", prefill_chunk=23)
    ids, mask = left_padded(60, 20)
    fresh = model.new_cache()
    expected = model.prefill(ids, fresh, mask)
    cache = model.new_cache()
    attend, calls = LayerContext.attend, []

    def fail_late(self: LayerContext, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > len(cache.offloaded_layers):
            raise RuntimeError("out of memory")
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(LayerContext, "attend", fail_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.prefill(ids, cache, mask)
    monkeypatch.undo()
    assert cache.get_seq_length() == 23
    torch.testing.assert_close(model.prefill(ids[:, 23:], cache, mask), expected)


def test_an_odd_head_dimension() -> None:
    keys = torch.zeros(1, 1, 4, 5)
    with pytest.raises(LayoutError, match="even head dimension, got 5"):
        LayerContext(OffloadRuntime(OffloadConfig()), keys, keys)
