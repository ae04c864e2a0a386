"""The command line and what a local run is made of."""
