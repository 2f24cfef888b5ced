"""A GPU that computes nothing: what runs on it is checked for devices, dtypes and shapes, and counted.

    with fake_gpu() as gpu:
        policy = ...                # CUDA is available: the product's own code puts its tensors there
        gpu.reset()
        policy.train_step(batch, loss)
        gpu.num_launches, gpu.copies, gpu.waits

Tensors of the CPU are real. Those of the GPU are torch's FakeTensors: an operation that mixes the two raises. Numbers
read from the GPU are made up (0, 0.5, True), and so are sizes that depend on numbers. An operation counts as one
launch, where a real one may take several; `_foreach_` operations take tensors by the thirty, as the kernels do that
have the most to read. Gradients come from an engine in Python, since torch's asks for a CUDA runtime, and Triton's
kernels do nothing. A CUDA graph is captured by calling its function, in which no copy and no wait is allowed, and its
replay is one launch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
_TENSORS_PER_FOREACH = 30
_WITHOUT_KERNEL = """
_conj _reshape_alias _unsafe_view alias as_strided chunk detach detach_ diagonal empty empty_like empty_strided expand
is_pinned is_same_size lift_fresh narrow new_empty new_empty_strided permute record_stream select set_ slice split
split_with_sizes sym_numel sym_size sym_storage_offset sym_stride squeeze t transpose unbind unfold unsqueeze view
"""  # views, and memory that nothing is written into
_ROOT = str(Path(__file__).parents[1])
_PACKAGES = tuple(f"/site-packages/{name}/" for name in ("nemo_automodel", "transformers", "megatron", "torch/optim"))


class _Fakes(FakeTensorMode):
    @property
    def avoid_device_init(self) -> bool:
        return True  # whatever torch.cuda.is_available() is made to say


class FakeGpu(TorchDispatchMode):
    """Counts what runs on it, by operation (`launches`) or by the line of code that asked for it (all others)."""

    def __init__(self) -> None:
        super().__init__()
        self.is_available = True
        self.fakes = _Fakes(allow_non_fake_inputs=True)
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self.place = ""  # the node of a backward pass that is computed now
        self.num_backward_passes = 0
        self.is_capturing = False
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.places: Counter[str] = Counter()  # of launches
        self.copies: Counter[str] = Counter()  # from the host, whether it waits for them or not
        self.waits: Counter[str] = Counter()  # until all that was launched before has ended

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if kwargs.pop("pin_memory", False) or name == "_pin_memory":
            return self._pin(func, name, args, kwargs)
        values = (*args, *kwargs.values())
        inputs = list(_tensors_in(values))
        if not any(map(_is_gpu, values)) and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            return self._is_pinned(inputs[0]) if name == "is_pinned" else func(*args, **kwargs)
        if _is_composed(func):
            with self:  # in inference mode it comes whole
                return func.decompose(*args, **kwargs)
        if (answer := self._read(name, args, kwargs)) is not None:
            return answer
        real = [tensor for tensor in inputs if not isinstance(tensor, FakeTensor)]
        self._count(name, args, kwargs, real)
        if real:
            args, kwargs = tree_map(self._as_fake, (args, kwargs))
        with self.fakes:
            out = func(*args, **kwargs)
        for tensor in _tensors_in((out,)):
            tensor.constant = None  # type: ignore[attr-defined]  # a number that a GPU would not tell
        return out

    def backward(self, roots: Any, gradients: Any = None) -> None:
        """A backward pass from one tensor, by calling its nodes in Python."""
        (root,) = roots if isinstance(roots, (list, tuple)) else (roots,)
        (gradient,) = gradients if isinstance(gradients, (list, tuple)) else (gradients,)
        self.num_backward_passes += 1
        waiting = _numbers_of_users(root.grad_fn)
        found: dict[Any, list[Tensor | None]] = {root.grad_fn: [None] * len(root.grad_fn._input_metadata)}
        found[root.grad_fn][root.output_nr] = torch.ones_like(root) if gradient is None else gradient
        ready = [root.grad_fn]
        with torch.no_grad():
            while ready:
                node = ready.pop()
                self.place = type(node).__name__
                given = found.pop(node, [None])
                outs = self._through(node, given) if any(one is not None for one in given) else []
                for (user, index), out in zip(
                    node.next_functions, outs or [None] * len(node.next_functions), strict=True
                ):
                    if user is None:
                        continue
                    if out is not None:
                        sums = found.setdefault(user, [None] * len(user._input_metadata))
                        out = _as_expected(out, user._input_metadata[index])
                        sums[index] = out if sums[index] is None else sums[index] + out
                    waiting[user] -= 1
                    if waiting[user] == 0:
                        ready.append(user)
        self.place = ""

    def _through(self, node: Any, given: list[Tensor | None]) -> Sequence[Tensor | None]:
        if hasattr(node, "variable"):
            _accumulate(node.variable, given[0])
            return []
        if not hasattr(node, "_forward_cls"):  # of torch itself
            outs = node(*given)
            return outs if isinstance(outs, tuple) else (outs,)
        whole = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=GPU) if one is None else one
            for one, meta in zip(given, node._input_metadata, strict=True)
        ]
        outs = node.apply(*whole)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return [out for out, is_tensor in zip(outs, node.takes_tensor, strict=True) if is_tensor]

    def _pin(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        pinned = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
        storage = pinned.untyped_storage()
        self._pinned[storage._cdata] = storage  # kept, so that no other gets its number
        return pinned

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _read(self, name: str, args: Any, kwargs: Any) -> Any:
        """What the host gets to know, made up, and the wait for it; None where an operation tells nothing."""
        first = args[0] if args else None
        if name in ("_local_scalar_dense", "item"):
            self.wait()
            return True if first.dtype == torch.bool else 0.5 if first.dtype.is_floating_point else 0
        if name in ("equal", "is_nonzero"):
            self.wait()
            return True
        if name == "_to_copy" and torch.device(kwargs.get("device") or first.device).type == "cpu":
            self.wait()
            return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if name == "copy_" and not isinstance(first, FakeTensor):
            self.wait()
            return first.zero_()
        if name == "nonzero":
            self.wait()
            return self._empty((first.numel(), first.dim()), torch.int64)
        if name == "index" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            self.wait()
            (mask,) = args[1]
            return self._empty((mask.numel(), *first.shape[mask.dim() :]), first.dtype)
        assert name != "repeat_interleave" or "output_size" in kwargs, "its size is read from the GPU"
        return None

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self.fakes:
            return torch.empty(shape, dtype=dtype, device=GPU)

    def _count(self, name: str, args: Any, kwargs: Any, real: Sequence[Tensor]) -> None:
        """`real`: the inputs that lie on the CPU. Numbers may, and torch itself copies indices."""
        is_move = name in ("_to_copy", "copy_")
        moved = [tensor for tensor in real if tensor.dim() > 0 or is_move]
        assert not moved or is_move or name in ("index", "index_put", "index_put_"), (
            f"{name} has tensors of the CPU among those of the GPU, at {_line()}"
        )
        for tensor in moved:
            assert not self.is_capturing, f"a copy from the host in a CUDA graph, at {_line()}"
            self.copies[_line()] += 1
            may_run_on = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if not (may_run_on and self._is_pinned(tensor)):
                self.wait()
        if not (is_move and moved) and name not in _WITHOUT_KERNEL.split():
            number = -(-len(args[0]) // _TENSORS_PER_FOREACH) if name.startswith("_foreach_") else 1
            self.launches[name] += number
            self.places[self.place or _line()] += number

    def _as_fake(self, value: Any) -> Any:
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.dim() > 0
        return self.fakes.from_tensor(value) if is_real else value

    def wait(self) -> None:
        assert not self.is_capturing, f"the host waits in a CUDA graph, at {_line()}"
        self.waits[_line()] += 1

    @contextmanager
    def capture(self, graph: _Graph, **_: Any) -> Iterator[None]:
        """As torch.cuda.graph."""
        before, self.is_capturing = (self.launches.copy(), self.places.copy()), True
        try:
            yield
        finally:
            self.is_capturing = False
        graph.num_kernels = self.num_launches - before[0].total()
        self.launches, self.places = before

    def launch_graph(self) -> None:
        assert not self.is_capturing
        self.launches["cuda graph"] += 1
        self.places[_line()] += 1

    def launch_triton(self, *args: Any, **kwargs: Any) -> None:
        """A Triton kernel, of which the arguments alone are looked at."""
        for tensor in _tensors_in((*args, *kwargs.values())):
            assert isinstance(tensor, FakeTensor), f"a Triton kernel has a tensor of the CPU, at {_line()}"
        self.launches["triton"] += 1
        self.places[self.place or _line()] += 1


@cache
def _is_composed(func: Any) -> bool:
    """Whether torch has other operations for it rather than a kernel of a GPU."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CUDA")


