"""The command line: what is here (`nibs backends`), and what a batch will cost (`nibs plan`).

    nibs backends
    nibs plan --queries 4194304 --keys 4194304 --dim 768 --dtype bfloat16

The one file that imports click and rich; `nibs.__main__` says what to install where they are missing. It
computes nothing of its own: every figure is a field of a `Plan` or a `Status`. An error of `nibs.errors`
is one line and exit code 2, never a traceback; `--json` gives the same content to programs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nibs import __version__
from nibs.arrays import BYTES, FLOATS
from nibs.errors import NibsError
from nibs.plan import Plan, in_units, plan
from nibs.registry import Status, backends
from nibs.request import WRT
from nibs.spec import DIRECTIONS, InfoNCE, Objective, Sigmoid

__all__ = ["nibs"]

SWEEPS = {
    "forward": "logits once, no gradient",
    "keep": "logits once and kept, then the gradients",
    "strip": "logits once, a strip of rows at a time with its gradient",
    "recompute": "logits twice, then the gradients",
    "split": "logits again for each side: no float32 gradient is held",
    "single": "logits and gradients at once",
}
"""What a sweep does, for a reader of a plan; what it costs and holds is in `nibs.plan`."""


class Tidy(click.Group):
    """A group whose commands turn nibs' own errors into one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NibsError as error:
            _refuse(error)


def _refuse(error: NibsError) -> NoReturn:
    click.echo("nibs: " + " ".join(str(error).split()), err=True)
    raise click.exceptions.Exit(2)


@click.group(cls=Tidy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nibs")
def nibs() -> None:
    """Contrastive losses over huge batches: what is here, and what a batch will cost."""


@nibs.command("backends")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def show_backends(as_json: bool) -> None:
    """List every backend: ready, or broken and why. Loads each one to find out."""
    found = backends(probe=True)
    if as_json:
        click.echo(json.dumps([_status(status) for status in found], indent=2))
        return
    if not found:
        click.echo("No backend is installed. Start with: pip install nibs-numpy")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for column in ("name", "state", "from", "devices", "dtypes", "losses", "arrays"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "state"))
    for row in map(_status, found):
        state = Text(row["state"], style="green" if row["state"] == "ready" else "red")
        where = row["distribution"].replace(" ", "\n")
        lists = ("\n".join(row[column]) for column in ("devices", "dtypes", "objectives"))  # a line each: 80 columns
        table.add_row(Text(row["name"], style="bold"), state, where, *lists, "\n".join(_classes(row["arrays"])))
    console = Console(highlight=False)
    console.print(table)
    for status in found:
        if status.state != "ready":
            mend = f" Try: {status.info.install}" if status.info is not None and status.info.install else ""
            console.print(Text(f"{status.name} is broken: {status.reason}.{mend}"))


@nibs.command("plan")
@click.option("--queries", type=int, required=True, metavar="N", help="Rows of queries on a rank.")
@click.option("--keys", type=int, required=True, metavar="M", help="Rows of keys on a rank.")
@click.option("--dim", type=int, required=True, metavar="D", help="Width of a row.")
@click.option("--dtype", type=click.Choice(FLOATS), default="float32", show_default=True)
@click.option("--objective", type=click.Choice(["infonce", "sigmoid"]), default="infonce", show_default=True)
@click.option("--direction", type=click.Choice(DIRECTIONS), help="Of InfoNCE.  [default: symmetric]")
@click.option("--no-grad", is_flag=True, help="The loss alone.")
@click.option("--wrt", metavar="NAMES", help=f"Gradients wanted, out of {','.join(WRT)}.  [default: all]")
@click.option("--masked", is_flag=True, help="Masks, ids or a margin are in play.")
@click.option("--memory", metavar="SIZE", help="Budget beyond inputs and gradients, such as 512MiB.")
@click.option("--ring-size", type=int, default=1, show_default=True, metavar="W", help="Ranks that share the batch.")
@click.option("--backend", metavar="NAME", help="Whose tiles.  [default: the core's own]")
@click.option("--device", default="cpu", show_default=True, help="Such as cuda.")
@click.option(
    "--autograd/--no-autograd",
    default=None,
    help="Gradients by contrastive_loss and a backward, or by contrastive_loss_and_grad.  [default: by what there is]",
)
@click.option("--tflops", type=float, metavar="RATE", help="Also give the time at this matrix-product rate.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def show_plan(
    queries: int,
    keys: int,
    dim: int,
    dtype: str,
    objective: str,
    direction: str | None,
    no_grad: bool,
    wrt: str | None,
    masked: bool,
    memory: str | None,
    ring_size: int,
    backend: str | None,
    device: str,
    autograd: bool | None,
    tflops: float | None,
    as_json: bool,
) -> None:
    """Show how a batch would be cut into tiles, and what it costs; nothing is allocated or computed."""
    if tflops is not None and not 0 < tflops < float("inf"):
        raise click.BadParameter("expected a rate above 0.", param_hint="--tflops")
    made = plan(
        queries,
        keys,
        dim,
        dtype,
        objective=_objective(objective, direction),
        grad=not no_grad,
        wrt=None if wrt is None else tuple(filter(None, (name.strip() for name in wrt.split(",")))),
        memory=int(memory) if memory is not None and memory.isdecimal() else memory,
        ring_size=ring_size,
        masked=masked,
        backend=backend,
        device=device,
        autograd=autograd,
    )
    dense = queries * keys * ring_size * BYTES[dtype]
    seconds = None if tflops is None else made.flops / (tflops * 1e12)
    if as_json:
        click.echo(
            json.dumps({**asdict(made), "memory": made.memory, "dense_matrix": dense, "seconds": seconds}, indent=2)
        )
        return
    _print_plan(made, dense, seconds, tflops)


