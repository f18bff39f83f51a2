"""What the core may know of an array: its owner, shape, dtype and device, read off its attributes.

No framework is imported here. An array's owner is found by the names of its classes, its dtype and
device by the spelling that its framework prints, so that `torch.float32` and `dtype('float32')` are
both `"float32"`, and `device(type='cuda', index=0)` and `<CUDA Device 0>` are both `"cuda:0"`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["class_names", "describe", "device_kind", "device_name", "dtype_name", "facts", "is_array", "overlap"]

FLOATS = ("float64", "float32", "bfloat16", "float16")
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def class_names(array: object) -> tuple[str, ...]:
    """Full names of the array's class and its bases, most derived first: `("torch.Tensor", ...)`."""
    return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in type(array).__mro__)


def is_array(value: object) -> bool:
    """Whether `value` looks like an array: it has a shape and a dtype."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def dtype_name(array: Any) -> str:
    """`"float32"` for any framework's float32."""
    return str(array.dtype).rpartition(".")[2]


def device_name(array: Any) -> str:
    """`"cpu"`, `"cuda:0"`, ...: where the array is; `"sharded"`: over several; `"traced"`: nowhere yet."""
    device = getattr(array, "device", None)
    if device is None and hasattr(array, "aval"):  # a JAX tracer
        return "traced"
    if device is None or isinstance(device, str):
        return device or "cpu"
    kind = getattr(device, "type", None) or getattr(device, "platform", None)
    index = getattr(device, "index", None)
    if kind is None and hasattr(device, "device_set"):  # a JAX sharding
        devices = list(device.device_set)
        if len(devices) != 1:
            return "sharded"
        kind, index = devices[0].platform, devices[0].id
    elif kind is None:  # CuPy: a bare CUDA device
        kind, index = "cuda", device.id
    elif index is None:
        index = getattr(device, "id", None)
    kind = {"gpu": "cuda"}.get(str(kind), str(kind))
    return kind if kind == "cpu" or index is None else f"{kind}:{index}"


def facts(array: Any) -> tuple[Any, ...]:
    """What is checked of an array: another with the same facts passes where it has passed.

    Raises AttributeError for what is no array.
    """
    more = getattr(array, "device", None), getattr(array, "layout", None), getattr(array, "is_nested", False)
    return (type(array), array.shape, array.dtype, *more)


def device_kind(name: str) -> str:
    """`"cuda"` of `"cuda:0"`."""
    return name.partition(":")[0]


def describe(value: object) -> str:
    """How an error names a value: `float32 array of shape (8, 4) on cpu`, or its type and repr."""
    if is_array(value):
        shape = tuple(value.shape)  # type: ignore[attr-defined]
        return f"a {dtype_name(value)} array of shape {shape} on {device_name(value)} ({class_names(value)[0]})"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def overlap(one: Any, other: Any) -> bool:
    """Whether two matrices of the same dtype share an element's memory; False where an address is not told."""
    here, there = _layout(one), _layout(other)
    if here is None or there is None or device_name(one) != device_name(other):
        return False
    (a, pitch, width, end), (b, other_pitch, other_width, other_end) = here, there
    if end <= b or other_end <= a:
        return False
    if pitch == other_pitch and max(width, other_width) <= pitch:  # columns of one larger matrix
        return (b - a) % pitch < width or (a - b) % pitch < other_width
    return True


def _layout(array: Any) -> tuple[int, int, int, int] | None:
    """Address of a matrix, bytes from row to row, bytes of a row, address behind it; None if none is told."""
    item = BYTES.get(dtype_name(array))
    if item is None or 0 in array.shape:
        return None
    told = getattr(array, "__array_interface__", None) if hasattr(array, "strides") else None
    if told is not None:
        address = told["data"][0]
        pitch, step = array.strides
    elif callable(getattr(array, "data_ptr", None)):
        address, (pitch, step) = array.data_ptr(), (item * stride for stride in array.stride())
    else:
        return None
    if pitch < 0 or step < 0 or not address:
        return None
    width = (array.shape[1] - 1) * step + item
    return address, pitch, width, address + (array.shape[0] - 1) * pitch + width
