"""What runs on the host: an agent that answers requests while somebody is connected, and a supervisor that stays.

Their text is sent (hosts/agent.py: `program`) and runs there by itself: standard library alone, Python 3.8 or later,
no name twice in the package, and imports among its modules on one line each, because they are sent as one text.
"""