def _objective(name: str, direction: str | None) -> Objective:
    if name == "sigmoid":
        if direction is not None:
            raise click.BadParameter("the sigmoid loss has no direction.", param_hint="--direction")
        return Sigmoid()
    return InfoNCE() if direction is None else InfoNCE(direction=direction)  # type: ignore[arg-type]


def _print_plan(made: Plan, dense: int, seconds: float | None, tflops: float | None) -> None:
    size = made.ring_size
    tiles = -(-made.queries // made.query_tile) * -(-made.keys // made.key_tile) * size
    each = "" if size == 1 else " on each rank"
    rows = [
        ("tile", f"{made.query_tile:,} x {made.key_tile:,}", f"queries x keys, {tiles:,} of them{each}"),
        ("sweep", made.sweep, SWEEPS[made.sweep]),
        ("products", f"{made.products}", "matrix products of 2 n m d flops"),
        ("flops", _flops(made.flops), f"all products{each}"),
        ("workspace", in_units(made.workspace), "tiles, operands and kept tiles"),
        ("linear", in_units(made.linear), "vectors, accumulators, ring buffers: linear in the batch"),
        ("memory", in_units(made.memory), "both: all beyond inputs and returned gradients"),
        ("traffic", in_units(made.traffic), "read and written in main memory, at least"),
    ]
    if size > 1:
        rows.append(("ring", in_units(made.ring_bytes), "sent by each rank"))
    rows.append(("dense", in_units(dense), f"for one {made.queries:,} x {made.keys * size:,} matrix of logits{each}"))
    if seconds is not None:
        rows.append(("time", _time(seconds), f"at {tflops:g} Tflop/s{each}"))
    ring = "" if size == 1 else f", on each of {size:,} ranks"
    click.echo(f"{made.queries:,} queries x {made.keys:,} keys of {made.dim:,} in {made.dtype}{ring} ({made.kernel})\n")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _flops(count: int) -> str:
    value, unit = float(count), ""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if value < 1000 or unit == "E":
            break
        value /= 1000
    return f"{value:.4g} {unit}flop"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _classes(arrays: list[str]) -> list[str]:
    """Names as people know them: `jaxlib.ArrayImpl`, whatever private module it lies in; each once."""
    return list(dict.fromkeys(f"{name.partition('.')[0]}.{name.rpartition('.')[2]}" for name in arrays))


def _status(status: Status) -> dict[str, Any]:
    info = status.info
    lists: dict[str, list[str]] = {"devices": [], "dtypes": [], "objectives": [], "features": [], "collectives": []}
    if info is not None:
        lists = {name: sorted(getattr(info.capabilities, name)) for name in lists}
        lists["dtypes"].sort(key=FLOATS.index)
    return {
        "name": status.name,
        "state": status.state,
        "reason": status.reason,
        "distribution": status.distribution,
        "install": info.install if info is not None else "",
        "arrays": list(info.arrays) if info is not None else [],
        **lists,
    }
