"""NumPy or torch: the method's formulas are written once, in float64 NumPy; this module converts
torch tensors.

Nothing is differentiated through the partition function. So a torch `beta` becomes a float64 array,
and the result is converted back to its dtype and device, with full float32 accuracy. torch is never
imported here: a tensor implies that it is loaded.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any
"""A NumPy array, a torch tensor, or a Python number."""

Float64 = NDArray[np.float64]


def is_torch(value: object) -> bool:
    """Whether `value` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_float64(value: Array) -> Float64:
    """Any array, tensor or number as a float64 NumPy array."""
    if is_torch(value):
        torch = sys.modules["torch"]
        return np.asarray(value.detach().to("cpu").to(torch.float64).numpy())
    return np.asarray(value, dtype=np.float64)


def on_float64(function: Callable[..., Float64], *arguments: Array) -> Array:
    """`function` of the arguments as float64 arrays, returned as the kind of the arguments.

    Tensors anywhere give a tensor on the first tensor's device, in the widest floating dtype among
    the tensors; NumPy arrays give the widest floating dtype among the arrays; Python numbers alone
    give a float.
    """
    result = function(*(to_float64(argument) for argument in arguments))
    tensors = [argument for argument in arguments if is_torch(argument)]
    if tensors:
        torch = sys.modules["torch"]
        floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        dtype = floating[0] if floating else torch.get_default_dtype()
        for other in floating[1:]:
            dtype = torch.promote_types(dtype, other)
        return torch.from_numpy(np.asarray(result)).to(dtype).to(tensors[0].device)
    arrays = [argument for argument in arguments if isinstance(argument, (np.ndarray, np.generic))]
    floating_arrays = [array.dtype for array in arrays if np.issubdtype(array.dtype, np.floating)]
    if floating_arrays:
        return np.asarray(result).astype(np.result_type(*floating_arrays))[()]
    return np.asarray(result)[()] if arrays or np.ndim(result) else float(result)
