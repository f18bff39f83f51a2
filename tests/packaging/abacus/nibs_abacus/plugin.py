"""What the abacus claims: InfoNCE over the diagonal, in two dtypes, and no more."""

from nibs import BackendInfo, Capabilities, hookimpl


def load():
    """Import the work on first use."""
    from nibs_abacus.backend import Abacus

    return Abacus()


@hookimpl
def nibs_backends():
    """One backend."""
    yield BackendInfo(
        name="abacus",
        arrays=("nibs_abacus.backend.Beads",),
        capabilities=Capabilities(
            devices={"cpu"}, dtypes={"float64", "float32"}, objectives={"InfoNCE"}, features={"deterministic"}
        ),
        load=load,
        install="pip install nibs-abacus",
    )
