"""Machines: networks and codecs behind the verbs of :mod:`v4e.verbs`."""
