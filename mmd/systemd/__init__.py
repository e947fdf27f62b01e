"""systemd as mmd uses it: units and jobs over D-Bus, inherited sockets, readiness messages, the journal.

Import the module you need. This package imports nothing by itself: the runner wants `notify` only, the D-Bus worker only
itself, and both are meant to stay small.
"""
