"""Consecutive calls of code compiled by Inductor, without returning to Python in between."""

import ctypes
import functools
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Call", "Runner"]


class Call(Protocol):
    """A graph that can be called."""

    def __call__(self, inputs: Sequence[Tensor], times: int = 1) -> tuple[int, list[float], list[Tensor]]:
        """Call the graph ``times`` times with these tensors, or until a guard fails.

        Returns:
            The number of calls made; their vectors, concatenated; the other results of the last call.
        """


class Runner:
    """A compiled graph with bound input tensors.

    Its first result is a vector of float64 whose first element is positive if all guards hold; a sequence of calls ends at
    the first one in which a guard fails.

    Args:
        entry: the compiled function, of the extension module that Inductor has loaded.
        outputs: number of results.
        numbers: length of the first result.
    """

    def __init__(self, entry: Any, outputs: int, numbers: int) -> None:
        library = ctypes.PyDLL(entry.__self__.__file__)  # calls hold the GIL, which the graph itself releases
        self._entry = ctypes.cast(getattr(library, _ENTRY), ctypes.c_void_p)
        self._outputs = (ctypes.c_void_p * outputs)()
        self.numbers = numbers
        self._inputs = (ctypes.c_void_p * 0)()
        self._held: list[Tensor] = []
        self._places: list[int] = []
        self._shapes: list[torch.Size] = []

    def take(self, inputs: Sequence[Tensor]) -> None:
        """Bind the input tensors; their values are read at each call.

        Raises:
            RuntimeError: a tensor has another shape than at the first call.
        """
        places = [t.data_ptr() for t in inputs]  # an assignment to .data may have replaced the storage
        shapes = [t.shape for t in inputs]
        if shapes != self._shapes:
            if self._held:
                raise RuntimeError(f"the shapes of tensors were {self._shapes}, and are {shapes}")
            self._shapes = shapes
        if not self._held:
            self._inputs = (ctypes.c_void_p * len(inputs))()
            self._held, changed = [*inputs], [*range(len(inputs))]
        elif places == self._places and all(map(operator.is_, inputs, self._held)):
            return
        else:
            new = zip(inputs, places, strict=True)
            old = zip(self._held, self._places, strict=True)
            changed = [i for i, ((t, p), (s, q)) in enumerate(zip(new, old, strict=True)) if t is not s or p != q]
        if changed:
            capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([inputs[place].detach() for place in changed])
            self._free(changed)
            for place, capsule in zip(changed, capsules, strict=True):
                self._inputs[place] = _pointer(capsule, None)
                self._held[place] = inputs[place]
            self._places = places

    def __call__(self, times: int = 1) -> tuple[int, list[float], list[Tensor]]:
        """Call the graph ``times`` times, or until a guard fails.

        Returns:
            The number of calls made; their vectors, concatenated; the other results of the last call.

        Raises:
            RuntimeError: raised by an operation of the graph.
        """
        values = (ctypes.c_double * (times * self.numbers))()
        error = ctypes.create_string_buffer(2000)
        made = _library().pyro_vae_run(
            self._entry, self._inputs, len(self._inputs), self._outputs, len(self._outputs), times, self.numbers, values,
            error, len(error),
        )  # fmt: skip
        if made < 0:
            raise RuntimeError(error.value.decode(errors="replace"))
        others = [_capsule(pointer, None, None) for pointer in self._outputs[1:]]
        return made, values[: made * self.numbers], torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(others)

    def _free(self, places: Any) -> None:
        for place in places:
            if self._inputs[place]:
                _delete(self._inputs[place])
                self._inputs[place] = None

    def __del__(self) -> None:
        self._free(range(len(self._inputs)))


_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

# The graph steals the handles of its inputs, and creates those of its results.
_SOURCE = """
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" int64_t pyro_vae_run(void (*entry)(AtenTensorHandle*, AtenTensorHandle*), AtenTensorHandle* inputs, int64_t ins,
                                AtenTensorHandle* outputs, int64_t outs, int64_t times, int64_t numbers, double* values,
                                char* error, int64_t room) {
    std::vector<AtenTensorHandle> given(ins);
    int64_t made = 0;
    try {
        while (made < times) {
            for (int64_t i = 0; i < ins; ++i) aoti_torch_new_tensor_handle(inputs[i], &given[i]);
            entry(given.data(), outputs);
            void* found = nullptr;
            aoti_torch_get_data_ptr(outputs[0], &found);
            double* row = values + made * numbers;
            std::memcpy(row, found, numbers * sizeof(double));
            aoti_torch_delete_tensor_object(outputs[0]);
            ++made;
            if (made == times || row[0] <= 0) break;
            for (int64_t i = 1; i < outs; ++i) aoti_torch_delete_tensor_object(outputs[i]);
        }
    } catch (const std::exception& e) {
        std::strncpy(error, e.what(), room - 1);
        return -1;
    } catch (...) {
        return -1;
    }
    return made;
}

extern "C" void pyro_vae_delete(AtenTensorHandle tensor) { aoti_torch_delete_tensor_object(tensor); }
"""


@functools.cache
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache

    library = ctypes.PyDLL(CppCodeCache.load(_SOURCE, device_type="cpu")._name)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.pyro_vae_run.argtypes = [
        pointer, pointer, number, pointer, number, number, number, pointer, ctypes.c_char_p, number,
    ]  # fmt: skip
    library.pyro_vae_run.restype = number
    library.pyro_vae_delete.argtypes, library.pyro_vae_delete.restype = [pointer], None
    return library


def _delete(pointer: int) -> None:
    _library().pyro_vae_delete(pointer)
