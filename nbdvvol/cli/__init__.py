"""The `nbdvvol` command: one file per noun; talks to control through its API only (client.py).

Modules here import typer and the standard library at the top and everything heavier inside the commands,
so that `nbdvvol --help` is quick. doors.py is the one module that starts daemons of other rooms.
"""
