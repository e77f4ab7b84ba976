"""Channel order: statistics, tours, exact folding."""

from monkeyjump.mamba.order.callback import OrderUpdate
from monkeyjump.mamba.order.folding import fold, inverse
from monkeyjump.mamba.order.order import ChannelOrder, OrderedBlock

__all__ = ["ChannelOrder", "OrderUpdate", "OrderedBlock", "fold", "inverse"]
