"""Comparing a context with its manifest, wherever it is."""

from __future__ import annotations

from wavekv.remote.address import store_at
from wavekv.remote.checksum import checked
from wavekv.remote.failure import DamagedError, Problem
from wavekv.remote.published import expect_published, foreign, misfits
from wavekv.remote.transfer import JOBS, Progress, Transfer


def verify(place: str, *, jobs: int = JOBS, progress: Progress | None = None) -> list[Problem]:
    """What is wrong with the context at a URL or path, in order of names; all of it is read.

    Files that are no part of it are a problem too: a context is exactly what its manifest names.

    Raises:
        ContextFormatError: there is no manifest, or it is damaged itself.
        RemoteError: the store fails.
    """
    store = store_at(place)
    manifest = expect_published(store)
    sizes = store.sizes()
    problems = misfits(manifest, sizes)
    problems += [Problem(name, "file", "absent", "present") for name in foreign(manifest, sizes)]
    readable = sorted(set(manifest.files) - {problem.file for problem in problems})
    transfer = Transfer(jobs, sum(manifest.files[name].nbytes for name in readable), progress)

    def compare(name: str) -> Problem | None:
        entry = manifest.files[name]
        try:
            for chunk in checked(store.chunks(name, entry.nbytes), entry, name, place):
                transfer.done(len(chunk))
        except DamagedError as error:
            return error.problem
        return None

    problems += [it for it in transfer.run(compare, readable) if it is not None]
    return sorted(problems, key=lambda problem: problem.file)
