"""No test depends on how long a machine takes: examples have no deadline either."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
