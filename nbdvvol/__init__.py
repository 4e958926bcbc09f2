"""nbdvvol: any mix of storage as per-VM virtual volumes, served over NBD without a box in the data path."""

__version__ = "0.1.0"
