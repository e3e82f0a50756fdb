"""Lightning OPD on Megatron-Core. Read `records.py` first: it says what crosses each stage."""

__version__ = "0.1.0"
