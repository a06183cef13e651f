"""Decode steps of a wrapped model as one CUDA graph: replayed while the context grows.

The model's own forward is captured once, with wavekv's attention inside; after that a step costs
the host one launch. What cannot be captured runs as before, and the log says why.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.early import EarlyQueries
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import engine_refusal

_LOG = logging.getLogger("wavekv")
_EAGER_STEPS = 3
"""Steps that run as they are before one is captured: capturing pays where more follow."""
_WARM_UPS = 2
_EXPECTED = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "past_key_values",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}


class CapturedSteps:
    """The decode steps of one cache."""

    def __init__(self, cache: OffloadedCache) -> None:
        self._cache = cache
        self._length, self._changes, self._in_a_row = -1, -1, 0
        self._graph: _StepGraph | None = None
        self.refusal: str | None = None
        """Why steps of this cache are not captured; None if they are, or nobody has tried."""

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any | None:
        """The step that `inputs` of the model's forward ask for; None if it is not to be captured,
        and nothing has happened then."""
        cache = self._cache
        if not self._is_step(model, inputs):
            self._in_a_row = 0
            return None
        if not self._follows():
            return None
        graph = self._graph
        if graph is not None and cache.runtime.engine is graph.engine and graph.engine.is_full:
            # the contexts take the pages that are due; the step after this one has room again
            cache.runtime.reclaim()
            self._graph = graph = None
        elif graph is None or cache.runtime.engine is not graph.engine:
            self._graph = graph = self._capture(model)
        out = None if graph is None else graph.run(inputs)
        self._length += 1
        return out

    def _is_step(self, model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        unexpected = any(
            value is not None and value is not False
            for name, value in inputs.items()
            if name not in _EXPECTED
        )
        return (
            self.refusal is None
            and self._cache.config.capture
            and not self._cache.runtime.is_prefilling
            and not model.training
            and not unexpected
            and inputs.get("use_cache") is not False
            and inputs.get("return_dict") is not False
            and isinstance(ids, Tensor)
            and ids.is_cuda
            and ids.shape == (self._cache.batch_size, 1)
            and (mask is None or mask.ndim == 2)
        )

    def _follows(self) -> bool:
        """Whether this step comes after enough others, with nothing in between."""
        cache = self._cache
        length, changes = cache.get_seq_length(), cache.runtime.num_changes
        if (length, changes) != (self._length, self._changes):
            self._in_a_row = 0
        self._length, self._changes = length, changes
        if self._in_a_row < _EAGER_STEPS:
            self._in_a_row += 1
            # the caller takes this step
            self._length += 1
            return False
        return True

    def _capture(self, model: PreTrainedModel) -> _StepGraph | None:
        try:
            self._check(model)
            return _StepGraph(model, self._cache)
        except Exception as error:
            self._cache.runtime.engine = None
            self.refusal = str(error) if isinstance(error, _Refused) else repr(error)
            level = logging.INFO if isinstance(error, _Refused) else logging.WARNING
            _LOG.log(level, "decode steps run without a CUDA graph: %s", self.refusal)
            return None

    def _check(self, model: PreTrainedModel) -> None:
        cache = self._cache
        others = [layer for layer in cache.layers if layer not in cache.offloaded_layers]
        if others:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in others}))
            raise _Refused(f"the cache also has layers that grow ({kinds})")
        cache.settle()
        reason = engine_refusal([layer.context for layer in cache.offloaded_layers])
        if reason is not None:
            raise _Refused(reason)


class _Refused(Exception):
    """Steps of this cache cannot be captured, for a reason that was foreseen."""


class _StepGraph:
    """One engine, and the graph of the model's forward on it."""

    def __init__(self, model: PreTrainedModel, cache: OffloadedCache) -> None:
        from wavekv.kernels import cuda

        self._model, self._cache = model, cache
        contexts = [layer.context for layer in cache.offloaded_layers]
        self.engine = DecodeEngine([context for context in contexts if context is not None], cuda)
        shape, device = self.engine.shape, self.engine.device
        self._ids = torch.zeros(shape.batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(shape.batch, 1, dtype=torch.int64, device=device)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._inputs: dict[str, Any] = {"input_ids": self._ids, "past_key_values": cache}
        self._inputs |= {"use_cache": True, "return_dict": True}
        if self._takes_positions:
            self._inputs["position_ids"] = self._positions
        if "logits_to_keep" in accepted:
            self._inputs["logits_to_keep"] = 1
        self._capture()

    def run(self, inputs: dict[str, Any]) -> Any:
        """One step."""
        engine = self.engine
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        engine.before_step()
        self._ids.copy_(inputs["input_ids"])
        if positions is None:
            self._positions.fill_(engine.num_tokens)
        else:
            self._positions.copy_(positions)
        if mask is not None:
            engine.new_valid.copy_(mask[:, -1])
        self._graph.replay()
        engine.after_step()
        return self._kind(logits=self._logits.clone(), past_key_values=self._cache)

    def _capture(self) -> None:
        engine, runtime = self.engine, self._cache.runtime
        engine.before_step()
        self._positions.fill_(engine.num_tokens)
        runtime.engine = engine
        side = torch.cuda.Stream(engine.device)
        with engine.stepping(), torch.inference_mode(False), torch.no_grad():
            side.wait_stream(torch.cuda.current_stream(engine.device))
            with torch.cuda.stream(side), EarlyQueries(self._model, engine) as early:
                for _ in range(_WARM_UPS):
                    self._forward()
                early.check()
            torch.cuda.current_stream(engine.device).wait_stream(side)
            engine.capture_growth()
            self._graph = torch.cuda.CUDAGraph()
            capture = torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local")
            with early, capture:
                self._logits = self._forward()
        engine.reset()

    def _forward(self) -> Tensor:
        out = self._model(**self._inputs)
        self._kind = type(out)
        self.engine.advance()
        logits: Tensor = out.logits
        return logits


def captured_steps(cache: OffloadedCache) -> CapturedSteps:
    """Of this cache, made when first asked for."""
    if cache.steps is None:
        cache.steps = CapturedSteps(cache)
    return cache.steps


def capturing_view(model: PreTrainedModel, cache: OffloadedCache) -> PreTrainedModel:
    """A second object for the same model whose forward takes captured steps where it can. Methods
    of the model that call its forward, `generate` above all, then do so too."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        accepted = inspect.signature(kind.forward).parameters
        names = list(accepted)[1:]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if inputs.get("past_key_values") is cache:
            out = captured_steps(cache).run(model, inputs)
            if out is not None:
                return out
        return kind.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    view: PreTrainedModel = object.__new__(type(kind.__name__, (kind,), body))
    object.__setattr__(view, "__dict__", model.__dict__)
    return view
