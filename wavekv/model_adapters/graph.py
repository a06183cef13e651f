"""Decode steps of a wrapped model as one CUDA graph: replayed while the context grows.

The model's own forward is captured once, with wavekv's attention inside; after that a step costs
the host one launch. What cannot be captured runs as before, and the log says why.
"""

from __future__ import annotations

import functools
import inspect
import logging
from contextlib import nullcontext
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wavekv.errors import CapacityError
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.early import EarlyQueries
from wavekv.model_adapters.fusion import fused_parts
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import engine_refusal
from wavekv.offload.streams import URGENT

_LOG = logging.getLogger("wavekv")
_EAGER_STEPS = 3
"""Steps that run as they are before one is captured: capturing pays where more follow."""
_STEPS_UNTIL_ROOM = 64
"""Steps after which device memory that was lacking is looked for again."""
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

    def __init__(self) -> None:
        self._length, self._changes, self._in_a_row = -1, -1, 0
        self._graph: _StepGraph | None = None
        self.refusal: str | None = None
        """Why steps of this cache are not captured; None if they are, or nobody has tried."""

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any | None:
        """The step that `inputs` of the model's forward ask for; None if it is not to be captured,
        and nothing has happened then.

        Raises:
            CapacityError: pages that are due do not fit cpu_budget; nothing has happened then.
        """
        cache: OffloadedCache = inputs["past_key_values"]
        if not self._is_step(model, cache, inputs):
            self._in_a_row = 0
            return None
        if self._graph is not None and not self._graph.is_of(model, cache):
            # somebody wanted the contexts back: others may come before steps do
            self.end(cache)
        if not self._follows(cache):
            return None
        with torch.inference_mode(False), torch.no_grad():
            if self._graph is None:
                self._graph = self._capture(model, cache)
            elif self._graph.engine.is_full:
                # the contexts take the pages that are due; the step after this one has room again
                cache.runtime.reclaim()
                self._graph = None
            out = None if self._graph is None else self._graph.run(inputs)
        self._length += 1
        return out

    def end(self, cache: OffloadedCache) -> None:
        """Give the contexts back, and the memory of the engine and its graph. The next steps run as
        they are."""
        cache.runtime.reclaim()
        self._graph, self._in_a_row = None, 0

    def _is_step(
        self, model: PreTrainedModel, cache: OffloadedCache, inputs: dict[str, Any]
    ) -> bool:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        positions = inputs.get("position_ids")
        unexpected = any(
            value is not None and value is not False
            for name, value in inputs.items()
            if name not in _EXPECTED
        )
        return (
            self.refusal is None
            and cache.config.capture
            and not cache.runtime.is_prefilling
            and not model.training
            and not unexpected
            and inputs.get("use_cache") is not False
            and inputs.get("return_dict") is not False
            and isinstance(ids, Tensor)
            and ids.is_cuda
            and ids.shape == (cache.batch_size, 1)
            and not torch.is_autocast_enabled("cuda")
            and (positions is None or positions.shape in ((1, 1), ids.shape))
            and (not cache.has_padding if mask is None else mask.ndim == 2)
        )

    def _follows(self, cache: OffloadedCache) -> bool:
        """Whether this step comes after enough others, with nothing in between."""
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

    def _capture(self, model: PreTrainedModel, cache: OffloadedCache) -> _StepGraph | None:
        cache.settle()
        self.refusal = _refusal(model, cache)
        if self.refusal is not None:
            _LOG.info("decode steps run without a CUDA graph: %s", self.refusal)
            return None
        try:
            return _step_graph(model, cache)
        except CapacityError as error:
            # there may be room later
            self._in_a_row = -_STEPS_UNTIL_ROOM
            _LOG.warning("decode steps run without a CUDA graph for now: %s", error)
        except Exception as error:
            self.refusal = repr(error)
            _LOG.warning("decode steps run without a CUDA graph: %s", self.refusal)
        cache.runtime.engine = None
        return None


def _refusal(model: PreTrainedModel, cache: OffloadedCache) -> str | None:
    """Why steps of this model on this cache cannot be captured; None if that is not foreseen."""
    contexts = (layer.context for layer in cache.offloaded_layers)
    return model_refusal(model, cache) or engine_refusal(list(contexts))


def model_refusal(model: PreTrainedModel, cache: OffloadedCache) -> str | None:
    """Why steps of this model cannot be captured, whatever the cache holds; None if they may be."""
    others = [layer for layer in cache.layers if layer not in cache.offloaded_layers]
    if others:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in others}))
        return f"the cache also has layers that grow ({kinds})"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "the model counts positions itself"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(model.config, name, False):
            return f"the model is configured for {name}"
    return None


