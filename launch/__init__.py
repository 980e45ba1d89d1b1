"""How a run is started: the command line."""

__version__ = "0.1.0"
