"""Which tile each kind of GPU likes, and how to find out.

    table     by architecture and kernel, first choice first: what compiles without spills; Hopper's order was timed
    limits    a choice is taken only where its shared memory fits the card: consumer cards have 99 KiB, an H100 has 227
    cache     what `python -m nibs_torch.kernels.tuning` measured on this machine comes before the table

The autotuner runs only when it is asked to: choosing by a stopwatch inside a training run would make its numbers
differ from run to run. Its answer is kept in NIBS_TUNING, or `~/.cache/nibs/tuning.json`, by device, Triton version,
kernel and element size.

Macro tiles: rows and columns of one launch, as large as the budget allows, such that the library's products around it
(tiles of 128 x 256 over rows and width) fill whole waves of the card.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["Card", "Config", "choices", "config", "macro_tiles", "shared_bytes"]

KIB = 1024
LIBRARY_TILE = (128, 256)  # of the products around a macro tile


@dataclass(frozen=True, slots=True)
class Config:
    """One way to launch a kernel.

    rows, columns, width: of a tile (BM, BN, BK). warps, stages: of Triton's. descriptors: operands are fetched by the
    bulk copy engine (Hopper and later) where their strides allow it. per_sm: programs that stay, for each
    multiprocessor; 0: one program a tile.
    """

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    descriptors: bool = False
    per_sm: int = 0
    group: int = 8


@dataclass(frozen=True, slots=True)
class Card:
    """What the choice depends on. arch: `"sm_90"`, `"gfx942"`, or `"interpreter"`; shared: bytes a program may have."""

    name: str
    arch: str
    sms: int
    shared: int


# By kernel, the best guess first; `tune` times them all. Halves: 2-byte elements; the rest: float32. After a kernel's
# own choices come those that fit any card. Ragged: tiles cut off at an edge, whose masks take registers. Busy: kernels
# with ids, a margin or exclusions compiled in, which take more of them. Sums: with smoothing, sums of logits and other
# statistics. Full: both. Kept: logits are stored, in float32, on their way through shared memory; weights from kept
# logits have no products to be fast at. Loose: rows that the copy engine cannot fetch, for they do not lie on 16-byte
# steps; every address of theirs is worked out. Least: whatever comes together.
#
# Hopper, whose copies come through descriptors: an SM reads its operands from the L2 cache, 64 flops for each byte in
# tiles of 128 x 128 and 85 at 128 x 256; at 64, every SM at full rate would read 12 TB/s. So weights and sigmoid take
# tiles of 128 x 256, whose programs stay and fetch the next tile while they finish one. Two programs an SM of 128 x 128
# read more, and one multiplies while the other finishes: so on a warm H200 the lse, whose column sums go from thread to
# thread, is 7 % faster than in tiles of 256 x 128, where a thread holds half as many columns as at 128 x 256.
Choices = dict[str, tuple[Config, ...]]
AMPERE = {
    **dict.fromkeys(("*", "* busy", "* sums", "* full"), (Config(128, 64, 32, 8, 3),)),
    "lse": (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 8, 3)),
    "lse kept": (Config(128, 64, 32, 8, 3),),
    "weights": (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 8, 3)),
    "weights ragged": (Config(128, 64, 32, 8, 3),),
    "product": (Config(128, 128, 32, 8, 3),),
}
LOOSE = (Config(128, 128, 32, 8, 3),)
HALVES: dict[str, Choices] = {
    "sm_80": AMPERE,
    "sm_89": AMPERE,
    "sm_90": {
        "lse": (
            Config(128, 128, 64, 4, 3, True, 2),
            Config(256, 128, 64, 8, 3, True, 1),
            Config(128, 256, 64, 8, 3, True, 1),
        ),
        "lse ragged": (Config(128, 128, 64, 8, 3, True, 1),),
        "lse loose": LOOSE,
        "lse kept": (Config(128, 128, 64, 8, 3, True, 1),),
        "lse busy": (Config(128, 128, 64, 8, 3, True, 1),),
        "lse sums": (Config(128, 64, 64, 8, 4, True, 1),),
        "weights": (
            Config(128, 256, 64, 8, 3, True, 1),
            Config(128, 128, 64, 4, 3, True, 2),
        ),
        "weights ragged": (Config(128, 128, 64, 8, 3, True, 1),),
        "weights busy": (Config(128, 128, 64, 8, 3, True, 1),),
        "weights full": (Config(128, 64, 64, 8, 4, True, 1),),
        "weights loose": LOOSE,
        "sigmoid": (
            Config(128, 256, 64, 8, 3, True, 1),
            Config(128, 128, 64, 4, 3, True, 2),
            Config(128, 128, 64, 8, 4, True, 1),
        ),
        "sigmoid ragged": (Config(128, 64, 64, 8, 4, True, 1),),
        "sigmoid busy": (Config(128, 64, 64, 8, 4, True, 1),),
        "sigmoid loose": LOOSE,
        "product": (Config(128, 128, 64, 8, 3),),
    },
    "sm_100": {
        **dict.fromkeys(("*", "lse busy", "sigmoid busy", "lse sums"), (Config(128, 64, 64, 8, 3),)),
        "lse": (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
        "product": (Config(128, 128, 64, 8, 3),),
    },
    "sm_120": {
        **dict.fromkeys(("*", "* busy", "lse sums", "weights full"), (Config(128, 64, 32, 8, 3),)),
        "weights": AMPERE["weights"],
        "product": AMPERE["product"],
    },
    "gfx942": {"*": (Config(128, 64, 32, 8, 2),)},
}
FLOATS: dict[str, Choices] = {arch: {"*": (Config(128, 64, 32, 8, 3),)} for arch in ("sm_80", "sm_89", "sm_90")}
SAFE = (Config(64, 64, 32, 8, 2), Config(32, 32, 32, 4, 2))
IEEE = (Config(64, 64, 16, 8, 2),)  # products without tensor cores
INTERPRETER = (Config(32, 64, 32, 4, 1),)
# The small tiles in which `repair` and `wide` go through a tile. As large as the instructions that Hopper and Blackwell
# multiply large tiles with: smaller ones would be multiplied by the older instruction, whose sums are not the same.
SMALL = {"repair": Config(64, 64, 32, 8, 3), "wide": Config(64, 64, 32, 8, 2)}


def choices(arch: str, kernel: str, item: int, *, ieee: bool = False, kind: str = "") -> tuple[Config, ...]:
    """Configurations for elements of `item` bytes, first choice first.

    arch: as in `Card`. kind: `""`, or what takes registers beside the tile, as the table's comment says.
    """
    if arch == "interpreter":
        return INTERPRETER
    if ieee:
        return (*IEEE, *SAFE)
    table = (HALVES if item == 2 else FLOATS).get(arch, {})
    own = table.get(kernel, table.get("*", ()))
    if kind in ("busy", "sums", "full", "least") or (kernel, kind) == ("weights", "kept"):
        own = ()  # unless the table says else
    if kind:
        own = table.get(f"{kernel} {kind}", table.get(f"* {kind}", own))
    return (*own, *SAFE)


def small(kernel: str, within: Config) -> Config:
    """The small tiles of `repair` or `wide`; under the interpreter, and where a card takes less, some fit a tile."""
    own = SMALL[kernel]
    least = min(within.rows, within.columns)
    return own if least >= own.rows else replace(own, rows=least, columns=least)


def shared_bytes(config: Config, item: int) -> int:
    """An upper bound on a program's shared memory: the operands in flight, and the tile on its way out."""
    operands = config.stages * (config.rows + config.columns) * config.width * item
    return operands + 2 * KIB * config.warps + KIB  # barriers


