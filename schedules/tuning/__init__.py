"""Parameters chosen by measurement, on this machine or from what another one measured."""
