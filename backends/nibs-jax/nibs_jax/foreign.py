"""An eager backend's kernels inside jit: CuPy's on a GPU, NumPy's on a CPU, through `jax.ffi`.

The handler that XLA calls is a ctypes callback, so no compiler is needed where nibs runs. It wraps XLA's
buffers (and stream) as the eager backend's own arrays, makes the call, and copies the answer into the result
buffers. What travels with the program is the request as text, never an address or a number of this process, so
a compiled program may be kept and read back by another.

    NIBS_JAX_KERNELS, `nibs_jax.kernels(...)`      who computes
    "auto" (default)                               CuPy on a GPU where it is ready, else XLA
    "xla"                                          the traced schedule
    "cupy", "numpy"                                that backend, or an error that says why it cannot

The C structs below are those of jaxlib's own header, which is read and compared field by field before anything
is registered: a jaxlib that moved a field, or has no header, is refused with the field's name, never called.
On a GPU the eager backend's workspace is a result of the call, so that XLA owns all memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nibs.errors import BackendUnavailable, InvalidInput, Unsupported
from nibs.plan import Plan, plan_request, with_kernel
from nibs.registry import registry
from nibs.request import WRT, Request
from nibs.spec import Gradients, InfoNCE, Sigmoid, Stats

__all__ = ["check_layout", "choose", "kernels", "run"]

ENVIRONMENT = "NIBS_JAX_KERNELS"
CHOICES = ("auto", "xla", "cupy", "numpy")
OF_DEVICE = {"cpu": "numpy", "cuda": "cupy"}
PLATFORM = {"cpu": "cpu", "cuda": "CUDA"}
TARGET = "nibs_eager_loss_and_grad"
ARRAYS = ("queries", "keys", "scale", "bias", "targets", "query_ids", "key_ids", "query_mask", "key_mask", "weights")
FIGURES = ("count", "top1", "mean_positive", "mean_negative", "mean_lse", "hardest_negative")

_chosen: ContextVar[str | None] = ContextVar("nibs_jax_kernels", default=None)


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Within the block, single-device calls are computed by `"xla"`, `"cupy"`, `"numpy"`, or `"auto"`."""
    token = _chosen.set(_known(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def _known(name: str) -> str:
    if name not in CHOICES:
        raise InvalidInput(f"kernels {name!r}: expected one of {', '.join(map(repr, CHOICES))}.")
    return name


def choose(request: Request, *, alone: bool) -> str | None:
    """The eager backend that computes this request, None for XLA. alone: on one device, outside any `shard_map`.

    Raises Unsupported or BackendUnavailable where one was asked for by name and cannot.
    """
    name = _known(_chosen.get() or os.environ.get(ENVIRONMENT) or "auto")
    if name == "xla":
        return None
    asked = name != "auto"
    if not asked:
        if request.device != "cuda":
            return None
        name = "cupy"
    reason = _why_not(name, request, alone)
    if reason is None:
        return name
    if asked:
        raise Unsupported(f"kernels {name!r} cannot do this inside JAX: {reason}. Use kernels 'xla'.")
    return None


def _why_not(name: str, request: Request, alone: bool) -> str | None:
    if OF_DEVICE.get(request.device) != name:
        return f"its arrays do not live on {request.device}"
    if not alone:
        return "on a ring, or inside a shard_map, XLA's own schedule runs"
    if request.reduction == "none":
        return "reduction='none' takes an upstream factor for each row"
    if name not in [status.name for status in registry.statuses() if status.state == "ready"]:
        return f"backend {name!r} is not here"
    reason = registry.info(name).capabilities.why_not(request)
    if reason is not None:
        return reason
    try:
        registry.load(name)
        check_layout()
    except BackendUnavailable as fault:
        return str(fault)
    return None


# -- the call, as JAX sees it ---------------------------------------------------------------------------------


def run(name: str, request: Request, inputs: Any, *, hold: bool) -> tuple[Any, Gradients, Stats | None]:
    """Loss, gradients named in `request.wrt`, and stats, traced: one `ffi_call`. `request` has no arrays."""
    _register(request.device)
    accumulator = jnp.float64 if request.dtype == "float64" else jnp.float32
    given = {field: getattr(inputs, field) for field in ARRAYS if getattr(inputs, field) is not None}
    wide = accumulator if hold else jnp.dtype(request.dtype)
    backend = registry.load(name)
    plan = plan_request(request, backend.tile_hints, grad=bool(request.wrt), hold=hold)
    objective: Any = request.objective
    softmax = isinstance(objective, InfoNCE)
    results = {"loss": jax.ShapeDtypeStruct((), accumulator)}
    shapes = {"queries": (request.n, request.d), "keys": (request.m, request.d), "scale": (), "bias": ()}
    for field in request.wrt or ():
        results[field] = jax.ShapeDtypeStruct(shapes[field], wide if field in ("queries", "keys") else accumulator)
    if request.stats:
        results["figures"] = jax.ShapeDtypeStruct((len(FIGURES),), accumulator)
        if softmax and objective.rows:
            results["query_lse"] = jax.ShapeDtypeStruct((request.n,), accumulator)
        if softmax and objective.columns:
            results["key_lse"] = jax.ShapeDtypeStruct((request.m,), accumulator)
    if request.device == "cuda":
        results["scratch"] = jax.ShapeDtypeStruct((plan.memory,), jnp.uint8)
    text = _spelled(name, request, tuple(given), tuple(results), hold)
    call = jax.ffi.ffi_call(TARGET, list(results.values()), vmap_method="sequential")
    found = dict(zip(results, call(*given.values(), request=text), strict=True))
    poison = _poison(request, inputs, accumulator)
    loss = found["loss"] + poison
    gradients = Gradients(**{field: found[field] + poison.astype(found[field].dtype) for field in request.wrt or ()})
    if not request.stats:
        return loss, gradients, None
    figures = {field: found["figures"][index] for index, field in enumerate(FIGURES)}
    figures["count"] = figures["count"].astype(jnp.int32)
    if not softmax:
        figures["mean_lse"] = None
    stats = Stats(
        **figures,
        query_lse=found.get("query_lse"),
        key_lse=found.get("key_lse"),
        plan=with_kernel(plan, f"{plan.kernel}, through jax.ffi"),
    )
    return loss, gradients, stats


def _poison(request: Request, inputs: Any, accumulator: Any) -> Any:
    """NaN where a value is bad that an eager call would refuse; values cannot be looked at in a trace."""
    bad: Any = jnp.zeros(request.n, bool)
    if inputs.targets is not None:
        targets = inputs.targets
        bad = bad | (targets < -1) | (targets >= request.m)
        if getattr(request.objective, "exclude_self", False):
            bad = bad | (targets == jnp.arange(request.n, dtype=targets.dtype))
    if inputs.weights is not None:
        bad = bad | ~((inputs.weights >= 0) & (inputs.weights < jnp.inf))
    if inputs.query_mask is not None:
        bad = bad & inputs.query_mask
    return jnp.where(bad.any(), jnp.nan, jnp.zeros((), accumulator))


def _spelled(name: str, request: Request, given: tuple[str, ...], results: tuple[str, ...], hold: bool) -> str:
    """The request as text."""
    facts = {field.name: getattr(request, field.name) for field in fields(Request) if field.name not in ARRAYS}
    facts["objective"] = [type(request.objective).__name__, asdict(request.objective)]
    facts["plan"] = None if request.plan is None else asdict(request.plan)
    facts["hold"] = hold
    return json.dumps({"backend": name, "request": facts, "given": given, "results": results})


def _read(text: str) -> tuple[str, dict[str, Any], list[str], list[str]]:
    spelled = json.loads(text)
    facts = spelled["request"]
    kind, options = facts["objective"]
    facts["objective"] = {"InfoNCE": InfoNCE, "Sigmoid": Sigmoid}[kind](**options)
    facts["plan"] = None if facts["plan"] is None else Plan(**facts["plan"])
    facts["wrt"] = tuple(facts["wrt"] or ())
    return spelled["backend"], facts, spelled["given"], spelled["results"]


# -- the call, as XLA makes it --------------------------------------------------------------------------------


def _serve(frame: Any) -> None:
    """One call: arrays in, the eager backend's answer out."""
    for name in ("args", "rets", "attrs"):
        part = getattr(frame, name)
        if part.struct_size < ctypes.sizeof(type(part)):
            raise BackendUnavailable(
                f"XLA's {name} are {part.struct_size} bytes, expected {ctypes.sizeof(type(part))}."
            )
    backend, facts, given, results = _read(_attribute(frame.attrs))
    device = facts["device"]
    with nullcontext() if device == "cpu" else _on_gpu(frame, results.index("loss")) as number:
        view = _numpy_view if device == "cpu" else _cupy_view
        values = dict.fromkeys(ARRAYS)
        values.update({name: view(_buffer(frame.args, index)) for index, name in enumerate(given)})
        out = {name: view(_buffer(frame.rets, index)) for index, name in enumerate(results)}
        if number is not None:
            facts["device"] = f"cuda:{number}"
        request = Request(**{**facts, "owner": backend}, **values)  # type: ignore[arg-type]
        with _workspace(out.get("scratch")):
            _answer(registry.load(backend).loss_and_grad(request), out)


def _answer(answer: Any, out: dict[str, Any]) -> None:
    """The eager backend's answer into the result buffers."""
    loss, gradients, *stats = answer
    out["loss"][...] = loss
    for name in WRT:
        if name in out:
            out[name][...] = getattr(gradients, name)
    if stats:
        figures = [getattr(stats[0], name) for name in FIGURES]
        out["figures"][...] = _row(
            out["figures"], [float("nan") if value is None else float(value) for value in figures]
        )
        for name in ("query_lse", "key_lse"):
            if name in out:
                out[name][...] = getattr(stats[0], name)


def _row(like: Any, values: list[float]) -> Any:
    row = np.asarray(values, like.dtype)
    if isinstance(like, np.ndarray):
        return row
    import cupy

    return cupy.asarray(row)


@contextmanager
def _on_gpu(frame: Any, loss: int) -> Iterator[int]:
    """CuPy works where XLA does: on the device whose memory the result `loss` is, and on the stream of this call.

    The thread that XLA calls on has a device of its own, which need not be this one.
    """
    import cupy

    place = cupy.cuda.runtime.pointerGetAttributes(_buffer(frame.rets, loss).data)
    with cupy.cuda.Device(place.device), cupy.cuda.ExternalStream(_stream(frame)):
        yield place.device


@contextmanager
def _workspace(scratch: Any) -> Iterator[None]:
    """On a GPU the eager backend works in XLA's memory."""
    if scratch is None:
        yield
        return
    import cupy

    with cupy.cuda.using_allocator(Arena(scratch).allocate):
        yield


class Arena:
    """CuPy's memory for one call: the scratch result, from its beginning to its end; beyond it CuPy's own pool.

    Work on one stream runs in order, so what was given is given again once nothing holds it.
    """

    def __init__(self, scratch: Any) -> None:
        self.scratch = scratch
        self.free = [(0, scratch.nbytes)]
        self.lock = threading.Lock()

    def allocate(self, size: int) -> Any:
        import cupy

        size = max(512, -(-size // 512) * 512)
        with self.lock:
            for index, (begin, length) in enumerate(self.free):
                if length >= size:
                    self.free[index] = (begin + size, length - size)
                    pointer = self.scratch.data.ptr + begin
                    memory = cupy.cuda.UnownedMemory(pointer, size, Loan(self, begin, size, self.scratch))
                    return cupy.cuda.MemoryPointer(memory, 0)
        return cupy.get_default_memory_pool().malloc(size)

    def give_back(self, begin: int, size: int) -> None:
        with self.lock:
            spans = sorted([*self.free, (begin, size)])
            joined = [spans[0]]
            for start, length in spans[1:]:
                last, before = joined[-1]
                if last + before == start:
                    joined[-1] = (last, before + length)
                else:
                    joined.append((start, length))
            self.free = joined


class Loan:
    """A piece of an arena, given back when CuPy lets go of it."""

    def __init__(self, arena: Arena, begin: int, size: int, scratch: Any) -> None:
        self.arena, self.begin, self.size, self.scratch = arena, begin, size, scratch

    def __del__(self) -> None:
        self.arena.give_back(self.begin, self.size)


NAMES = {1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64"}
NAMES |= {10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}


def _shape(buffer: Any) -> tuple[Any, tuple[int, ...]]:
    import ml_dtypes

    name = NAMES[buffer.dtype]
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return dtype, tuple(buffer.dims[axis] for axis in range(buffer.rank))


def _numpy_view(buffer: Any) -> Any:
    """XLA's buffer as a NumPy array over the same bytes."""
    dtype, shape = _shape(buffer)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    held = (ctypes.c_char * size).from_address(buffer.data)
    return np.frombuffer(held, dtype).reshape(shape)


def _cupy_view(buffer: Any) -> Any:
    """XLA's buffer as a CuPy array over the same bytes."""
    import cupy

    dtype, shape = _shape(buffer)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size == 0:
        return cupy.zeros(shape, dtype)
    memory = cupy.cuda.UnownedMemory(buffer.data, size, None)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


# -- C structs, and the callback ------------------------------------------------------------------------------

POINTER, SIZE, INT, LONG, WORD = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32


class Extension(ctypes.Structure):
    _fields_ = (("struct_size", SIZE), ("type", INT), ("next", POINTER))


class ApiVersion(ctypes.Structure):
    _fields_ = (("struct_size", SIZE), ("extension_start", POINTER), ("major_version", INT), ("minor_version", INT))


class Metadata(ctypes.Structure):
    _fields_ = (("struct_size", SIZE), ("api_version", ApiVersion), ("traits", WORD), ("state_type_id", LONG))


class MetadataExtension(ctypes.Structure):
    _fields_ = (("extension_base", Extension), ("metadata", ctypes.POINTER(Metadata)))


class Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("dtype", INT),
        ("data", POINTER),
        ("rank", LONG),
        ("dims", ctypes.POINTER(LONG)),
    )


class Args(ctypes.Structure):
    _fields_ = (
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("size", LONG),
        ("types", POINTER),
        ("args", ctypes.POINTER(POINTER)),
    )


class Rets(ctypes.Structure):
    _fields_ = (*Args._fields_[:-1], ("rets", ctypes.POINTER(POINTER)))


class ByteSpan(ctypes.Structure):
    _fields_ = (("ptr", POINTER), ("len", SIZE))


class Attrs(ctypes.Structure):
    _fields_ = (
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("size", LONG),
        ("types", ctypes.POINTER(INT)),
        ("names", ctypes.POINTER(ctypes.POINTER(ByteSpan))),
        ("attrs", ctypes.POINTER(POINTER)),
    )


class CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("api", POINTER),
        ("ctx", POINTER),
        ("stage", INT),
        ("args", Args),
        ("rets", Rets),
        ("attrs", Attrs),
    )


class ErrorArgs(ctypes.Structure):
    _fields_ = (("struct_size", SIZE), ("extension_start", POINTER), ("message", ctypes.c_char_p), ("errc", INT))


class StreamArgs(ctypes.Structure):
    _fields_ = (("struct_size", SIZE), ("extension_start", POINTER), ("ctx", POINTER), ("stream", POINTER))


class Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", SIZE),
        ("extension_start", POINTER),
        ("api_version", ApiVersion),
        ("internal_api", POINTER),
        ("XLA_FFI_Error_Create", POINTER),
        ("error_text", POINTER),  # renamed between versions, unused here
        ("XLA_FFI_Error_Destroy", POINTER),
        ("XLA_FFI_Handler_Register", POINTER),
        ("XLA_FFI_Stream_Get", POINTER),
    )


STRUCTS = {
    "XLA_FFI_Api_Version": ApiVersion,
    "XLA_FFI_Metadata": Metadata,
    "XLA_FFI_Metadata_Extension": MetadataExtension,
    "XLA_FFI_Buffer": Buffer,
    "XLA_FFI_Args": Args,
    "XLA_FFI_Rets": Rets,
    "XLA_FFI_ByteSpan": ByteSpan,
    "XLA_FFI_Attrs": Attrs,
    "XLA_FFI_CallFrame": CallFrame,
    "XLA_FFI_Error_Create_Args": ErrorArgs,
    "XLA_FFI_Stream_Get_Args": StreamArgs,
    "XLA_FFI_Api": Api,
}
METADATA_EXTENSION = 1
EXECUTE = 3
INTERNAL = 13


def header() -> str:
    """The text of jaxlib's own C header. Raises BackendUnavailable where it has none."""
    try:
        return (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    except OSError as cause:
        raise BackendUnavailable(
            "this jaxlib brings no xla/ffi/api/c_api.h, so that the layout of its calls cannot be checked. "
            "Try: pip install --force-reinstall jaxlib"
        ) from cause


@lru_cache(maxsize=1)
def check_layout() -> tuple[int, int]:
    """The version of XLA's FFI, once every struct has been found to be as it is written down here.

    Raises BackendUnavailable that names the first field which is not.
    """
    return compare(header())


def compare(text: str) -> tuple[int, int]:
    """`check_layout` of a header's text."""
    version = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if None in version or int(version[0][1]) != 0:  # type: ignore[index]
        raise _moved("its version is not 0.x")
    for name, ours in STRUCTS.items():
        theirs = _fields_of(text, name)
        mine = [(field, _kind(kind)) for field, kind in ours._fields_]  # type: ignore[misc]
        for index, (field, kind) in enumerate(mine):
            if index >= len(theirs):
                raise _moved(f"{name} has no field {field}")
            there, what = theirs[index]
            if what != kind or (there != field and field != "error_text"):
                raise _moved(f"field {index} of {name} is {there} ({what}), expected {field} ({kind})")
    return int(version[0][1]), int(version[1][1])  # type: ignore[index]


def _moved(what: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"jaxlib {jax.lib.__version__}: the layout of XLA's foreign calls has changed ({what}), and calling by the "
        f"old one could corrupt memory. Set {ENVIRONMENT}=xla, or upgrade: pip install -U nibs-jax"
    )


def _fields_of(text: str, name: str) -> list[tuple[str, str]]:
    """Names and kinds of a C struct's fields, in order."""
    body = re.search(rf"struct {name} \{{(.*?)\n\}}", text, re.S)
    if body is None:
        raise _moved(f"there is no {name}")
    lines = re.sub(r"//[^\n]*", "", body[1])
    found = []
    for piece in lines.split(";"):
        piece = " ".join(piece.split())
        if not piece:
            continue
        function = re.fullmatch(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", piece)
        if function:
            found.append((function[1], "pointer"))
            continue
        kind, _, field = piece.rpartition(" ")
        found.append((field.lstrip("*"), _kind_of_c("*" if "*" in piece else kind)))
    return found


def _kind_of_c(kind: str) -> str:
    kind = kind.removeprefix("const ").removeprefix("struct ")
    if kind == "*":
        return "pointer"
    plain = {
        "size_t": "size_t",
        "int": "int",
        "int64_t": "int64_t",
        "uint32_t": "uint32_t",
        "XLA_FFI_Handler_Traits": "uint32_t",
        "XLA_FFI_TypeId": "int64_t",  # a struct of one
        "XLA_FFI_DataType": "int",
        "XLA_FFI_ExecutionStage": "int",
        "XLA_FFI_Error_Code": "int",
        "XLA_FFI_Extension_Base": "Extension",
        "XLA_FFI_InternalExtension": "Extension",
    }
    return plain.get(kind) or (STRUCTS[kind].__name__ if kind in STRUCTS else kind)


def _kind(kind: Any) -> str:
    if kind is POINTER or kind is ctypes.c_char_p or (isinstance(kind, type) and issubclass(kind, ctypes._Pointer)):
        return "pointer"
    if issubclass(kind, ctypes.Structure):
        return str(kind.__name__)
    # ctypes has one type for size_t and unsigned long; the names are told apart by what they stand for here
    return {INT: "int", LONG: "int64_t", SIZE: "size_t", WORD: "uint32_t"}[kind]


def _handle(pointer: int) -> int | None:
    """XLA's call. Returns 0 for success, else an XLA_FFI_Error."""
    frame = ctypes.cast(pointer, ctypes.POINTER(CallFrame)).contents
    try:
        if frame.extension_start:
            extension = ctypes.cast(frame.extension_start, ctypes.POINTER(Extension)).contents
            if extension.type == METADATA_EXTENSION:
                metadata = ctypes.cast(
                    frame.extension_start, ctypes.POINTER(MetadataExtension)
                ).contents.metadata.contents
                version = metadata.api_version
                version.major_version, version.minor_version = check_layout()
                metadata.traits = 0
                return None
        if frame.stage == EXECUTE:
            _serve(frame)
        return None
    except BaseException as fault:  # nothing may unwind into C
        return _error(frame, f"{type(fault).__name__}: {fault}")


HANDLER = ctypes.CFUNCTYPE(POINTER, POINTER)
_callback = HANDLER(_handle)


def _error(frame: Any, message: str) -> int | None:
    api = ctypes.cast(frame.api, ctypes.POINTER(Api)).contents
    args = ErrorArgs(ctypes.sizeof(ErrorArgs), None, message.encode(), INTERNAL)
    create = HANDLER(api.XLA_FFI_Error_Create)
    return create(ctypes.addressof(args))  # type: ignore[no-any-return]


def _stream(frame: Any) -> int:
    api = ctypes.cast(frame.api, ctypes.POINTER(Api)).contents
    args = StreamArgs(ctypes.sizeof(StreamArgs), None, frame.ctx, None)
    if HANDLER(api.XLA_FFI_Stream_Get)(ctypes.addressof(args)):
        raise BackendUnavailable("XLA gave no stream to work on.")
    return args.stream or 0


def _buffer(part: Any, index: int) -> Any:
    pointers = part.args if isinstance(part, Args) else part.rets
    return ctypes.cast(pointers[index], ctypes.POINTER(Buffer)).contents


def _attribute(attrs: Any) -> str:
    """The attribute `request`: the only one there is."""
    span = ctypes.cast(attrs.attrs[0], ctypes.POINTER(ByteSpan)).contents
    return ctypes.string_at(span.ptr, span.len).decode()


@lru_cache(maxsize=2)
def _register(device: str) -> None:
    check_layout()
    capsule = jax.ffi.pycapsule(ctypes.cast(_callback, POINTER))
    jax.ffi.register_ffi_target(TARGET, capsule, platform=PLATFORM[device])