def _is_gpu(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _numbers_of_users(root: Any) -> Counter[Any]:
    """How many nodes hand a gradient to each."""
    number: Counter[Any] = Counter()
    stack, seen = [root], {root}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            number[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return number


def _as_expected(gradient: Tensor, meta: Any) -> Tensor:
    """In the dtype and shape that the next node has, as torch's engine brings it there."""
    assert gradient.device.type == "cuda", gradient.device
    return gradient.to(meta.dtype).sum_to_size(tuple(meta.shape))


def _accumulate(leaf: Tensor, gradient: Tensor | None) -> None:
    """As torch does: a first gradient is taken over where its layout allows, others are added to it."""
    assert gradient is not None
    if leaf.grad is None:
        leaf.grad = gradient.detach() if gradient.is_contiguous() else gradient.contiguous()
    else:
        leaf.grad += gradient
    for hook in list((leaf._post_accumulate_grad_hooks or {}).values()):
        hook(leaf)


def _line() -> str:
    """The innermost line of code that is not torch's or this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(package in path for package in _PACKAGES):
            return f"{path.rpartition('/site-packages/')[2]}:{frame.f_lineno}"
        if path.startswith(_ROOT) and "/site-packages/" not in path and path != __file__:
            return f"{path.removeprefix(_ROOT)[1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class _NoNumbers:
    """A GPU's generator of random numbers."""

    def __init__(self) -> None:
        self.device = GPU

    def manual_seed(self, seed: int) -> _NoNumbers:
        return self


class _Graph:
    """A captured function, which computes nothing when it is replayed either."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self.num_kernels = gpu, 0

    def replay(self) -> None:
        assert self.num_kernels, "nothing was captured"
        self._gpu.launch_graph()


class _Stream:
    def wait_stream(self, stream: _Stream) -> None: ...


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """CUDA is available within, with one GPU."""
    gpu = FakeGpu()
    generator, rand, move = torch.Generator, torch.rand, nn.Module.to
    apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def make_generator(device: Any = "cpu") -> Any:
        return generator() if torch.device(device).type == "cpu" else _NoNumbers()

    def draw(*shape: Any, generator: Any = None, **more: Any) -> Tensor:
        assert not isinstance(generator, _NoNumbers) or torch.device(more["device"]).type == "cuda"
        return rand(*shape, generator=None if isinstance(generator, _NoNumbers) else generator, **more)

    def move_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        goes = bool(args) and isinstance(args[0], (str, torch.device)) and torch.device(args[0]).type == "cuda"
        return _moved(module) if goes else move(module, *args, **kwargs)

    def apply_noting(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """torch's engine leaves out the gradients of what is no tensor, and ours has to know which those are."""
        out = apply(cls, *args, **kwargs)
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, Tensor) and hasattr(one.grad_fn, "_forward_cls"):
                one.grad_fn.takes_tensor = [isinstance(value, Tensor) for value in args]
        return out

    with pytest.MonkeyPatch.context() as patch, gpu:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(fake_tensor, "init_gpu_context", lambda _: None)  # before torch 2.13
        patch.setattr(torch.cuda, "is_available", lambda: gpu.is_available)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # likewise, of the machine's driver
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "current_device", lambda: GPU)
        patch.setattr(torch.cuda, "synchronize", lambda *_: gpu.wait())
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=80 << 30))
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(gpu))
        patch.setattr(torch.cuda, "graph", gpu.capture)
        patch.setattr(torch, "Generator", make_generator)
        patch.setattr(torch, "rand", draw)
        patch.setattr(nn.Module, "to", move_module)
        patch.setattr(torch.autograd.Function, "apply", classmethod(apply_noting))
        patch.setattr(
            torch.autograd, "backward", lambda roots, grad_tensors=None, **_: gpu.backward(roots, grad_tensors)
        )
        patch.setattr(FakeTensor, "tolist", lambda self: self.cpu().tolist())  # one read, not one for each element
        patch.setattr(Tensor, "backward", lambda self, gradient=None, **_: gpu.backward(self, gradient))
        patch.setattr(torch._C, "_current_graph_task_id", lambda: gpu.num_backward_passes if gpu.place else -1)
        for module in (_foreach_utils, optimizer):  # whose kernels take no other classes
            patch.setattr(module, "_foreach_supported_types", [Tensor, nn.Parameter, FakeTensor])
        if importlib.util.find_spec("triton") is not None:
            for name, kernel in (("autotuner", "Autotuner"), ("jit", "JITFunction")):
                owner = getattr(importlib.import_module(f"triton.runtime.{name}"), kernel)
                patch.setattr(owner, "run", lambda _self, *args, **kwargs: gpu.launch_triton(*args, **kwargs))
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)  # lists become tensors on the CPU, which then move
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def _moved(module: nn.Module) -> nn.Module:
    """Its parameters and buffers are the GPU's, and shared where they were."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in moved:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                    is_trained = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_trained else there
                tensors[name] = moved[id(tensor)]
    return module
