"""The registry: who owns which byte, which host serves what. Its only interface is named transactions.

`Registry.run(NAME, ...)` runs one of the functions marked `@transaction` in this package as one durable
transaction, in the registry's own thread. Nothing outside this package sees SQL.
"""

from nbdvvol.control.registry.store import Committed, Registry

__all__ = ["Committed", "Registry"]
