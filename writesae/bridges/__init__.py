"""Ways to the tools of others: each a module, imported by those who use it, which needs that tool or nothing more.

`docs/bridges.md` says what goes over each and what does not.
"""