@lru_cache(maxsize=512)
def config(card: Card, kernel: str, item: int, *, ieee: bool = False, kind: str = "") -> Config:
    """What was measured on this card, else the first choice that fits it.

    Remembered, for each launch asks: what it goes by, the table and the file, is read once in a process (`forget`).
    """
    kept = None if kind else _cache().get(_key(card, kernel, item, ieee))
    if kept is not None:
        return kept
    found = choices(card.arch, kernel, item, ieee=ieee, kind=kind)
    return next((one for one in found if shared_bytes(one, item) <= card.shared), found[-1])


@lru_cache(maxsize=64)
def narrowest(card: Card, item: int, kinds: tuple[str, ...]) -> int:
    """The fewest rows or columns that a tile has, of the kernels and kinds that large batches take."""
    found = [config(card, name, item, kind=kind) for name in ("lse", "weights", "sigmoid") for kind in kinds]
    return min(min(one.rows, one.columns) for one in found)


def architecture(capability: tuple[int, int]) -> str:
    """The table's row for an NVIDIA compute capability."""
    major, minor = capability
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, f"sm_{major}{minor}")


@lru_cache(maxsize=64)
def card_of(device: Any) -> Card:
    """The card that a torch device is."""
    import torch

    if device.type == "cpu":
        return Card("interpreter", "interpreter", 4, 1 << 30)
    facts = torch.cuda.get_device_properties(device)
    sms = facts.multi_processor_count
    if torch.version.hip:
        return Card(facts.name, facts.gcnArchName.partition(":")[0], sms, 64 * KIB)
    shared = getattr(facts, "shared_memory_per_block_optin", 99 * KIB)
    return Card(facts.name, architecture((facts.major, facts.minor)), sms, shared)


