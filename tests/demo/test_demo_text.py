"""The demo's text: real passages, planted facts, contexts of an exact length."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.demo import corpus, facts
from wavekv.demo.context import TOKENS_PER_FACT, plant
from wavekv.model_adapters.bundled import load_demo_tokenizer


@pytest.fixture(scope="module")
def encode():
    tokenizer = load_demo_tokenizer()
    return lambda strings: [e.ids for e in tokenizer.encode_batch(strings)]


def test_splits_are_real_text_and_do_not_overlap() -> None:
    train, heldout = (corpus.passages(split) for split in ("train", "heldout"))
    assert sum(map(len, train)) > 500_000
    assert sum(map(len, heldout)) > 150_000
    assert not set(train) & set(heldout)


def test_passages_come_in_the_same_order_every_time() -> None:
    assert corpus.passages("heldout") == corpus.passages("heldout")


@given(st.integers(0, 2**32), st.integers(1, 64))
def test_facts_have_their_own_names_and_say_their_values(seed: int, count: int) -> None:
    drawn = facts.draw_facts(count, random.Random(seed))
    assert len({fact.subject.split()[0] for fact in drawn}) == count
    for fact in drawn:
        assert len(fact.value) == 5
        assert fact.value.isdigit()
        assert fact.value in fact.statement
        assert fact.subject in fact.statement
        assert fact.subject in fact.question
        assert fact.attribute in fact.question
        assert fact.value not in fact.question
    noise = facts.draw_distractors(5, drawn, random.Random(seed))
    for sentence in noise:
        assert not any(fact.subject.split()[0] in sentence for fact in drawn)


def test_too_many_facts_are_an_error() -> None:
    with pytest.raises(ValueError, match="at most 1024 facts, got 1025"):
        facts.draw_facts(1025, random.Random(0))


@given(st.text(max_size=300))
def test_sentences_put_together_are_the_text(text: str) -> None:
    rejoined = "".join(facts.sentences(text))
    assert rejoined.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


@given(st.lists(st.integers(0, 99), min_size=1), st.lists(st.integers(100, 199)), st.integers())
def test_weaving_keeps_the_order_of_both(text, planted, seed) -> None:
    woven = facts.weave(text, planted, random.Random(seed))
    assert [x for x in woven if x < 100] == text
    assert [x for x in woven if x >= 100] == planted
    assert woven[0] == text[0]


@pytest.mark.parametrize("length", [512, 1000, 4096])
def test_a_context_has_the_length_asked_for_and_its_facts_where_it_says(encode, length) -> None:
    context = plant(length, encode, seed=3)
    assert len(context.token_ids) == length
    assert len(context.facts) == length // TOKENS_PER_FACT
    for fact, (start, stop) in zip(context.facts, context.fact_spans, strict=True):
        assert context.token_ids[start:stop] == encode([" " + fact.statement])[0]


def test_the_same_seed_gives_the_same_context(encode) -> None:
    assert plant(1024, encode, seed=5) == plant(1024, encode, seed=5)
    assert plant(1024, encode, seed=5) != plant(1024, encode, seed=6)


def test_own_text_is_used_and_may_be_shorter_than_asked(encode) -> None:
    context = plant(2048, encode, seed=0, text="One sentence. Another one.")
    assert len(context.token_ids) < 200
    assert len(context.facts) == 4


def test_a_context_without_room_for_a_fact_is_an_error(encode) -> None:
    with pytest.raises(ValueError, match="at least 512 tokens, got 100"):
        plant(100, encode, seed=0)


def test_every_name_is_one_token(encode) -> None:
    assert {len(ids) for ids in encode([f" {name}" for name in facts.NAMES])} == {1}
