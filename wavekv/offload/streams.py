"""Streams beside the current one, that work also while a CUDA graph is captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

FOREMOST, URGENT, ORDINARY = -2, -1, 0
"""Priorities of streams: a kernel of an urgent one starts before the blocks of an ordinary one that
wait for a place, however many they are, and one of the foremost before both."""


class SideStreams:
    """Streams of one device with these priorities; without CUDA everything runs where it is."""

    def __init__(self, priorities: Sequence[int], device: torch.device) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device, p) for p in priorities] if is_cuda else []
        self._running: set[int] = set()

    @contextmanager
    def beside(self, number: int) -> Iterator[None]:
        """Run the body on stream `number`, from where the current stream is."""
        if not self._streams:
            yield
            return
        stream = self._streams[number]
        self._running.add(number)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for what the others were given since they were joined last.
        One that is not part of a capture must not be waited for in it."""
        for number in sorted(self._running):
            torch.cuda.current_stream(self._device).wait_stream(self._streams[number])
        self._running.clear()

    def mark(self) -> torch.cuda.Event | None:
        """An event at the end of the current stream; None without CUDA."""
        if not self._streams:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def await_mark(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream wait for a mark."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