@lru_cache(maxsize=64)
def macro_tiles(d: int, item: int, sms: int, area: int) -> tuple[tuple[int, int], ...]:
    """Macro tiles for weights of `item` bytes, up to `area` elements: those first that move the fewest bytes.

    Both sides are multiples of 256 that keep the library's products at whole waves: `(side / 128) ceil(d / 256)` tiles
    of the product are just below a multiple of the number of multiprocessors, to within a twentieth. A macro tile reads
    and writes float32 gradients of its rows and of its columns, which the products cannot hide, for they do it as they
    end: `1 / rows + 1 / columns` elements for each pair and column of theirs. Square ones move the fewest; where those
    jump from one wave to two, oblong ones fill the gap. Where no side fills a wave, all squares, the largest first.
    """
    high, wide = LIBRARY_TILE
    across = -(-d // wide)
    waves: dict[int, list[int]] = {}
    for side in range(1024, int(2 * area**0.5), 256):
        blocks = side // high * across
        count = -(-blocks // sms)
        if blocks >= 0.95 * count * sms:
            waves.setdefault(count, []).append(side)
    squares = [(side, side) for sides in waves.values() for side in sides]
    fullest = [sides[-1] for sides in waves.values()]
    oblong = [(rows, columns) for columns in fullest for rows in fullest if columns < rows <= 4 * columns]
    found = [one for one in squares + oblong if one[0] * one[1] <= area]
    found.sort(key=lambda one: 1 / one[0] + 1 / one[1])
    return tuple(found) or tuple((side, side) for side in range(max(256, int(area**0.5) // 256 * 256), 0, -256))


# -- the cache, and the command that fills it -------------------------------------------------------


def cache_path() -> Path:
    """Where measured choices are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("NIBS_TUNING") or Path(home) / "nibs" / "tuning.json")


@lru_cache(maxsize=1)
def _cache() -> dict[str, Config]:
    path = cache_path()
    if not path.is_file():
        return {}
    try:
        return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (ValueError, OSError, TypeError, AttributeError) as error:
        from nibs.errors import InvalidInput

        raise InvalidInput(f"{path} holds no tuning results ({error}): remove it, or tune again.") from error


def forget() -> None:
    """Read the file again when a configuration is next asked for: it, or the table, is no longer what it was."""
    for remembered in (_cache, config, narrowest):
        remembered.cache_clear()


def _key(card: Card, kernel: str, item: int, ieee: bool) -> str:
    import triton

    return f"{card.name}|{triton.__version__}|{kernel}|{item}{'|ieee' if ieee else ''}"


def tune(
    card: Card, kernel: str, item: int, milliseconds: Callable[[Config], float | None], *, ieee: bool = False
) -> dict[Config, float]:
    """Time each configuration that fits, and keep the fastest; returns what each took, the fastest first.

    milliseconds: None for one that fails to run.
    """
    times = {}
    for one in dict.fromkeys(choices(card.arch, kernel, item, ieee=ieee)):
        if shared_bytes(one, item) <= card.shared:
            taken = milliseconds(one)
            if taken is not None:
                times[one] = taken
    if not times:
        raise RuntimeError(f"no configuration of {kernel} runs on {card.name}")
    times = dict(sorted(times.items(), key=lambda each: each[1]))
    path = cache_path()
    kept = {**_cache(), _key(card, kernel, item, ieee): next(iter(times))}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(json.dumps({key: asdict(one) for key, one in kept.items()}, indent=1, sort_keys=True) + "\n")
    whole.replace(path)  # at once: another process may be reading
    forget()
    return times


def main() -> None:
    """`python -m nibs_torch.kernels.tuning --dtype bfloat16 --dim 768`: needs a GPU."""
    from nibs_torch.fused import time_config

    parser = argparse.ArgumentParser(prog="python -m nibs_torch.kernels.tuning", description="Tune the kernels here.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rows", type=int, default=11_264)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("Tuning times kernels on a GPU, and PyTorch sees none here.")
    device = torch.device("cuda", torch.cuda.current_device())
    card = card_of(device)
    item = 4 if options.dtype == "float32" else 2
    for kernel in ("lse", "weights", "sigmoid"):
        times = tune(card, kernel, item, lambda one, kernel=kernel: time_config(kernel, one, device, options))
        for config, taken in times.items():
            print(f"{card.name} {kernel} {options.dtype}: {taken:.3f} ms, {config}")
    print(f"kept in {cache_path()}")


if __name__ == "__main__":
    main()
