"""Past runs: what this machine and this cluster really did."""

from chiplog.ledger.store import Ledger

__all__ = ["Ledger"]
