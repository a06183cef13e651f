"""A writer that dies between any two requests: what readers see then, and what the next writer
makes of what it left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from context_files import at_place, before_each, tree

from wavekv.remote.address import store_at
from wavekv.remote.published import published
from wavekv.remote.push import push
from wavekv.remote.remove import remove
from wavekv.remote.verify import verify

MOST_REQUESTS = 60


class Crash(BaseException):
    """The end of a process, as far as a test can have it."""


def crashed(monkeypatch: pytest.MonkeyPatch, after: int, do: Callable[[], object]) -> bool:
    """Whether `do` needed more than so many writes and deletions, and was ended before the next."""
    left = iter(range(after))

    def count(name: str) -> None:
        if next(left, None) is None:
            raise Crash

    with monkeypatch.context() as patch:
        before_each(patch, "write", count)
        before_each(patch, "delete", count)
        try:
            do()
        except Crash:
            return True
    return False


def expect_whole_or_none(url: str) -> None:
    """Readers see a context with all of its files, or no context."""
    if published(store_at(url)) is not None:
        assert verify(url) == []


@pytest.mark.parametrize("then", ["the same again", "the old one back", "remove"])
def test_a_replacing_push_that_dies_anywhere(memory, contexts, monkeypatch, then) -> None:
    for after in range(MOST_REQUESTS):
        url = f"{memory}/{then.replace(' ', '-')}-{after}"
        push(contexts(1), url)
        died = crashed(monkeypatch, after, lambda url=url: push(contexts(2), url, replace=True))
        expect_whole_or_none(url)
        if not died:
            assert after > 10
            return
        if then == "remove":
            if store_at(url).sizes():
                remove(url)
            assert store_at(url).sizes() == {}
        else:
            path = contexts(2 if then == "the same again" else 1)
            push(path, url, replace=True)
            assert at_place(store_at(url)) == tree(path)
    pytest.fail("it never came to its end")


def test_a_removal_that_dies_anywhere(memory, contexts, monkeypatch) -> None:
    for after in range(MOST_REQUESTS):
        url = f"{memory}/removed-{after}"
        push(contexts(1), url)
        if not crashed(monkeypatch, after, lambda url=url: remove(url)):
            assert after > 5
            return
        expect_whole_or_none(url)
        remove(url)
        assert store_at(url).sizes() == {}
    pytest.fail("it never came to its end")
