"""What a framework needs to know before it can make a `BNGD` by name; docs/integrations.md."""

from __future__ import annotations

from .optimizer import BNGD

NAME = "bngd"


def register_timm() -> None:
    """Add ``"bngd"`` to timm's optimizers, for `timm.optim.create_optimizer_v2` and its scripts.

    timm's own rules for weight decay, layer decay and momentum then apply; other options of
    `BNGD` are keywords of `create_optimizer_v2`. A second call does nothing.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from timm.optim import OptimInfo, list_optimizers

    # the one registry that the factory reads; timm gives it no public name
    from timm.optim._optim_factory import default_registry

    if NAME not in list_optimizers():
        default_registry.register(
            OptimInfo(
                name=NAME,
                opt_class=BNGD,
                description="Batch-normalised gradient descent: standardised gradients, momentum",
                has_momentum=True,
            )
        )