def _step_graph(model: PreTrainedModel, cache: OffloadedCache) -> _StepGraph:
    """A graph with compiled parts, if they are wanted and the compiler makes them."""
    if cache.config.compile:
        try:
            return _StepGraph(model, cache, with_fused_parts=True)
        except CapacityError:
            raise
        except Exception as error:
            cache.runtime.engine = None
            _LOG.warning("parts of the model are not compiled: %r", error)
    return _StepGraph(model, cache, with_fused_parts=False)


class _StepGraph:
    """One engine, and the graph of the model's forward on it."""

    def __init__(
        self, model: PreTrainedModel, cache: OffloadedCache, *, with_fused_parts: bool
    ) -> None:
        from wavekv.kernels import cuda

        self._model = model
        contexts = [layer.context for layer in cache.offloaded_layers]
        self.engine = DecodeEngine([context for context in contexts if context is not None], cuda)
        shape, device = self.engine.shape, self.engine.device
        self._ids = torch.zeros(shape.batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(shape.batch, 1, dtype=torch.int64, device=device)
        with fused_parts(model) if with_fused_parts else nullcontext():
            self._capture(cache)

    def is_of(self, model: PreTrainedModel, cache: OffloadedCache) -> bool:
        """Whether this still stands for steps of `model` on `cache`."""
        return self._model is model and cache.runtime.engine is self.engine

    def run(self, inputs: dict[str, Any]) -> Any:
        """One step. If it fails, the cache holds what it held before."""
        engine, cache = self.engine, inputs["past_key_values"]
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        engine.before_step()
        self._ids.copy_(inputs["input_ids"])
        if positions is None:
            self._positions.fill_(engine.num_tokens)
        else:
            self._positions.copy_(positions)
        if mask is None:
            engine.new_valid.fill_(True)
        else:
            engine.new_valid.copy_(mask[:, -1])
        length = engine.num_tokens
        try:
            self._graph.replay()
            engine.after_step()
            return self._kind(logits=self._logits.clone(), past_key_values=cache)
        except BaseException:
            # the device has counted the step, or not: only the host's count is sure
            engine.num_tokens = length
            cache.runtime.reclaim()
            raise

    def _capture(self, cache: OffloadedCache) -> None:
        engine = self.engine
        inputs: dict[str, Any] = {"input_ids": self._ids, "position_ids": self._positions}
        inputs |= {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            inputs["logits_to_keep"] = 1
        engine.before_step()
        self._positions.fill_(engine.num_tokens)
        cache.runtime.engine = engine
        side = torch.cuda.Stream(engine.device, URGENT)
        with engine.stepping():
            side.wait_stream(torch.cuda.current_stream(engine.device))
            with torch.cuda.stream(side), EarlyQueries(self._model, engine) as early:
                for _ in range(_WARM_UPS):
                    self._forward(inputs)
                early.check()
            torch.cuda.current_stream(engine.device).wait_stream(side)
            engine.capture_growth()
            assert engine.graph is not None
            self._graph = engine.graph
            with early, self._graph.capturing(side):
                self._logits = self._forward(inputs)
        engine.reset()

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        out = self._model(**inputs)
        self._kind = type(out)
        self.engine.advance()
        logits: Tensor = out.logits
        return logits


def captured_steps(cache: OffloadedCache) -> CapturedSteps:
    """Of this cache, made when first asked for."""
    if cache.steps is None:
        cache.steps = CapturedSteps()
    return cache.steps


def capturing_view(model: PreTrainedModel, cache: OffloadedCache) -> PreTrainedModel:
    """A second object for the same model whose forward takes captured steps where it can. Methods
    of the model that call its forward, `generate` above all, then do so too."""
    kind = type(model)
    # weak: a class lives until the next garbage collection
    wanted = ref(cache)

    @functools.wraps(kind.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        accepted = inspect.signature(kind.forward).parameters
        names = list(accepted)[1:]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        given = inputs.get("past_key_values")
        if isinstance(given, OffloadedCache) and given is wanted():
            out = captured_steps(given).run(model, inputs)
            if out is not None:
                return out
        return kind.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    view: PreTrainedModel = object.__new__(type(kind.__name__, (kind,), body))
    object.__setattr__(view, "__dict__", model.__dict__)
    return view
