"""Which workers get a request, and what is known about them to say so.

`policies.choose` is one pure function of a `View` and `Features`; the `Board` keeps the view: loads as workers report
them, what this router has sent itself, the speeds it has learned and who holds which prefix.
"""
