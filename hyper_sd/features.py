"""What a UNet's encoder half computes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class _Reached(Exception):
    """Ends a forward pass behind the middle block."""


def encoder_channels(net: Any) -> tuple[int, ...]:
    """The channels of each of `encoder_features`."""
    widths = tuple(net.config.block_out_channels)
    return (*widths, widths[-1])


def encoder_features(net: Any, run: Callable[[], object]) -> tuple[Tensor, ...]:
    """The outputs of the down blocks and the middle block, each (B, C_i, h_i, w_i), in run(), a call of `net`.

    The call ends there: the up blocks, more than half of the network, are not computed.
    """
    features: list[Tensor] = []

    def keep(module: nn.Module, _: object, output: Any) -> None:
        features.append(output[0] if isinstance(output, tuple) else output)
        if module is net.mid_block:
            raise _Reached

    hooks = [block.register_forward_hook(keep) for block in (*net.down_blocks, net.mid_block)]
    try:
        run()
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(features)
