"""A decoder of the Llama-3.1-8B shape with random weights, and how its decode steps are timed.

`CapturedForward` makes one CUDA graph of a step, `time_steps` times steps on the device. On a CPU
the same calls run eagerly, so that every path can be tried on a tiny shape.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from wavekv.kvstore.budget import available_memory
from wavekv.offload.streams import URGENT

SHAPES = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "qwen-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}
ROPE_THETA = 5e5
MAX_TOKENS = 1 << 21
INIT_STD = 0.02


def decoder_config(shape: str = "llama-8b", layers: int | None = None) -> LlamaConfig:
    """The configuration of one of `SHAPES`, with another number of layers if given."""
    fields = dict(SHAPES[shape])
    if layers is not None:
        fields["num_hidden_layers"] = layers
    return LlamaConfig(
        **fields,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )


def random_decoder(
    config: LlamaConfig,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A model with random weights, made on the device; in eval mode, without gradients."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of weights that a decode step reads: all but the embedding, of which it reads rows."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = (weight for weight in model.parameters() if tied or weight is not embedding)
    return sum(weight.nbytes for weight in weights)


def layer_kv_bytes(model: LlamaForCausalLM, tokens: int, batch: int = 1) -> int:
    """Bytes of the keys and values of so many tokens in one layer."""
    config = model.config
    return 2 * batch * config.num_key_value_heads * tokens * config.head_dim * model.dtype.itemsize


def step_bytes(model: LlamaForCausalLM, tokens: int, batch: int = 1) -> int:
    """Bytes that a step of full attention must read: weights, and keys and values of all layers."""
    layers = model.config.num_hidden_layers
    return weight_bytes(model) + layers * layer_kv_bytes(model, tokens, batch)


class CapturedForward:
    """A forward without arguments, captured as one CUDA graph; on a CPU every replay calls it.

    It runs `warmup` times on a side stream first. What it reads and writes must keep its place in
    memory; `output`, what the forward returned, is overwritten by every replay of a graph.
    """

    def __init__(self, forward: Callable[[], Tensor], *, warmup: int = 3) -> None:
        self.forward = torch.no_grad()(forward)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output = self._warmed_up(max(1, warmup))
        if self.output.is_cuda:
            del self.output  # before the capture, which must not free what others allocated
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(priority=URGENT)):
                self.output = self.forward()

    def _warmed_up(self, warmup: int) -> Tensor:
        if not torch.cuda.is_available():
            return self.forward()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                output = self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def replay(self) -> Tensor:
        """Run the forward once more; its output."""
        if self.graph is None:
            self.output = self.forward()
        else:
            self.graph.replay()
        return self.output


def time_steps(
    step: Callable[[], object],
    *,
    warmup: int,
    repeats: int,
    device: torch.device | str | None = None,
) -> list[float]:
    """Milliseconds of each step: between CUDA events around it, or by the clock on a CPU.

    Steps are not waited for: where a step only enqueues work, that is the time of the device, with
    the launch of the next step hidden behind it. The device is the CUDA one unless given.
    """
    kind = _default_device() if device is None else torch.device(device).type
    for _ in range(warmup):
        step()
    if kind != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for began, ended in events:
        began.record()
        step()
        ended.record()
    torch.cuda.synchronize()
    return [began.elapsed_time(ended) for began, ended in events]


def copy_bandwidth(device: torch.device | str, num_bytes: int = 1 << 31) -> float:
    """Bytes a second of a large copy inside the device, read and written bytes both counted."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_steps(lambda: target.copy_(source), warmup=3, repeats=20, device=device)
    return 2 * num_bytes / (1e-3 * median(times))


def free_bytes(device: torch.device | str) -> int:
    """Free memory of the device, unused blocks of the allocator included."""
    if torch.device(device).type != "cuda":
        return available_memory()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def release_memory() -> None:
    """Give unused device memory and pinned memory back, for the next system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_host_cache is not None:
            empty_host_cache()


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
